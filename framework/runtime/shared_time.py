"""A clock that all processes of a run read alike, for what is due after a time.

In a single process it is `time.monotonic`. With several processes the main process measures the
time, and all of them use its value of the current step, so that they do the same things at the same
steps.
"""

import time


class SharedTime:
    """The clock; `agreed` is the value of the main process, or None in a single process."""

    def __init__(self) -> None:
        self.agreed: float | None = None

    def now(self) -> float:
        """Return seconds since some moment."""
        return time.monotonic() if self.agreed is None else self.agreed


SHARED_TIME = SharedTime()  # a global, as the clock of the machine is
