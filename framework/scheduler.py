"""The contract of a schedule: the learning rate's factor as a function of the step."""

from typing import Any


class Schedule:
    """A function of the optimizer step; a plugin may also be a function (total_steps, ...) -> (step -> factor)."""

    def __call__(self, step: int) -> float:
        """Return the factor on every group's learning rate for that step (0 is the first)."""
        raise NotImplementedError

    def observe(self, metrics: dict[str, float]) -> None:
        """Take note of a validation's values, e.g. {"val/loss": 0.3}; only schedules that react need it."""

    def state_dict(self) -> dict[str, Any]:
        """Return what `observe` has gathered, in plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
