"""TensorBoard on the runs: on this machine alone, on a free port, until a signal."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest
from torch.utils.tensorboard import SummaryWriter

from framework.board import serve
from framework.errors import FrameworkError, RunError


def test_it_serves_the_runs_and_ends_with_a_signal(tmp_path):
    with SummaryWriter(str(tmp_path / "runs" / "default" / "first")) as writer:
        writer.add_scalar("val/loss", 0.5, 1)
    for number in range(40):
        run = tmp_path / "runs" / "default" / str(number)
        run.mkdir()
        (run / "events.out.tfevents.1").touch()
    command = f"from pathlib import Path; from framework.board import serve; serve(Path({str(tmp_path / 'runs')!r}), 0)"
    process = subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        line = process.stdout.readline()
        assert line.startswith(f"TensorBoard shows {tmp_path / 'runs'} at http://127.0.0.1:")
        assert process.stdout.readline().startswith("tick some of the 41 runs to see curves")
        address = line.split(" at ")[1].split()[0]
        with urllib.request.urlopen(f"{address}data/runs", timeout=20) as answer:
            assert isinstance(json.load(answer), list)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()


def test_no_runs(tmp_path):
    with pytest.raises(RunError, match=r"there is no folder of runs .*: train something first, or name it with --root"):
        serve(tmp_path / "runs", 0)


def test_a_port_that_cannot_be(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FrameworkError, match=f"--port {port}: Address already in use; another one, or 0"):
            serve(tmp_path, port)
    with pytest.raises(FrameworkError, match="--port should be 0 to 65535, not 70000"):
        serve(tmp_path, 70000)
