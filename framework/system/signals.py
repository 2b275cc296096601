"""Signals: how they end commands and runs, and how worker processes end with their parent."""

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
# Sent by a cluster before its time limit; a handler of them requeues the job.
TIME_LIMIT = (signal.SIGUSR1, signal.SIGUSR2)
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.5  # between checks that the parent is alive, except on Linux


def ending_signals() -> list[signal.Signals]:
    """Return the signals that end a command; not SIGHUP if it is ignored, as by `nohup`."""
    ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in ENDING if number != signal.SIGHUP or not ignores_hangup]


class Interrupt:
    """A signal handler outside of training: it raises KeyboardInterrupt or SystemExit.

    During an import the process exits immediately instead: C code that imports a module may clear
    the exception, or abort the process because of it.

    Args:
        defers: only record the first signal, for the next `stopping` or `received`; for worker
            processes.

    Attributes:
        exits: the process exits immediately, because no code handles an exception: before and after
            the command.
        received: the first signal, or None. It ends the command also if the exception was lost.
    """

    def __init__(self, defers: bool = False):
        self.defers = defers
        self.exits = False
        self.received: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        is_first = self.received is None
        if is_first:
            self.received = number
        elif number == signal.SIGHUP:  # shell and system may both send it for a closed terminal
            return
        if is_first and self.defers:
            return
        if self.exits or importing(frame):
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(128 + number)
        raise ending_exception(number)


class Forward(Interrupt):
    """A signal handler that forwards each signal once to each worker process.

    Args:
        pids: returns the ids of the running processes. Processes that start later get the last
            signal from `send_pending`.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]):
        super().__init__()
        self.pids = pids
        self.last: int | None = None
        self.notified: set[int] = set()

    def __call__(self, number: int, frame: Any) -> None:
        if self.received is None:
            self.received = number
        elif number == signal.SIGHUP:
            return
        self.last = number
        self.notified.clear()
        self.send_pending()

    def send_pending(self) -> None:
        """Send the last signal to processes that have not received it."""
        if self.last is None:
            return
        for pid in self.pids():
            if pid in self.notified:
                continue
            self.notified.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, self.last)


def ending_exception(number: int) -> BaseException:
    """Return the exception that ends a command because of a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def status_of_signal(error: BaseException) -> int | None:
    """Return the exit status of the signal whose exception an error has replaced, or None.

    Code that is interrupted may fail while it cleans up, as that of OmegaConf does: then the error
    is a consequence of the signal.
    """
    chain = [error]
    for each in chain:  # the list grows during the loop
        if isinstance(each, KeyboardInterrupt):
            return 128 + signal.SIGINT
        if isinstance(each, SystemExit) and each.code in [128 + number for number in ENDING]:
            return int(each.code)
        for earlier in (each.__cause__, each.__context__):
            if earlier is not None and not any(earlier is other for other in chain):
                chain.append(earlier)
    return None


def importing(frame: Any) -> bool:
    """Return whether a frame, or one of its callers, imports a module."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def is_command() -> bool:
    """Return whether this process is the command line program."""
    if sys.argv and os.path.basename(sys.argv[0]) == "framework":
        return True
    arguments = sys.orig_argv
    if "-m" not in arguments[:-1]:
        return False
    module = arguments[arguments.index("-m") + 1]
    return module in ("framework", "framework.cli.main")


def guard_start() -> None:
    """Handle signals of the command line program from its first import on."""
    if not is_command() or threading.current_thread() is not threading.main_thread():
        return
    parent = launcher_of(sys.orig_argv)
    if parent is not None:
        end_with_parent(parent)
    interrupt = Interrupt()
    interrupt.exits = True
    for number in ending_signals():
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, interrupt)
    if parent is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def launcher_of(arguments: Sequence[str]) -> int | None:
    """Return the process that has started this one with `framework process FOLDER PARENT`."""
    words = list(arguments)
    if "process" not in words[:-2]:
        return None
    parent = words[words.index("process") + 2]
    return int(parent) if parent.isdecimal() else None


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Let signals end the command; yield the handler, which nested blocks share."""
    current = signal.getsignal(signal.SIGTERM)
    if isinstance(current, Interrupt):
        exited = current.exits
        current.exits = False
        try:
            yield current
        finally:
            current.exits = exited
        return
    interrupt = Interrupt()
    with handled(ending_signals(), interrupt), without_lost_exceptions():
        yield interrupt


