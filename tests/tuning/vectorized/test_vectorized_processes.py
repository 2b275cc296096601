"""`hydra/launcher=vectorized` on several cores: each process trains a share of the trials; nothing is lost with one."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from framework.errors import FrameworkError
from framework.tuning.sweep.display import Lines
from framework.tuning.vectorized.processes import bins, most_processes, shared_out
from framework.tuning.vectorized.stacked_update import Rows
from sweeps import rows, trials
from waiting import wait_for

SMALL = (
    "data=blobs model.width=8 model.depth=1 callbacks=[checkpoint,non_finite] loggers=[json_lines]"
)
TWO = "hydra/launcher=vectorized hydra.launcher.processes=2"
pytestmark = pytest.mark.skipif(
    most_processes() < 2, reason="a fork is not safe here, or there is one core"
)


def states(name):
    return [row["state"] for row in trials(name)]


def came_to(name):
    return {
        row["number"]: row["metrics"]["test/loss"] for row in rows(name) if row["state"] == "done"
    }


def test_two_processes_come_to_what_one_comes_to(command):
    line = f"train {SMALL} trainer.max_epochs=3 -m optimizer.lr=1e-3,1e-2 'seed=range(8)'"
    assert (
        command(f"{line} sweep.name=one hydra/launcher=vectorized hydra.launcher.processes=1")[0]
        == 0
    )
    status, out, err = command(f"{line} sweep.name=two {TWO}")
    assert status == 0, err
    assert states("two") == ["done"] * 16
    assert came_to("two") == pytest.approx(came_to("one"), rel=1e-4)
    assert len(rows("two")) == 32  # each began once
    assert (
        sum(line.startswith("0") and " s" in line for line in out.splitlines()) >= 16
    )  # told by this process
    assert "16: done" in out


def test_groups_are_shared_out_whole_where_they_are_small(command, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        "framework.tuning.vectorized.launcher.bins",
        lambda *given: sizes.append(given[0]) or bins(*given),
    )
    line = (
        f"train {SMALL} trainer.max_epochs=1 -m model.width=4,8 'seed=range(8)' sweep.name=s {TWO}"
    )
    assert command(line)[0] == 0
    assert sizes == [[8, 8]]
    assert states("s") == ["done"] * 16


def test_bins_are_of_about_one_size():
    assert bins([8, 8, 16, 1], 2) == [[2, 3], [0, 1]]
    assert bins([3], 4) == [[0]]


def test_the_trials_of_a_process_that_died_go_on_in_this_one(command, monkeypatch):
    differentiate, here = Rows.differentiate, os.getpid()

    def killed(self, losses, add=False):
        if os.getpid() != here and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        differentiate(self, losses, add)

    monkeypatch.setattr(Rows, "differentiate", killed)
    status, out, err = command(
        f"train {SMALL} trainer.max_epochs=2 -m 'seed=range(16)' sweep.name=s {TWO}"
    )
    assert status == 0, err
    assert "a process died: its trials go on in this one" in out + err
    assert states("s") == ["done"] * 16


def test_what_a_process_raises_is_raised_here():
    def fails(shown):
        raise FrameworkError("it cannot")

    with pytest.raises(FrameworkError, match="it cannot"):
        shared_out([fails, lambda shown: 1], Lines({}))


def test_an_error_that_cannot_be_sent_is_told_by_its_text():
    class Local(Exception):
        pass

    def fails(shown):
        raise Local("the text")

    with pytest.raises(RuntimeError, match="Local: the text"):
        shared_out([fails], Lines({}))


LONG = f"train {SMALL} trainer.max_epochs=12 callbacks.checkpoint.every=5steps -m 'seed=range(16)' sweep.name=s {TWO}"


def started():
    """A sweep in a process of its own, once checkpoints are there."""
    command = [sys.executable, "-m", "framework", *shlex.split(LONG)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: len(list(Path("runs/default/s").glob("0*/checkpoints/step-*"))) >= 16)
    return process


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_ctrl_c_saves_all_trials_and_the_sweep_goes_on(command):
    process = started()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT, process.stdout.read()
    assert states("s") == ["stopped"] * 16
    before = max(row["steps"] for row in rows("s"))
    assert command(f"{LONG} resume=auto")[0] == 0
    assert states("s") == ["done"] * 16
    assert before < min(row["steps"] for row in rows("s") if row["state"] == "done")


def test_processes_end_with_the_one_that_was_killed(command):
    process = started()
    theirs = children(process.pid)
    assert len(theirs) == 2
    process.kill()
    process.wait()
    wait_for(
        lambda: not any(Path(f"/proc/{pid}").exists() and "Z" not in stat(pid) for pid in theirs),
        10,
    )
    assert states("s") == ["running"] * 16


def stat(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
