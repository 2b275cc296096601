"""What a run does about signals."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .trainer import Trainer

ENDING = (signal.SIGINT, signal.SIGTERM)
HANDED_ON = (signal.SIGUSR1, signal.SIGUSR2)  # a cluster's, that time is up: who handles one queues the job again


@contextmanager
def stopping(trainers: Sequence[Trainer]) -> Iterator[list[int]]:
    """On the first SIGINT or SIGTERM, let runs finish their step and their checkpoint; a second ends them at once.

    So too on SIGUSR1 or SIGUSR2 where there is a handler for it, which is called when all is saved.
    """
    got: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if number in ENDING and any(each in ENDING for each in got):
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        got.append(number)
        for trainer in trainers:
            trainer.state.stop = f"{signal.Signals(number).name}"

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (*ENDING, *(each for each in HANDED_ON if callable(signal.getsignal(each)))):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread: its owner handles signals
        pass
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for late in [each for each in HANDED_ON if each in got]:
        before[late](late, None)
