"""Run a function in several processes that are connected by gloo."""

import os
import socket
import traceback
from pathlib import Path

import torch
from torch import multiprocessing


def free_port():
    """Return a port that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_in_processes(function, count, folder, *args):
    """Return the results of function(*args) in each of several processes, by rank.

    Args:
        function: of a module; it finds the variables that torchrun would set.
        count: the number of processes.
        folder: a temporary folder for the results, which need not be on this machine's pipes.
        args: of the function.

    Raises:
        AssertionError: it failed in a process; with the traceback.
    """
    port = free_port()
    context = multiprocessing.get_context("spawn")
    target = context.Process
    processes = [
        target(target=run_one, args=(rank, count, port, folder, function, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    errors = [file.read_text() for file in sorted(Path(folder).glob("error*"))]
    assert not errors, "\n".join(errors)
    assert all(process.exitcode == 0 for process in processes), "a process was killed"
    return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(count)]


def run_one(rank, count, port, folder, function, args):
    """Run the function in one process, and save its result or its error."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that is not spawned
    try:
        result = function(*args)
        torch.save(result, Path(folder) / f"result{rank}")
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(f"process {rank}\n{traceback.format_exc()}")
        raise
