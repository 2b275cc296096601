"""The contract of a schedule: a factor on the learning rate for each step."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from framework.errors import SettingError, short

from .state import Stateful


class Schedule(Stateful):
    """Base of schedules with state. A schedule without state may be a function instead.

    A registered function takes the number of steps and its settings, and returns the schedule:

        @schedulers.register("line")
        def line(total_steps: int, end: float = 0.0) -> Callable[[int], float]:
            return lambda step: 1 + (end - 1) * step / total_steps
    """

    def __call__(self, step: int) -> float:
        """Return the factor on the learning rate of each group for a step; the first step is 0."""
        raise NotImplementedError

    def observe(self, metrics: dict[str, float]) -> None:
        """Receive the values after each validation, for schedules that depend on them.

        Args:
            metrics: the last value of each logged scalar, such as {"val/loss": 0.3}.
        """


def observes(schedule: Any) -> bool:
    """Return whether a schedule, or a class of schedules, depends on values of validation."""
    kind = schedule if isinstance(schedule, type) else type(schedule)
    return issubclass(kind, Schedule) and kind.observe is not Schedule.observe


def factor_of(schedule: Callable[[int], Any], step: int) -> float:
    """Return the factor of a schedule for a step.

    Raises:
        SettingError: the factor is not a finite number of at least 0.
    """
    factor = schedule(step)
    if type(factor) is float and 0.0 <= factor < math.inf:
        return factor
    try:
        number = -1.0 if isinstance(factor, str | bytes | complex) else float(factor)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = -1.0
    if 0.0 <= number < math.inf:
        return number
    found = short(factor)
    if isinstance(factor, Tensor) and factor.ndim:
        found = f"a tensor of shape {tuple(factor.shape)}"
    raise SettingError(
        "schedule: expected a factor on the learning rate (a finite number >= 0), "
        f"got {found} for step {step}"
    )
