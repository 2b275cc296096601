"""The contract of a schedule: the learning rate's factor as a function of the step."""

from .state import Stateful


class Schedule(Stateful):
    """A function of the optimizer step; a plugin may also be a function (total_steps, ...) -> (step -> factor)."""

    def __call__(self, step: int) -> float:
        """Return the factor on every group's learning rate for that step (0 is the first)."""
        raise NotImplementedError

    def observe(self, metrics: dict[str, float]) -> None:
        """Take note of a validation's values, e.g. {"val/loss": 0.3}; only schedules that react need it."""
