"""Run a function, or the command line, in several processes on this machine."""

import multiprocessing
import os
import socket
import subprocess
import sys
import traceback

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


def work(function, arguments, variables, results):
    """Call a function in a new process, and send its result or the traceback of its error."""
    os.environ.update(variables)
    try:
        results.send((function(*arguments), None))
    except BaseException:
        results.send((None, traceback.format_exc()))
        raise SystemExit(1) from None


def run_function(function, *arguments, processes=2):
    """Call a function of a module in several processes; return the results by rank.

    Fails with the traceback if one of them raises an error or does not end.
    """
    spawn = multiprocessing.get_context("spawn")
    port = free_port()
    started = []
    for rank in range(processes):
        receiver, sender = spawn.Pipe(duplex=False)
        variables = environment(rank, processes, port)
        child = spawn.Process(target=work, args=(function, arguments, variables, sender))
        child.start()
        sender.close()
        started.append((child, receiver))
    results = []
    try:
        for rank, (_, receiver) in enumerate(started):
            assert receiver.poll(SECONDS), f"process {rank} does not end"
            value, error = receiver.recv()
            assert error is None, f"process {rank}: {error}"
            results.append(value)
    finally:
        for child, _ in started:
            child.join(5)
            child.kill()
            child.join()
    return results


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
