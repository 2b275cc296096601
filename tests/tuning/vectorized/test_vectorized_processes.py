"""`hydra/launcher=vectorized` with several processes, and the death of one of them."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from framework.errors import FrameworkError
from framework.tuning.sweep.display import LineDisplay
from framework.tuning.vectorized.processes import partition, run_in_processes, usable_processes
from framework.tuning.vectorized.stacked_update import StackedState
from sweeps import rows, trials
from waiting import wait_for

SMALL = (
    "data=blobs model.width=8 model.depth=1 callbacks=[checkpoint,non_finite] loggers=[json_lines]"
)
TWO = "hydra/launcher=vectorized hydra.launcher.processes=2"
pytestmark = pytest.mark.skipif(
    usable_processes() < 2, reason="needs Linux with two cores and no accelerator"
)


def states(name):
    return [row["state"] for row in trials(name)]


def losses(name):
    return {row["number"]: row["metrics"]["test/loss"] for row in trials(name)}


def test_two_processes_give_the_results_of_one(command):
    line = f"train {SMALL} trainer.max_epochs=3 -m optimizer.lr=1e-3,1e-2 'seed=range(8)'"
    one = "hydra/launcher=vectorized hydra.launcher.processes=1"
    assert command(f"{line} sweep.name=one {one}")[0] == 0
    status, out, err = command(f"{line} sweep.name=two {TWO}")
    assert status == 0, err
    assert states("two") == ["done"] * 16
    assert losses("two") == pytest.approx(losses("one"), rel=1e-4)
    assert len(rows("two")) == 32  # each trial started once
    ended = [line for line in out.splitlines() if line.startswith("0") and " s" in line]
    assert len(ended) >= 16, "this process prints a line for each trial"
    assert "16: done" in out


def test_small_groups_are_not_split_between_processes(command, monkeypatch):
    partitioned = []

    def recording(sizes, number):
        partitioned.append(sizes)
        return partition(sizes, number)

    monkeypatch.setattr("framework.tuning.vectorized.launcher.partition", recording)
    swept = "-m model.width=4,8 'seed=range(8)' sweep.name=s"
    assert command(f"train {SMALL} trainer.max_epochs=1 {swept} {TWO}")[0] == 0
    assert partitioned == [[8, 8]]
    assert states("s") == ["done"] * 16


def test_bins_have_about_the_same_size():
    assert partition([8, 8, 16, 1], 2) == [[2, 3], [0, 1]]
    assert partition([3], 4) == [[0]]


def test_the_trials_of_a_killed_process_go_on_in_this_one(command, monkeypatch):
    differentiate = StackedState.differentiate
    parent = os.getpid()

    def killed(self, losses, add=False):
        if os.getpid() != parent and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        differentiate(self, losses, add)

    monkeypatch.setattr(StackedState, "differentiate", killed)
    line = f"train {SMALL} trainer.max_epochs=2 -m 'seed=range(16)' sweep.name=s {TWO}"
    status, out, err = command(line)
    assert status == 0, err
    assert "a worker process died" in out + err
    assert states("s") == ["done"] * 16


def test_the_error_of_a_process_is_raised_in_this_one():
    def fails(display):
        raise FrameworkError("it cannot")

    with pytest.raises(FrameworkError, match="it cannot"):
        run_in_processes([fails, lambda display: 1], LineDisplay({}))


def test_an_error_that_cannot_be_pickled_is_replaced_by_its_text():
    class Local(Exception):
        pass

    def fails(display):
        raise Local("the text")

    with pytest.raises(RuntimeError, match="Local: the text"):
        run_in_processes([fails], LineDisplay({}))


LONG = f"train {SMALL} trainer.max_epochs=12 callbacks.checkpoint.every=5steps"
LONG += f" -m 'seed=range(16)' sweep.name=s {TWO}"


def start_sweep():
    """Start a sweep in another process, and wait for its checkpoints."""
    command = [sys.executable, "-m", "framework", *shlex.split(LONG)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: len(list(Path("runs/default/s").glob("0*/checkpoints/step-*"))) >= 16)
    return process


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_ctrl_c_saves_all_trials_and_the_sweep_can_be_resumed(command):
    process = start_sweep()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT, process.stdout.read()
    assert states("s") == ["stopped"] * 16
    before = max(row["steps"] for row in rows("s"))
    assert command(f"{LONG} resume=auto")[0] == 0
    assert states("s") == ["done"] * 16
    assert before < min(row["steps"] for row in rows("s") if row["state"] == "done")


def test_processes_end_when_the_process_of_the_sweep_is_killed(command):
    process = start_sweep()
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_running, workers)), 10)
    assert states("s") == ["running"] * 16


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
