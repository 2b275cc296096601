"""From a checked experiment to objects and a run: build, train, resume, load, plan, check, find."""
