"""The worker processes of torch's DataLoader: how they end, and when their death is reported."""

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
    """Let the workers of a DataLoader's iterator finish and end.

    Gain: an iterator that an error interrupts is still referenced by the error's traceback, and so
    would not be collected, which is torch's public way to end its workers. Without the method the
    caller's `Process.kill` ends them.
    """
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def abandon(error: BaseException) -> None:
    """Mark the iterator whose construction raised this error as shut down.

    Gain: `__del__` of the unfinished iterator would miss attributes, and print a traceback that
    tells users nothing. Where torch has renamed these, that traceback is printed.
    """
    traceback = error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, ITERATORS):
            owner._shutdown = True  # type: ignore[attr-defined]
        traceback = traceback.tb_next


class DeferredDeaths:
    """A SIGCHLD handler that calls torch's only while a batch is awaited.

    Gain: torch's own handler raises wherever the main thread happens to be when a worker dies: in
    the middle of a step, after which model and optimizer are in no defined state. A release of
    torch without such a handler needs none.
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
        """Report a worker's death in this block, and one that was missed before it."""
        self.awaited = True
        try:
            if self.missed:
                self.missed = False
                self.torch_handler(signal.SIGCHLD, None)
            yield
        finally:
            self.awaited = False


def defer_deaths() -> Callable[[], AbstractContextManager[None]]:
    """Return the context manager to wait for a batch in, once the workers have started.

    torch sets its handler in the main thread only; in another thread nothing is changed.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if isinstance(handler, DeferredDeaths):
        return handler.wait
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        return nullcontext
    deaths = DeferredDeaths(handler)
    signal.signal(signal.SIGCHLD, deaths)
    return deaths.wait
