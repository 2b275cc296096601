"""The workers of torch's DataLoader: their end, and the time at which their death is reported."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.utils.data import dataloader

ITERATORS: tuple[type, ...] = ()
if hasattr(dataloader, "_MultiProcessingDataLoaderIter"):
    ITERATORS = (dataloader._MultiProcessingDataLoaderIter,)


def shut_down(iterator: Any) -> None:
    """End the workers of a DataLoader's iterator after their present batch.

    Gain: torch ends the workers when the iterator is collected. The traceback of an error that
    interrupts the iterator still references it. Without the method, the caller's `Process.kill`
    ends the workers.
    """
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def mark_shut_down(error: BaseException) -> None:
    """Mark the DataLoader iterator whose construction raised this error as shut down.

    Gain: `__del__` of the unfinished iterator fails for missing attributes and prints a traceback,
    which does not help users. A release of torch without these names prints it.
    """
    traceback = error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, ITERATORS):
            owner._shutdown = True  # type: ignore[attr-defined]  # a private class of torch
        traceback = traceback.tb_next


class DeferredDeaths:
    """A SIGCHLD handler that calls torch's handler only while the main thread waits for a batch.

    Gain: the handler of torch raises an error at the time of a worker's death, also in the middle
    of a step, after which model and optimizer are in an undefined state. A release of torch
    without such a handler does not need this one.
    """

    def __init__(self, torch_handler: Callable[..., Any]):
        self.torch_handler = torch_handler
        self.awaited = False
        self.missed = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.awaited:
            self.torch_handler(number, frame)
        else:
            self.missed = True

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Report a worker's death during this block, or one that occurred before it."""
        self.awaited = True
        try:
            if self.missed:
                self.missed = False
                self.torch_handler(signal.SIGCHLD, None)
            yield
        finally:
            self.awaited = False


def defer_deaths() -> Callable[[], AbstractContextManager[None]]:
    """Return the context manager in which to wait for a batch; call it after the workers started.

    torch sets its handler in the main thread only; in other threads this function changes nothing.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, DeferredDeaths):
        return handler.wait
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        return nullcontext
    deaths = DeferredDeaths(handler)
    signal.signal(signal.SIGCHLD, deaths)
    return deaths.wait
