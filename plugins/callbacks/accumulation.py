"""Gradient accumulation that changes during training: small batches first, large ones later."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from framework import Callback, Context, PositiveInt, SettingError, callbacks, count_steps
from framework.contracts.callback import Pace
from framework.contracts.schedule import Schedule

EXAMPLE = "epochs are counted from 0, such as {0: 1, 10: 4}"


class PacedSchedule(Schedule):
    """A schedule that follows the position in the data, as if every step had the same batches."""

    def __init__(self, schedule: Callable[[int], float], trainer: Context):
        self.schedule = schedule
        self.state = trainer.state
        self.batches_per_step = trainer.accumulate
        self.steps_per_epoch = trainer.state.steps_per_epoch

    def __call__(self, step: int) -> float:
        epoch_start = self.state.epoch * self.steps_per_epoch
        return self.schedule(epoch_start + self.state.batch // self.batches_per_step)

    def observe(self, metrics: dict[str, float]) -> None:
        if isinstance(self.schedule, Schedule):
            self.schedule.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict() if isinstance(self.schedule, Schedule) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.schedule, Schedule):
            self.schedule.load_state_dict(state)


@callbacks.register("accumulation", aliases=["accumulation_schedule"])
class Accumulation(Callback):
    """Changes trainer.accumulate, the batches per step, at given epochs.

    A larger batch late in training has the effect of a smaller learning rate (Smith et al. 2018,
    arXiv:1711.00489). If trainer.max_epochs ends the run, the learning rate follows the position in
    the data: after half of the epochs it is the same as with constant trainer.accumulate. If
    trainer.max_steps ends the run, it follows the steps as usual.

    Args:
        schedule: batches per step by first epoch, counted from 0, e.g. {0: 1, 10: 4}; earlier
            epochs use trainer.accumulate.
    """

    alone = True  # vectorized trials make their steps together

    def __init__(self, schedule: dict[str, PositiveInt]):
        if not schedule:
            raise SettingError(f"accumulation.schedule is empty; {EXAMPLE}")
        self.schedule: dict[int, int] = {}
        for epoch, batches in schedule.items():
            if not epoch.isdecimal():
                raise SettingError(
                    f"accumulation.schedule: expected epochs as keys, got {epoch!r}; {EXAMPLE}"
                )
            self.schedule[int(epoch)] = batches
        self.before: tuple[int, Any] | None = None  # `accumulate` and `schedule` of the trainer

    def on_fit_start(self, trainer: Context) -> None:
        """Count the steps of the run.

        Raises:
            SettingError: the training data has no length.
        """
        state = trainer.state
        if not state.steps_per_epoch:
            raise SettingError("accumulation needs training data with a length")
        self.before = (trainer.accumulate, trainer.schedule)
        if trainer.schedule is not None and trainer.max_steps is None:
            trainer.schedule = PacedSchedule(trainer.schedule, trainer)
        steps = self.steps_of_epochs(trainer, len(trainer.train_batches))
        state.total_steps = min(sum(steps), trainer.max_steps or sum(steps))
        self.on_epoch_start(trainer)

    def on_epoch_start(self, trainer: Context) -> None:
        assert self.before is not None
        default, _ = self.before
        trainer.accumulate = self.batches_per_step(trainer.state.epoch, default)
        trainer.state.steps_per_epoch = count_steps(trainer.train_batches, trainer.accumulate)

    def on_fit_end(self, trainer: Context) -> None:
        if self.before is not None:
            trainer.accumulate, trainer.schedule = self.before
            self.before = None

    def on_exception(self, trainer: Context) -> None:
        self.on_fit_end(trainer)

    def pace(self, trainer: Context, batches: int) -> Pace:
        steps = self.steps_of_epochs(trainer, batches)
        total = min(sum(steps), trainer.max_steps or sum(steps))
        mean = batches * len(steps) / sum(steps)
        text = describe_steps(steps, total)
        if trainer.max_steps is not None:
            return Pace(total, mean, text)
        default = trainer.accumulate
        default_steps = math.ceil(batches / default)
        schedule_steps: list[int] = []
        for epoch, count in enumerate(steps):
            first = epoch * default_steps
            accumulated = self.batches_per_step(epoch, default)
            schedule_steps += [first + step * accumulated // default for step in range(count)]
        return Pace(total, mean, text, schedule_steps.__getitem__)

    def batches_per_step(self, epoch: int, default: int) -> int:
        """Return the batches of a step in an epoch, counted from 0."""
        started = [first for first in self.schedule if first <= epoch]
        return self.schedule[max(started)] if started else default

    def steps_of_epochs(self, trainer: Context, batches: int) -> list[int]:
        """Return the steps of each epoch, up to the epoch in which the run ends.

        Args:
            trainer: with its own `accumulate`.
            batches: of an epoch.
        """
        steps: list[int] = []
        done = 0
        while len(steps) != trainer.max_epochs:
            if trainer.max_steps is not None and done >= trainer.max_steps:
                break
            accumulated = self.batches_per_step(len(steps), trainer.accumulate)
            steps.append(math.ceil(batches / accumulated))
            done += steps[-1]
        return steps


def describe_steps(steps: Sequence[int], total: int) -> str:
    """Return a text such as "5 epochs of 6, 3 from epoch 1 on"; the last epoch may end early."""
    epochs = len(steps) - (sum(steps) - total) / steps[-1]
    text = f"{epochs:.4g} epochs of {steps[0]:,}"
    for epoch in range(1, len(steps)):
        if steps[epoch] != steps[epoch - 1]:
            text += f", {steps[epoch]:,} from epoch {epoch} on"
    return text
