"""Waiting for another thread or process."""

import time


def wait_for(condition, seconds=60.0, pause=0.05):
    """Return when the condition holds; fail if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(pause)
