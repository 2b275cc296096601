"""Shares trials out to processes forked from this one, where nothing is imported, composed or read again.

Many small models train faster so than with as many threads in one process: nearly all that a step of theirs takes is
Python and single operations, of which a process does one at a time.
"""

import multiprocessing
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch

from framework.errors.user_code import describe
from framework.system.signals import blocked, forwarding, init_worker

from ..sweep.display import Elsewhere, Shown

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

    Signals that end a command are passed on to them, and they die with this process. Raises what one of them raised.
    """
    fork = multiprocessing.get_context("fork")
    found: list[Any] = [None] * len(works)
    numbers, processes, raised = dict[Connection, int](), list[BaseProcess](), list[BaseException]()

    def pids() -> list[int]:
        return [
            process.pid for process in processes if process.pid is not None and process.is_alive()
        ]

    with forwarding(
        pids
    ) as forward:  # their trials finish their step and save; this process waits for them
        for number, work in enumerate(works):
            if forward.received is not None:
                break
            mine, its = fork.Pipe(duplex=False)
            worker = fork.Process(target=do, args=(work, its, os.getpid()))
            with blocked(), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                worker.start()  # the warning is of threads; torch's are not used
            processes.append(worker)
            forward.send_pending()
            its.close()
            numbers[mine] = number
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


def do(work: Work, pipe: Connection, parent: int) -> None:
    """Do a piece of work in a new process, with one thread, and send what comes of it."""
    init_worker(parent)
    torch.set_num_threads(1)
    there = Elsewhere(pipe)
    try:
        there.send("returned", work(there))
    except BaseException as error:
        there.send("raised", pickled(error))


def pickled(error: BaseException) -> bytes:
    """Return an error as bytes; one that would not come back from them, as its text."""
    try:
        whole = pickle.dumps(error)
        pickle.loads(whole)
    except Exception:
        return pickle.dumps(RuntimeError(describe(error)))
    return whole
