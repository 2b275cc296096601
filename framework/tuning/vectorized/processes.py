"""Runs trials in processes forked from this one, which import, compose and load nothing again.

Many small models train faster in several processes than with several threads in one: most of the
time of a step is Python and single operations, which a process runs one at a time.
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
from framework.tuning.sweep.display import Display, ForwardingDisplay

Work = Callable[[ForwardingDisplay], Any]


def usable_processes() -> int:
    """Return the number of useful processes: one for each core, or one if a fork is not safe.

    The state of an accelerator does not survive a fork, and macOS starts its own threads.
    """
    if sys.platform != "linux" or torch.accelerator.is_available():
        return 1
    return len(os.sched_getaffinity(0))


def partition(sizes: Sequence[int], number: int) -> list[list[int]]:
    """Distribute items over at most `number` bins of about the same total size.

    Returns:
        The indices of the items in each bin.
    """
    bins: list[list[int]] = [[] for _ in range(min(number, len(sizes)))]
    totals = [0] * len(bins)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        smallest = totals.index(min(totals))
        bins[smallest].append(index)
        totals[smallest] += sizes[index]
    return bins


def run_in_processes(works: Sequence[Work], display: Display) -> list[Any]:
    """Run each piece of work in its own process; return the results, None for a process that died.

    Signals that end a command are forwarded to the processes, and they die with this process.

    Raises:
        BaseException: the first error of a process.
    """
    fork = multiprocessing.get_context("fork")
    results: list[Any] = [None] * len(works)
    indices: dict[Connection, int] = {}
    processes: list[BaseProcess] = []
    errors: list[BaseException] = []

    def pids() -> list[int]:
        return [process.pid for process in processes if process.pid and process.is_alive()]

    with forwarding(pids) as forward:  # workers finish their step and save, this process waits
        for index, work in enumerate(works):
            if forward.received is not None:
                break
            receiver, sender = fork.Pipe(duplex=False)
            process: BaseProcess = fork.Process(target=run_worker, args=(work, sender, os.getpid()))
            with blocked(), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                process.start()  # the warning is about threads; those of torch are not used
            processes.append(process)
            forward.send_pending()
            sender.close()
            indices[receiver] = index
        while indices:
            for receiver in cast(list[Connection], wait(indices)):
                try:
                    kind, argument = receiver.recv()
                except EOFError:
                    del indices[receiver]
                    continue
                if kind == "returned":
                    results[indices[receiver]] = argument
                elif kind == "raised":
                    errors.append(pickle.loads(argument))
                else:
                    getattr(display, kind)(argument)
        for process in processes:
            process.join()
    if errors:
        raise errors[0]
    return results


def run_worker(work: Work, pipe: Connection, parent: int) -> None:
    """Run a piece of work in a new process with one thread, and send its result or error."""
    init_worker(parent)
    torch.set_num_threads(1)
    display = ForwardingDisplay(pipe)
    try:
        display.send("returned", work(display))
    except BaseException as error:
        display.send("raised", pickle_error(error))


def pickle_error(error: BaseException) -> bytes:
    """Return a pickled error; one that cannot be pickled is replaced by its description."""
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:
        return pickle.dumps(RuntimeError(describe(error)))
    return content
