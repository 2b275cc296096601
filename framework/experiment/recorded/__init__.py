"""What can be asked about a run: the source of a setting, one of its steps, the run once more."""
