"""Where the time of a run goes, from counters alone: nothing here waits for a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Clock:
    """Seconds spent by part ("data", "validation", "checkpoint"); what no part has is the training steps."""

    def __init__(self) -> None:
        self.began = perf_counter()
        self.seconds: dict[str, float] = {}

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a block to a part."""
        began = perf_counter()
        try:
            yield
        finally:
            self.add(name, perf_counter() - began)

    def shares(self) -> dict[str, float]:
        """Return each part's share of the time since the clock began, and that of the steps; they add up to 1."""
        whole = max(perf_counter() - self.began, 1e-9)
        parts = {name: seconds / whole for name, seconds in self.seconds.items()}
        return {"steps": 1 - sum(parts.values()), **parts}
