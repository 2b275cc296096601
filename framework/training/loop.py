"""The training loop of an epoch: steps, with logging and validation when they are due."""

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Run(Protocol[Item]):
    """A run as the loop uses it: a Trainer, or several trainers that train together.

    The latter are in `tuning/vectorized/trainer.py`. An item is a batch, or a batch for each
    trainer. `last` is whether a step is the last one of its epoch.
    """

    @property
    def done(self) -> bool:
        """Whether the run ends after the current step."""

    def start_epoch(self) -> None:
        """Begin an epoch, or continue one after a resume."""

    def windows(self) -> Iterator[tuple[Sequence[Item], bool]]:
        """Yield the items of each remaining step of the epoch, and whether it is the last one."""

    def train_step(self, window: Sequence[Item]) -> None:
        """Run one optimizer step."""

    def count_step(self, window: Sequence[Item], last: bool) -> None:
        """Update the counters after a step."""

    def log_if_due(self, last: bool) -> None:
        """Log values of training if that is due after this step."""

    def validate_if_due(self, last: bool) -> None:
        """Validate if that is due after this step."""

    def finish_step(self, last: bool) -> None:
        """Emit the last events of a step."""


def run_epoch(run: Run[Item]) -> None:
    """Run one epoch, or the rest of it after a resume."""
    run.start_epoch()
    for window, last in run.windows():
        run.train_step(window)
        run.count_step(window, last)
        run.log_if_due(last)
        run.validate_if_due(last)
        run.finish_step(last)
        if last or run.done:
            return
