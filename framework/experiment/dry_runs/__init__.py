"""Training runs that are ended after a few steps: the checks of `check`, the searches of `find`."""
