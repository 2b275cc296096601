"""Searches: trials that a sampler proposes."""
