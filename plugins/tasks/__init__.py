"""Tasks: the computation of a training step."""
