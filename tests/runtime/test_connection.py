"""The connection of the processes of a run."""

import os
import subprocess
import sys

from distributed_runs import environment, free_port

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
