"""From the command line and YAML files to a checked experiment, through Hydra."""
