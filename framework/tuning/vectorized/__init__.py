"""Trials of equal shape, trained together as one stacked model."""
