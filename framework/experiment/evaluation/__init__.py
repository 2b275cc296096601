"""What a model gets wrong: its worst samples, curves of its decisions, the surface of its loss."""
