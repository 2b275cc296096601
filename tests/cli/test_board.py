"""TensorBoard on the runs, for this machine only, until a signal."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from torch.utils.tensorboard import SummaryWriter

from framework.cli.board import look_through, serve_board
from framework.errors import FrameworkError, RunError


def test_the_board_serves_the_runs_until_a_signal(tmp_path):
    with SummaryWriter(str(tmp_path / "runs" / "default" / "first")) as writer:
        writer.add_scalar("val/loss", 0.5, 1)
    for number in range(40):
        run = tmp_path / "runs" / "default" / str(number)
        run.mkdir()
        (run / "events.out.tfevents.1").touch()
    start = "from pathlib import Path; from framework.cli.board import serve_board"
    command = f"{start}; serve_board(Path({str(tmp_path / 'runs')!r}), 0)"
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith(f"TensorBoard shows {tmp_path / 'runs'} at http://127.0.0.1:")
        assert process.stdout.readline().startswith("select some of the 41 runs")
        address = line.split(" at ")[1].split()[0]
        with urllib.request.urlopen(f"{address}data/runs", timeout=20) as answer:
            assert isinstance(json.load(answer), list)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()


def make_fifo(run, outside):
    os.mkfifo(run / "events.out.tfevents.2")


def make_device(run, outside):
    (run / "events.out.tfevents.2").symlink_to("/dev/zero")


def make_file_link(run, outside):
    (run / "events.out.tfevents.2").symlink_to(next(outside.iterdir()))


def make_folder_link(run, outside):
    (run / "linked").symlink_to(outside)


def make_loop(run, outside):
    (run / "linked").symlink_to("/")


@pytest.mark.parametrize(
    "make", [make_fifo, make_device, make_file_link, make_folder_link, make_loop]
)
def test_links_and_special_files_are_found(tmp_path, make):
    run = tmp_path / "runs" / "default" / "first"
    outside = tmp_path / "outside"
    for folder, tag in ((run, "mine"), (outside, "secret")):
        with SummaryWriter(str(folder)) as writer:
            writer.add_scalar(tag, 0.5, 1)
    (run / "inner").symlink_to("../first")  # like `best` of a sweep, below the root
    assert look_through(tmp_path / "runs") == (1, [])
    make(run, outside)
    runs, odd = look_through(tmp_path / "runs")
    assert (runs, len(odd)) == (1, 1)


def test_links_and_special_files_are_not_served(tmp_path):
    run = tmp_path / "runs" / "default" / "first"
    outside = tmp_path / "outside"
    for folder, tag in ((run, "mine"), (outside, "secret")):
        with SummaryWriter(str(folder)) as writer:
            writer.add_scalar(tag, 0.5, 1)
    for make in (make_fifo, make_folder_link):
        make(run, outside)
    start = "from pathlib import Path; from framework.cli.board import serve_board"
    command = f"{start}; serve_board(Path({str(tmp_path / 'runs')!r}), 0)"
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address = process.stdout.readline().split(" at ")[1].split()[0]
        found = {}
        until = time.monotonic() + 60
        while not found and time.monotonic() < until:
            with urllib.request.urlopen(f"{address}data/plugin/scalars/tags", timeout=20) as answer:
                found = json.load(answer)
        assert {run: list(tags) for run, tags in found.items()} == {"default/first": ["mine"]}
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(RunError, match=r"--root .*no such folder"):
        serve_board(tmp_path / "runs", 0)


def test_an_invalid_or_used_port_is_an_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FrameworkError, match=f"--port {port}: Address already in use"):
            serve_board(tmp_path, port)
    with pytest.raises(FrameworkError, match="--port 70000: expected an integer"):
        serve_board(tmp_path, 70000)
