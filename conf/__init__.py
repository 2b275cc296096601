"""The default experiment, config.yaml, and the experiments of the framework."""
