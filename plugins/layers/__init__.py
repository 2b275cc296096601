"""Activations, normalizations, dropouts, initializers, blocks, heads and other layers."""
