"""Strategies: how the processes of a run share its work."""
