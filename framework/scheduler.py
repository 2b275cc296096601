"""The contract of a schedule: the learning rate's factor as a function of the step."""

from typing import Any

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
