"""Batches a step that change while training goes on: small steps first, large batches in the end."""

from collections.abc import Callable, Sequence
from typing import Any

from framework import Callback, Context, PositiveInt, SettingError, callbacks, count_steps
from framework.contracts.callback import Pace
from framework.contracts.schedule import Schedule


class Paced(Schedule):
    """A schedule read at the step at which the run would be if all its steps were of as many batches."""

    def __init__(self, schedule: Callable[[int], float], trainer: Context):
        self.schedule, self.state = schedule, trainer.state
        self.batches, self.steps = trainer.accumulate, trainer.state.steps_per_epoch

    def __call__(self, step: int) -> float:
        return self.schedule(self.state.epoch * self.steps + self.state.batch // self.batches)

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
    """Other numbers of batches a step from some epochs on, in the place of trainer.accumulate.

    A larger batch late in training does what a smaller learning rate would (Smith et al. 2018, arXiv:1711.00489). Where
    trainer.max_epochs ends the run, the learning rate keeps its place in the data: after half of the epochs it is where
    it would be with trainer.accumulate batches a step; where trainer.max_steps does, it goes by steps as ever.
    """

    alone = True  # trials that train as one make their steps together

    def __init__(self, schedule: dict[str, PositiveInt]):
        """Say how many batches, and from when on.

        Args:
            schedule: by epoch, counted from 0, e.g. {0: 1, 10: 4}; before the first one as trainer.accumulate says.
        """
        wrong = next((epoch for epoch in schedule if not epoch.isdecimal()), None)
        if wrong is not None or not schedule:
            given = f"{wrong!r} is no epoch" if schedule else "it is empty"
            raise SettingError(
                f"accumulation.schedule: {given}; epochs are counted from 0, such as {{0: 1, 10: 4}}"
            )
        self.schedule = {
            int(epoch): batches
            for epoch, batches in sorted(schedule.items(), key=lambda each: int(each[0]))
        }
        self.before: tuple[int, Any] | None = None  # what the trainer had

    def on_fit_start(self, trainer: Context) -> None:
        """Count the steps to come. Raises SettingError where the batches of an epoch cannot be counted."""
        state = trainer.state
        if not state.steps_per_epoch:
            raise SettingError("accumulation needs training data that knows its length")
        self.before = trainer.accumulate, trainer.schedule
        if trainer.schedule is not None and trainer.max_steps is None:
            trainer.schedule = Paced(trainer.schedule, trainer)
        steps = self.steps(
            len(trainer.train_batches), trainer.accumulate, trainer.max_epochs, trainer.max_steps
        )
        state.total_steps = min(sum(steps), trainer.max_steps or sum(steps))
        self.on_epoch_start(trainer)

    def on_epoch_start(self, trainer: Context) -> None:
        assert self.before is not None
        trainer.accumulate = self.wanted(trainer.state.epoch, self.before[0])
        trainer.state.steps_per_epoch = count_steps(trainer.train_batches, trainer.accumulate)

    def on_fit_end(self, trainer: Context) -> None:
        if self.before is not None:
            (trainer.accumulate, trainer.schedule), self.before = self.before, None

    def on_exception(self, trainer: Context) -> None:
        self.on_fit_end(trainer)

    def wanted(self, epoch: int, usual: int) -> int:
        """Return the batches of a step in an epoch, counted from 0."""
        return next(
            (batches for first, batches in reversed(self.schedule.items()) if first <= epoch), usual
        )

    def steps(
        self, batches: int, usual: int, max_epochs: int | None, max_steps: int | None
    ) -> list[int]:
        """Return the steps of each epoch, up to the one in which a limit is reached."""
        steps: list[int] = []
        done = 0
        while len(steps) != max_epochs and (max_steps is None or done < max_steps):
            steps.append(-(-batches // self.wanted(len(steps), usual)))
            done += steps[-1]
        return steps

    def pace(self, trainer: Context, batches: int) -> Pace:
        usual = trainer.accumulate
        steps = self.steps(batches, usual, trainer.max_epochs, trainer.max_steps)
        total = min(sum(steps), trainer.max_steps or sum(steps))
        mean = batches * len(steps) / sum(steps)
        if trainer.max_steps is not None:
            return Pace(total, mean, told(steps, total))
        usual_steps = -(-batches // usual)
        schedule_steps: list[int] = []
        for epoch, count in enumerate(steps):
            first = epoch * usual_steps
            wanted = self.wanted(epoch, usual)
            schedule_steps += [first + step * wanted // usual for step in range(count)]
        return Pace(total, mean, told(steps, total), schedule_steps.__getitem__)


def told(steps: Sequence[int], total: int) -> str:
    """Write: 5 epochs of 6, 3 from epoch 1 on. The last epoch may end early."""
    epochs = len(steps) - (sum(steps) - total) / steps[-1]
    changes = [
        epoch for epoch, count in enumerate(steps) if epoch == 0 or count != steps[epoch - 1]
    ]
    each = ", ".join(
        f"{steps[epoch]:,}" + f" from epoch {epoch} on" * (epoch > 0) for epoch in changes
    )
    return f"{epochs:.4g} epochs of {each}"
