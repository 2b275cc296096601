"""What the framework composes when nothing is said: config.yaml and the experiments."""
