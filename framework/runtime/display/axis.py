"""The axes of charts, in images (`drawing.py`) and in the terminal (`plot.py`)."""

import math

LARGEST = 1e300  # so that the difference of two values is a finite float
SMALLEST = 1e-300


class Axis:
    """The range of an axis, linear or logarithmic.

    Ends beyond ±1e300 are moved there. A range that is empty, or narrower than 1e-300, is widened.

    Args:
        low: the value at its beginning.
        high: the value at its end.
        log: whether equal distances are equal factors. Both ends must be positive then.

    Raises:
        ValueError: a logarithmic axis begins at 0 or below.
    """

    def __init__(self, low: float, high: float, log: bool = False):
        if log and low <= 0:
            raise ValueError(f"a logarithmic axis begins above 0, not at {low}")
        self.log = log
        self.low = min(max(low, SMALLEST if log else -LARGEST), LARGEST)
        self.high = min(max(high, self.low), LARGEST)
        if self._scaled(self.high) - self._scaled(self.low) < SMALLEST:
            self.high = self.low * 2 if log else self.low + max(1.0, 1e-6 * abs(self.low))

    def _scaled(self, value: float) -> float:
        """Return the logarithm of a value on a logarithmic axis, otherwise the value."""
        return math.log(value) if self.log else value

    def position(self, value: float) -> float:
        """Return the position of a value: 0 at the beginning of the axis, 1 at its end."""
        if self.log and value <= 0:
            return -math.inf
        first = self._scaled(self.low)
        return (self._scaled(value) - first) / (self._scaled(self.high) - first)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Return about `count` round values in the range, with their labels."""
        if self.log:
            first = math.ceil(math.log10(self.low) - 1e-9)
            last = math.floor(math.log10(self.high) + 1e-9)
            step = max(1, math.ceil((last - first + 1) / count))
            powers = [10.0**power for power in range(first, last + 1, step)]
            values = powers if len(powers) > 1 else [self.low, self.high]
            return [(value, f"{value:.3g}") for value in values]
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step_size = min((m * power for m in (1, 2, 5, 10)), key=lambda size: abs(size - rough))
        first = math.ceil(self.low / step_size - 1e-9)
        last = math.floor(self.high / step_size + 1e-9)
        return [(k * step_size, f"{k * step_size:.6g}") for k in range(first, last + 1)]
