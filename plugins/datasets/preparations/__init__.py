"""How the built-in data sets prepare raw inputs, as modules that are exported with the model.

Each computes what the `read_inputs` of its data set computes; the tests compare the two.
"""
