"""What a run does about signals."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .trainer import Trainer

Handler = Callable[[int, Any], None]
ENDING = (signal.SIGINT, signal.SIGTERM)
HANDED_ON = (signal.SIGUSR1, signal.SIGUSR2)  # a cluster's, that time is up: who handles one queues the job again


@contextmanager
def handled(numbers: Iterable[signal.Signals], handler: Handler) -> Iterator[dict[signal.Signals, Any]]:
    """Let signals be handled so; gives what handled each before. Outside the main thread nothing is changed."""
    before: dict[signal.Signals, Any] = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: its owner handles signals
        pass
    try:
        yield before
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


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

    with handled((*ENDING, *(each for each in HANDED_ON if callable(signal.getsignal(each)))), stop) as before:
        yield got
    for late in [each for each in HANDED_ON if each in got]:
        before[late](late, None)
