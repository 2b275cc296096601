"""The parts that come with the framework, one file a kind. Drop your own file here: it is found."""
