"""Shares trials out to processes forked from this one, where nothing is imported, composed or read again.

Many small models train faster so than with as many threads in one process: nearly all that a step of theirs takes is
Python and single operations, of which a process does one at a time.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from typing import Any, cast

import torch

from ..signals import ENDING, handled
from ..user_code import describe
from .live import Elsewhere, Shown

Work = Callable[[Elsewhere], Any]


def most_processes() -> int:
    """Return how many processes this machine has use for: one for each core, or this one alone where a fork is not
    safe (an accelerator's state does not survive it; macOS starts threads of its own)."""
    forks = sys.platform == "linux" and not torch.accelerator.is_available()
    return len(os.sched_getaffinity(0)) if forks else 1


def bins(sizes: Sequence[int], number: int) -> list[list[int]]:
    """Return the places of pieces of work in so many bins or fewer, of about the same size each."""
    filled: list[list[int]] = [[] for _ in range(min(number, len(sizes)))]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        min(filled, key=lambda each: sum(sizes[other] for other in each)).append(place)
    return filled


def shared_out(works: Sequence[Work], shown: Shown) -> list[Any]:
    """Do each piece of work in a process of its own; returns what they return, None for one whose process died.

    SIGINT and SIGTERM are passed on to them, and they die with this process. Raises what one of them raised.
    """
    fork = multiprocessing.get_context("fork")
    found: list[Any] = [None] * len(works)
    numbers, processes, raised = dict[Connection, int](), list[BaseProcess](), list[BaseException]()
    for number, work in enumerate(works):
        mine, its = fork.Pipe(duplex=False)
        processes.append(fork.Process(target=do, args=(work, its)))
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of threads; torch's are not used
            processes[-1].start()
        its.close()
        numbers[mine] = number
    with passing_on(processes):
        while numbers:
            for pipe in cast(list[Connection], wait(numbers)):
                try:
                    kind, what = pipe.recv()
                except EOFError:
                    del numbers[pipe]
                    continue
                if kind == "returned":
                    found[numbers[pipe]] = what
                elif kind == "raised":
                    raised.append(pickle.loads(what))
                else:
                    getattr(shown, kind)(what)
        for process in processes:
            process.join()
    if raised:
        raise raised[0]
    return found


def do(work: Work, pipe: Connection) -> None:
    """Do a piece of work in a new process, with one thread, and send what comes of it."""
    os.setpgrp()  # or Ctrl-C would reach it twice, which means at once
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    there = Elsewhere(pipe)
    try:
        there.send("returned", work(there))
    except BaseException as error:
        there.send("raised", pickled(error))


def end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def pickled(error: BaseException) -> bytes:
    """Return an error as bytes; one that would not come back from them, as its text."""
    try:
        whole = pickle.dumps(error)
        pickle.loads(whole)
    except Exception:
        return pickle.dumps(RuntimeError(describe(error)))
    return whole


def passing_on(processes: Sequence[BaseProcess]) -> AbstractContextManager[Any]:
    """Pass SIGINT and SIGTERM on to processes, whose trials finish their step and save; this one waits for them."""

    def pass_on(number: int, frame: Any) -> None:
        for process in processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    return handled(ENDING, pass_on)
