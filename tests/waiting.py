"""Waits for what another thread or process does, for the tests."""

import time


def wait_for(condition, seconds=60.0, pause=0.05):
    """Return when the condition holds; fail when it does not in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(pause)
