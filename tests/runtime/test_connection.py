"""The connection of the processes of a run."""

import os
import subprocess
import sys

import pytest
import torch

from distributed_runs import environment, free_port
from framework.runtime import processes

PROGRAM = """
import time
from contextlib import suppress
from pathlib import Path
import torch
from framework.runtime import processes

def threads():
    found = 0
    for file in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # a thread that has ended meanwhile
            found += "gloo" in file.read_text()
    return found

def wait(are_there):  # threads set their names and end a moment later
    end = time.monotonic() + 20
    while (threads() > 0) != are_there and time.monotonic() < end:
        time.sleep(0.01)
    return threads()

processes.connect(torch.device("cpu"), 30.0)
import torch.distributed.nn.functional  # as an optimizer of torch does
before = wait(True)
processes.disconnect()
print(before, wait(False))
"""


def test_no_thread_of_the_connection_is_left():
    """One that is still busy when the interpreter ends could abort the process."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | environment(0, 1, free_port()),
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    before, after = map(int, ended.stdout.split())
    assert before > 0
    assert after == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistNetworkError("reset"),
        RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error"),
    ],
)
def test_a_broken_connection_inside_of_other_operations_is_a_lost_process(error, monkeypatch):
    monkeypatch.setattr(processes, "failure_store", lambda: None)
    with pytest.raises(processes.LostProcess), processes.broken_connections():
        raise error


def test_another_error_of_these_operations_stays_as_it_is():
    with pytest.raises(RuntimeError, match="shapes"), processes.broken_connections():
        raise RuntimeError("shapes cannot be multiplied")
