"""Faster implementations of the training step and of the optimizer update."""
