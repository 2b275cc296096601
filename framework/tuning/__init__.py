"""Sweeps: grids and searches, their folders and tables, and trials that train as one model."""
