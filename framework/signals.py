"""What a run does about signals."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .trainer import Trainer


@contextmanager
def stopping(trainers: Sequence[Trainer]) -> Iterator[list[int]]:
    """On the first SIGINT or SIGTERM, let runs finish their step and their checkpoint; a second ends them at once."""
    got: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if got:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        got.append(number)
        for trainer in trainers:
            trainer.state.stop = f"{signal.Signals(number).name}"

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread: its owner handles signals
        pass
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