@contextmanager
def without_lost_exceptions() -> Iterator[None]:
    """Print nothing for the exception of a signal that arrives in a destructor.

    Python cannot raise it there, as in that of a DataLoader's iterator, and prints a traceback.
    """
    before = sys.unraisablehook

    def print_others(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt | SystemExit):
            before(lost)

    sys.unraisablehook = print_others
    try:
        yield
    finally:
        sys.unraisablehook = before


def received() -> int | None:
    """Return the signal that ends the command, so that no more work should start, or None."""
    current = signal.getsignal(signal.SIGTERM)
    return current.received if isinstance(current, Interrupt) else None


@contextmanager
def handled(
    numbers: Iterable[signal.Signals], handler: Handler
) -> Iterator[dict[signal.Signals, Any]]:
    """Handle signals in a block; yield the former handlers.

    Outside of the main thread nothing changes.
    """
    before: dict[signal.Signals, Any] = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread, which handles the signals
        pass
    try:
        yield before
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def forwarding(pids: Callable[[], Iterable[int]]) -> Iterator[Forward]:
    """Forward signals that end a command to worker processes."""
    forward = Forward(pids)
    with handled(ending_signals(), forward) as before:
        try:
            yield forward
        finally:
            if forward.received is not None:
                record_signal(before.values(), forward.received)


def record_signal(handlers: Iterable[Any], number: int) -> None:
    """Record a signal in the handlers that were replaced while it arrived."""
    for handler in handlers:
        if isinstance(handler, Interrupt) and handler.received is None:
            handler.received = number


class Stoppable(Protocol):
    """A run that can be stopped, such as a Trainer."""

    def stop(self, by: str, reason: str, signal: signal.Signals | None = None) -> None: ...


@contextmanager
def stopping(trainers: Sequence[Stoppable]) -> Iterator[list[int]]:
    """Let runs finish their step and save on the first SIGINT, SIGTERM or SIGHUP.

    A second signal ends them immediately, except SIGHUP: shell and system may both send it for a
    closed terminal. SIGUSR1 and SIGUSR2, if they have a handler, stop the runs too; their handler
    is called after the block.

    Yields:
        The signals received so far.
    """
    got: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if number in ENDING and any(each in ENDING for each in got):
            if number == signal.SIGHUP:
                return
            raise ending_exception(number)
        got.append(number)
        name = signal.Signals(number).name
        for trainer in trainers:
            trainer.stop("signal", name, signal.Signals(number))

    time_limit = [number for number in TIME_LIMIT if callable(signal.getsignal(number))]
    with handled((*ending_signals(), *time_limit), stop) as before:
        for handler in before.values():
            if isinstance(handler, Interrupt) and handler.received:  # its exception was lost
                stop(handler.received, None)
                break
        yield got
        for number in got:
            if number in ENDING:
                record_signal(before.values(), number)
    for late in TIME_LIMIT:
        if late in got:
            before[late](late, None)


@contextmanager
def blocked() -> Iterator[None]:
    """Block the signals that end a command.

    A process that starts in the block inherits this until it calls `init_worker`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ending_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(parent: int) -> None:
    """Make this process a worker: it ends with its parent, and the current trial handles signals.

    Args:
        parent: the process id of the parent, which forwards signals.
    """
    os.setpgrp()  # without signals of the terminal, which would arrive twice
    end_with_parent(parent)
    interrupt = Interrupt(defers=True)
    for number in ending_signals():
        signal.signal(number, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


@dataclass(frozen=True)
class InitWorker:
    """Calls `init_worker`; joblib reuses worker processes with an equal initializer."""

    parent: int

    def __call__(self) -> None:
        init_worker(self.parent)


def end_with_parent(parent: int) -> None:
    """End this process when its parent process ends, or immediately if it has ended.

    Args:
        parent: the process id of the parent.
    """
    if sys.platform == "linux":
        import ctypes  # here, because most commands do not need it

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def watch(parent: int) -> None:
    """Wait until the parent process has ended, then end this process."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)
