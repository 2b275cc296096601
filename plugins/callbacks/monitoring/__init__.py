"""Callbacks that show the training, and do not change it."""
