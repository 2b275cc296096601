"""What a command and its runs do about signals, and how worker processes end with their parent."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

Handler = Callable[[int, Any], None]
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HANDED_ON = (
    signal.SIGUSR1,
    signal.SIGUSR2,
)  # a cluster's, that time is up: who handles one queues the job again
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.5  # between two looks whether the parent is alive, where the system does not tell


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end a command; not SIGHUP where it was ignored at the start, as `nohup` does."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in ENDING if number != signal.SIGHUP or not ignores_hangup]


class Interrupt:
    """A signal handler that ends a command by KeyboardInterrupt or SystemExit, for signals outside of training.

    An exception that is raised during an import may be lost: C code that imports a module clears
    it, or ends the process because of it. There the process exits at once.

    Args:
        defers: only keep the first signal, for the next `stopping` or `received`; for worker processes.

    Attributes:
        at_once: the process exits at once, because nobody handles an exception: before and after the command.
        received: the first signal, or None. Who finds it set after an exception was lost ends the command.
    """

    def __init__(self, defers: bool = False):
        self.defers = defers
        self.at_once = False
        self.received: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        is_first = self.received is None
        if is_first:
            self.received = number
        elif (
            number == signal.SIGHUP
        ):  # a shell and the system may both send it when a terminal is closed
            return
        if is_first and self.defers:
            return
        if self.at_once or importing(frame):
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(128 + number)
        raise ending_exception(number)


class Forward(Interrupt):
    """A signal handler that passes signals on to worker processes, each of them once to each process.

    Args:
        pids: returns the ids of the processes that are there; a later one gets the last signal by `tell`.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]):
        super().__init__()
        self.pids = pids
        self.last: int | None = None
        self.told: set[int] = set()

    def __call__(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received = number
        elif number == signal.SIGHUP:
            return
        self.last = number
        self.told.clear()
        self.tell()

    def tell(self) -> None:
        """Send the last signal to processes that have not got it."""
        if self.last is None:
            return
        for pid in self.pids():
            if pid in self.told:
                continue
            self.told.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, self.last)


def ending_exception(number: int) -> BaseException:
    """Return the exception that ends a command because of a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def importing(frame: Any) -> bool:
    """Return whether a module is being imported in the calls that lead to a frame."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def is_command() -> bool:
    """Return whether this process is the command line program, and not another one that imports the package."""
    if os.path.basename(sys.argv[0] if sys.argv else "") == "framework":
        return True
    words = sys.orig_argv
    return "-m" in words and words[words.index("-m") + 1 :][:1] in (
        ["framework"],
        ["framework.cli.main"],
    )


def guard_start() -> None:
    """Handle signals from the first import of the command line program on."""
    if is_command() and threading.current_thread() is threading.main_thread():
        interrupt = Interrupt()
        interrupt.at_once = True
        for number in ending_signals():
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, interrupt)


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Let signals end the command; gives the handler, which is that of an outer `interruptible` if there is one."""
    current = signal.getsignal(signal.SIGTERM)
    if isinstance(current, Interrupt):
        outer = current.at_once
        current.at_once = False
        try:
            yield current
        finally:
            current.at_once = outer
        return
    interrupt = Interrupt()
    with handled(ending_signals(), interrupt):
        yield interrupt


def received() -> int | None:
    """Return the signal because of which nothing more should begin, or None."""
    current = signal.getsignal(signal.SIGTERM)
    return current.received if isinstance(current, Interrupt) else None


@contextmanager
def handled(
    numbers: Iterable[signal.Signals], handler: Handler
) -> Iterator[dict[signal.Signals, Any]]:
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
def forwarding(pids: Callable[[], Iterable[int]]) -> Iterator[Forward]:
    """Pass signals that end a command on to worker processes."""
    forward = Forward(pids)
    with handled(ending_signals(), forward) as before:
        try:
            yield forward
        finally:
            if forward.received is not None:
                remember(before, forward.received)


def remember(before: dict[signal.Signals, Any], number: int) -> None:
    """Let the handlers that were there before know of a signal that was handled in their place."""
    for earlier in before.values():
        if isinstance(earlier, Interrupt) and earlier.received is None:
            earlier.received = number


class Stoppable(Protocol):
    """A run that can be told to end, such as a Trainer."""

    def stop(self, by: str, reason: str, signal: signal.Signals | None = None) -> None: ...


@contextmanager
def stopping(trainers: Sequence[Stoppable]) -> Iterator[list[int]]:
    """On the first SIGINT, SIGTERM or SIGHUP, let runs finish their step and save; a second ends them at once.

    A second SIGHUP is ignored: both a shell and the system send one when a terminal is closed.
    So too on SIGUSR1 or SIGUSR2 where there is a handler for it, which is called when all is saved.
    """
    got: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if number in ENDING and any(each in ENDING for each in got):
            if number == signal.SIGHUP:
                return
            raise ending_exception(number)
        got.append(number)
        ending = signal.Signals(number)
        for trainer in trainers:
            trainer.stop("signal", ending.name, ending)

    handed_on = [each for each in HANDED_ON if callable(signal.getsignal(each))]
    with handled((*ending_signals(), *handed_on), stop) as before:
        missed = [
            each.received
            for each in before.values()
            if isinstance(each, Interrupt) and each.received
        ]
        if missed:
            stop(missed[0], None)
        yield got
        for number in got:
            if number in ENDING:
                remember(before, number)
    for late in [each for each in HANDED_ON if each in got]:
        before[late](late, None)


@contextmanager
def blocked() -> Iterator[None]:
    """Block the signals that end a command, also in processes that are started meanwhile, until they `serve`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(parent: int) -> None:
    """Let this process work for its parent: end with it, and keep a signal until the trial under way has seen it.

    It gets signals from its parent alone: those of a terminal would come a second time.
    """
    os.setpgrp()
    end_with_parent(parent)
    interrupt = Interrupt(defers=True)
    for number in ending_signals():
        signal.signal(number, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


@dataclass(frozen=True)
class Serve:
    """Calls `serve`; the initializer of a worker process of joblib, which compares it with that of present workers."""

    parent: int

    def __call__(self) -> None:
        serve(self.parent)


def end_with_parent(parent: int) -> None:
    """Let this process be killed when its parent process ends.

    Args:
        parent: the process id of the parent. If it has ended already, so does this process.
    """
    if sys.platform == "linux":
        import ctypes  # not at the top: a command that starts no process does without

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def watch(parent: int) -> None:
    """End this process when its parent process has ended."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
