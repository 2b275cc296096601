"""The connection of the processes of a run."""

import os
import subprocess
import sys

import pytest
import torch

from distributed_runs import environment, free_port
from framework.runtime import processes

PROGRAM = """
from pathlib import Path
import torch
from framework.runtime import processes

def threads():
    names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)

processes.connect(torch.device("cpu"), 30.0)
import torch.distributed.nn.functional  # as an optimizer of torch does
before = threads()
processes.disconnect()
print(before, threads())
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
