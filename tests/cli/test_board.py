"""TensorBoard on the runs, for this machine only, until a signal."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from framework.cli.board import link_runs, look_through, selected_runs, serve_board
from framework.errors import FrameworkError, RunError, SettingError
from run_folders import write_run


@contextmanager
def serving(root, *selections):
    """Yield a process that serves the runs; a signal must end it."""
    start = "from pathlib import Path; from framework.cli.board import serve_board"
    command = f"{start}; serve_board(Path({str(root)!r}), 0, {list(selections)!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def served_tags(address, count):
    """Return the tags of each run, when TensorBoard has read so many runs or after a minute."""
    found = {}
    until = time.monotonic() + 60
    while len(found) < count and time.monotonic() < until:
        with urllib.request.urlopen(f"{address}data/plugin/scalars/tags", timeout=20) as answer:
            found = json.load(answer)
    return found


def test_the_board_serves_the_runs_until_a_signal(tmp_path):
    with SummaryWriter(str(tmp_path / "runs" / "default" / "first")) as writer:
        writer.add_scalar("speed/mfu", 0.5, 1)
        writer.add_scalar("val/loss", 0.5, 1)
        for record in hparams({"optimizer.lr": 0.1}, {})[1:]:
            writer.file_writer.add_summary(record)
    for number in range(40):
        run = tmp_path / "runs" / "default" / str(number)
        run.mkdir()
        (run / "events.out.tfevents.1").touch()
    with serving(tmp_path / "runs") as process:
        line = process.stdout.readline()
        assert line.startswith(f"TensorBoard shows {tmp_path / 'runs'} at http://127.0.0.1:")
        advice = process.stdout.readline()
        assert advice.startswith("select some of the 41 runs")
        assert "--runs best" in advice
        address = line.split(" at ")[1].split()[0]
        with urllib.request.urlopen(f"{address}data/runs", timeout=20) as answer:
            assert isinstance(json.load(answer), list)
        metrics = []
        until = time.monotonic() + 60
        while not metrics and time.monotonic() < until:
            page = f"{address}data/plugin/hparams/experiment?request=%7B%7D"
            with urllib.request.urlopen(page, timeout=20) as answer:
                metrics = json.load(answer).get("metricInfos", [])
        assert [each["name"]["tag"] for each in metrics] == ["val/loss", "speed/mfu"]


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
    with serving(tmp_path / "runs") as process:
        address = process.stdout.readline().split(" at ")[1].split()[0]
        found = served_tags(address, 1)
        assert {run: list(tags) for run, tags in found.items()} == {"default/first": ["mine"]}


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


@pytest.fixture
def root(tmp_path):
    """A folder of runs: a sweep over the learning rate, and another run."""
    for number, (lr, loss) in enumerate([("0.1", 0.5), ("0.01", 0.2), ("0.001", 0.3)]):
        write_run(
            tmp_path / "runs/default/sweep3" / f"00{number}_lr-{lr}_seed-2",
            [loss],
            lr=lr,
            optimizer="sgd",
        )
    write_run(tmp_path / "runs/other/first", [0.9], lr="0.5")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("selections", "chosen"),
    [
        (["other/first"], ["first"]),
        (["first"], ["first"]),
        (["default"], ["000", "001", "002"]),
        (["sweep3/*"], ["000", "001", "002"]),
        (["lr=*"], ["000", "001", "002"]),
        (["lr=0.01*"], ["001"]),
        (["lr=0.5"], ["first"]),
        (["optimizer=sg* and val/loss<0.25"], ["001"]),
        (["val/loss<0.25", "first"], ["001", "first"]),
        (["best"], ["001", "002", "000", "first"]),
        (["best", "sweep3"], ["001", "002", "000"]),
    ],
)
def test_runs_are_selected_by_name_pattern_filter_or_rank(root, selections, chosen):
    names = [name.split("/")[-1].partition("_")[0] for name in selected_runs(root, selections)]
    assert sorted(names) == sorted(chosen)
    if "best" in selections:
        assert names == chosen


def test_a_selection_without_runs_is_an_error(root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"--runs best: .*empty has no runs"):
        selected_runs(tmp_path / "empty", ["best"])
    with pytest.raises(RunError, match="--runs third: none of the 4 runs"):
        selected_runs(root, ["third"])
    with pytest.raises(SettingError, match=r"--runs 'loss=1'.*there is no column"):
        selected_runs(root, ["loss=1"])
    with pytest.raises(RunError, match="--runs lr=7: none"):
        selected_runs(root, ["best", "lr=7"])


def test_the_best_of_runs_that_cannot_be_compared_is_an_error(root):
    write_run(root / "other/second", [0.1], data="blobs")
    with pytest.raises(RunError, match=r"differ in data or task.*choose some with --runs 'data="):
        selected_runs(root, ["best"])
    assert selected_runs(root, ["best", "data=blobs"]) == ["other/second"]


def test_links_follow_the_selected_runs(root, tmp_path):
    folder = tmp_path / "links"
    folder.mkdir()

    def linked():
        return sorted(path.name for path in folder.rglob("*") if path.is_symlink())

    link_runs(root, folder, selected_runs(root, ["lr=0.0*"]))
    assert linked() == ["001_lr-0.01_seed-2", "002_lr-0.001_seed-2"]
    write_run(root / "default/sweep3/003_lr-0.02_seed-2", [0.1], lr="0.02")
    link_runs(root, folder, selected_runs(root, ["lr=0.01*", "lr=0.02*"]))
    assert linked() == ["001_lr-0.01_seed-2", "003_lr-0.02_seed-2"]
    assert (folder / "default/sweep3/003_lr-0.02_seed-2/config.yaml").is_file()


@pytest.mark.parametrize("odd", [False, True])
def test_the_board_shows_the_selected_runs(root, tmp_path, odd):
    for run in sorted(root.rglob("config.yaml")):
        with SummaryWriter(str(run.parent)) as writer:
            writer.add_scalar("val/loss", 0.5, 1)
    if odd:  # the slower loader
        make_fifo(root / "other/first", tmp_path)
    with serving(root, "lr=0.0*", "first") as process:
        line = process.stdout.readline()
        assert line.startswith(f"TensorBoard shows 3 of the runs in {root} at ")
        address = line.split(" at ")[1].split()[0]
        found = served_tags(address, 3)
        sweep = "default/sweep3"
        trials = [f"{sweep}/001_lr-0.01_seed-2", f"{sweep}/002_lr-0.001_seed-2"]
        assert sorted(found) == [*trials, "other/first"]
