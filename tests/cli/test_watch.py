"""The live view of runs: in a terminal, and as a snapshot without one."""

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from framework.cli.live_view import View, chart
from framework.contracts.history import Curve
from framework.errors import RunError
from framework.runs.overview.watched import Watched, current_runs
from framework.runtime.display.console import PrintableConsole


def make_run(folder, state="done", step=80, values=20, **status):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    content = {"status": state, "reason": None, "step": step, "total_steps": 100, **status}
    (folder / "status.json").write_text(json.dumps(content))
    lines = []
    for number in range(1, values + 1):
        row = {"step": number * step // values, "epoch": 1, "wall_seconds": number}
        row |= {"train/loss": 1 / number, "val/loss": 2 / number, "val/accuracy": 0.5}
        lines.append(json.dumps(row | {"train/learning_rate": 0.1, "train/norm": number}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def root(tmp_path):
    make_run(tmp_path / "runs/default/first")
    make_run(tmp_path / "runs/default/second", "failed", reason="ValueError: no \x1b[31m")
    make_run(tmp_path / "runs/default/third", "running", values=0)
    return tmp_path / "runs"


def view_of(*paths, root=Path("runs")):
    watched = Watched(paths, root)
    watched.refresh()
    return View(watched, PrintableConsole())


def texts(view, width, height):
    return [line.plain for line in view.lines(width, height)]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 45), (40, 10), (20, 4), (300, 90)])
def test_the_view_fits_the_terminal(width, height, root):
    view = view_of(*(root / "default" / name for name in ("first", "second", "third")))
    for _ in range(3):
        lines = texts(view, width, height)
        assert len(lines) <= height
        assert all(len(line) <= width for line in lines)
        view.press("down")


def test_the_view_of_several_runs(root):
    view = view_of(*(root / "default" / name for name in ("first", "second", "third")))
    lines = texts(view, 100, 40)
    assert lines[0].startswith("framework watch  1 done  1 failed  1 stale")
    assert any("first" in line and "80%" in line and "0.1" in line for line in lines)
    assert any(line.startswith("val/loss 0.1") and "train/loss" in line for line in lines)
    view.press("down")
    assert any("ValueError: no" in line for line in texts(view, 100, 40))
    assert not any("\x1b" in line for line in texts(view, 100, 40))
    view.press("down")
    assert any("ended without a result" in line for line in texts(view, 100, 40))
    assert view.press("x")
    assert not view.press("q")


def test_pages_of_curves(root):
    view = view_of(root / "default/first")
    first = "\n".join(texts(view, 80, 24))
    view.press("right")
    second = "\n".join(texts(view, 80, 24))
    assert "val/loss 0.1" in first
    assert "val/loss 0.1\n" not in second
    assert "train/norm 20" in second
    for _ in range(2):
        view.press("right")
    view.press("left")
    view.press("left")
    assert texts(view, 80, 24)[1:] == second.split("\n")[1:]


def test_a_sweep_is_a_table_of_its_trials(tmp_path, monkeypatch):
    sweep = tmp_path / "runs/default/sweep"
    for number in range(30):
        make_run(sweep / f"{number:03}_seed-{number}", values=2)
    (sweep / "sweep.json").write_text("{}")
    (sweep / "best").mkdir()
    (sweep / "best/config.yaml").symlink_to("../000_seed-0/config.yaml")
    view = view_of(sweep)
    lines = texts(view, 100, 30)
    assert "30 done" in lines[0]
    monkeypatch.chdir(tmp_path)
    assert len(Watched([Path("default/sweep")], Path("runs")).runs) == 30
    assert "run (30)" in lines[1]
    assert "000_seed-0" in lines[2]
    view.press("up")
    assert any(line.startswith("▸ 029_seed-29") for line in texts(view, 100, 30))
    make_run(sweep / "030_seed-30", values=2)  # it begins while the sweep is watched
    view.watched.searched = 0.0
    view.watched.refresh()
    assert len(view.watched.runs) == 31


