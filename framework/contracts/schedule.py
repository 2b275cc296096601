"""The contract of a schedule: the learning rate's factor as a function of the step."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from framework.errors import SettingError, short

from .state import Stateful


class Schedule(Stateful):
    """A function of the optimizer step; a plugin may also be a function (total_steps, ...) -> (step -> factor)."""

    def __call__(self, step: int) -> float:
        """Return the factor on every group's learning rate for that step (0 is the first)."""
        raise NotImplementedError

    def observe(self, metrics: dict[str, float]) -> None:
        """Take note of a validation's values, e.g. {"val/loss": 0.3}; only schedules that react need it."""


def observes(schedule: Any) -> bool:
    """Whether a schedule, or a class of schedules, reacts to the values of validations."""
    kind = schedule if isinstance(schedule, type) else type(schedule)
    return issubclass(kind, Schedule) and kind.observe is not Schedule.observe


def factor_of(schedule: Callable[[int], Any], step: int) -> float:
    """Return a schedule's factor for a step. Raises SettingError for none from 0 to infinity."""
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
    said = "expected a factor on the learning rate, a finite number from 0 on"
    raise SettingError(f"schedule: {said}, got {found} for step {step}")
