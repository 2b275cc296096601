"""Sweeps: one trial for each combination of settings."""
