"""Run a function, or the command line, in several processes on this machine."""

import os
import socket
import subprocess
import sys
import traceback
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing

SECONDS = 120.0


def free_port():
    """Return a port that no process listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(rank, processes, port):
    """Return the environment variables of a process, as torchrun sets them."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


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
    start_server()
    context = multiprocessing.get_context("forkserver")
    processes = []
    for rank in range(count):
        variables = os.environ | environment(rank, count, port)
        arguments = (variables, rank, folder, function, args)
        process = context.Process(target=run_one, args=arguments)
        process.start()
        processes.append(process)
    for process in processes:
        process.join()
    errors = [file.read_text() for file in sorted(Path(folder).glob("error*"))]
    assert not errors, "\n".join(errors)
    assert all(process.exitcode == 0 for process in processes), "a process was killed"
    return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(count)]


def start_server():
    """Start the server of this process, unless it runs; the functions run in its forks.

    The server has imported the framework, which would take each of the processes 3 s.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.set_forkserver_preload(["preloaded"])
        forkserver.ensure_running()


def run_one(variables, rank, folder, function, args):
    """Run the function in one process, and save its result or its error."""
    os.environ.clear()
    os.environ.update(variables)
    np.random.seed()  # all forks have the state of the server
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as without a server
    try:
        result = function(*args)
        torch.save(result, Path(folder) / f"result{rank}")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error{rank}").write_text(f"process {rank}\n{traceback.format_exc()}")
        raise


def run_command(*arguments, folder, seconds=SECONDS):
    """Run the command line in a folder; return the finished process with its output as text."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    return subprocess.run(
        [sys.executable, "-m", "framework", *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def run_commands(*arguments, folder, processes=2, port=None):
    """Run the command line in several processes without a launcher; return them by rank."""
    port = port or free_port()
    started = []
    for rank in range(processes):
        child = subprocess.Popen(
            [sys.executable, "-m", "framework", *arguments],
            cwd=folder,
            env=os.environ | environment(rank, processes, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
    ended = []
    for child in started:
        try:
            out, err = child.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
        ended.append(subprocess.CompletedProcess(child.args, child.returncode, out, err))
    return ended
