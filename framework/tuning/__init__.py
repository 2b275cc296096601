"""Tuning: sweeps over grids, searches, and trials that train together. `train -m` comes here; a single run does not."""
