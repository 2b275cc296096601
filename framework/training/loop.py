"""The loop of training: epochs of steps, with logging and validation when they are due."""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Run(Protocol[Item]):
    """What the loop asks of a run.

    A Trainer is one; so are several trainers that train as one (`tuning/vectorized/trainer.py`). An
    item is what a run reads for a batch. `last` tells whether a step is the last of its epoch.
    """

    @property
    def done(self) -> bool:
        """Whether the run ends after the present step."""

    def start_epoch(self) -> None:
        """Begin an epoch, or go on in one."""

    def windows(self) -> Iterator[tuple[Sequence[Item], bool]]:
        """Yield the items of each step that is left in the epoch, and whether it is the last."""

    def train_step(self, window: Sequence[Item]) -> None:
        """Make one step of the optimizer."""

    def count_step(self, window: Sequence[Item], last: bool) -> None:
        """Count a step that is done."""

    def log_if_due(self, last: bool) -> None:
        """Log values of training if they are due after this step."""

    def validate_if_due(self, last: bool) -> None:
        """Validate if that is due after this step."""

    def finish_step(self, last: bool) -> None:
        """Emit the events that end a step."""


def run_epoch(run: Run[Item]) -> None:
    """Run one epoch, from the batch where the run stands."""
    run.start_epoch()
    for window, last in run.windows():
        run.train_step(window)
        run.count_step(window, last)
        run.log_if_due(last)
        run.validate_if_due(last)
        run.finish_step(last)
        if last or run.done:
            return