def test_by_default_the_latest_run_is_shown(root):
    os.utime(root / "default/first/status.json", (0, 0))
    os.utime(root / "default/third/status.json", (0, 0))
    assert current_runs(root) == [root / "default/second"]
    with (root / "default/first/.lock").open("w") as file:
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        status = root / "default/first/status.json"
        status.write_text(status.read_text().replace('"done"', '"running"'))
        assert current_runs(root) == [root / "default/first"]


def test_what_is_no_run_is_refused(root, tmp_path):
    with pytest.raises(RunError, match="there is no run folder"):
        Watched([root / "default/fourth"], root)
    with pytest.raises(RunError, match="is not the folder of a run"):
        Watched([root], root)
    with pytest.raises(RunError, match="there is no run in"):
        Watched([], tmp_path / "none")


def test_without_a_terminal_a_run_is_a_line(root, command):
    code, out, _ = command("watch runs/default/first runs/default/second runs/default/third")
    first, second, third = out.splitlines()
    assert code == 0
    assert first.split("  ") == [
        "runs/default/first",
        "done",
        "step 80 of 100 (80%)",
        "val/loss 0.1",
        "train/loss 0.05",
        "val/accuracy 0.5",
    ]
    assert second.endswith("  ValueError: no \\x1b[31m")
    assert third.startswith("runs/default/third  stale  step 80 of 100 (80%)  its process ended")
    code, _, err = command("watch runs/default/fourth")
    assert (code, len(err.splitlines())) == (2, 1)


def test_a_curve_from_large_to_small_values_is_logarithmic():
    curve = Curve()
    for step in range(1, 41):
        curve.add(step, 10.0 ** -(step / 10))
    lines = chart("val/loss", curve, 30, 10, 40)
    assert len(lines) == 10
    assert "log scale" in lines[0].plain
    drawn = [line.plain[10:] for line in lines[1:8]]
    assert all(line.strip("⠀") for line in drawn)  # a straight line through all rows
    assert "log scale" not in chart("train/learning_rate", curve, 30, 10, 40)[0].plain


def test_a_constant_and_an_infinite_curve():
    curve = Curve()
    for step in (1, 2):
        curve.add(step, 3.0)
    assert [line.plain[:10].strip() for line in chart("a/b", curve, 30, 6, 2)[1:4]] == [
        "6",
        "",
        "0",
    ]
    curve = Curve()
    curve.add(1, float("nan"))
    assert chart("a/b", curve, 30, 6, 1)[0].plain == "a/b nan"


def test_a_curve_of_the_largest_values_is_drawn():
    curve = Curve()
    curve.add(1, -1e308)
    curve.add(2, 1e308)
    bottom, top = (line.plain[10:].strip("⠀") for line in chart("a/b", curve, 14, 5, 2)[2:0:-1])
    assert bottom
    assert top


def start_in_terminal(folder, *arguments):
    """Start a command in a terminal of 80 x 24; return its process and the other end."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "framework", *arguments],
        cwd=folder,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=os.environ | {"TERM": "xterm"},
        start_new_session=True,
    )
    os.close(slave)
    return process, master


def read_until(master, text, seconds=40.0):
    seen = b""
    deadline = time.monotonic() + seconds
    while text not in seen and time.monotonic() < deadline:
        try:
            seen += os.read(master, 2**16)
        except OSError:  # the process has ended
            break
    return seen


@pytest.mark.parametrize("ends", ["q", "signal"])
def test_in_a_terminal_it_runs_until_q_or_a_signal(ends, root):
    process, master = start_in_terminal(root.parent, "watch", "runs/default/first")
    try:
        assert b"quit" in read_until(master, b"quit")
        if ends == "q":
            os.write(master, b"\t")
            os.write(master, b"q")
        else:
            process.send_signal(signal.SIGINT)
        rest = read_until(master, b"\x1b[?1049l")
        assert process.wait(30) == (0 if ends == "q" else 130)
        assert b"\x1b[?1049l" in rest  # the screen is as before
        assert b"Traceback" not in rest
        assert termios.tcgetattr(master)[3] & termios.ECHO
    finally:
        process.kill()
        process.wait()
        os.close(master)
