"""How a run is continued: which run, and which of its settings may have changed."""
