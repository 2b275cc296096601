"""`hydra/launcher=vectorized`: a sweep with stacked trials leaves the files of single trials."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from framework.composition.compose import Job
from framework.tuning.vectorized.launcher import find_groups, group_key
from framework.tuning.vectorized.stacked_update import StackedState
from runs import logged
from sweeps import rows, trials

SMALL = "data=blobs model.width=8 model.depth=1 trainer.max_epochs=3 seed=1"
SMALL += " callbacks=[checkpoint,non_finite]"
TRAIN = f"train {SMALL} 'loggers=[json_lines]'"
VECTORIZED = "sweep.name=s hydra/launcher=vectorized"


def run_of(row, name="s"):
    return Path("runs/default") / name / row["folder"]


def files(run):
    """Return the names of all files of a run except its output."""
    names = [path.name for path in run.rglob("*") if path.is_file()]
    return sorted(name.partition(".tfevents")[0] for name in names if name != "output.txt")


def test_stacked_trials_leave_the_runs_of_single_trials(command):
    line = f"train {SMALL} 'loggers=[tensorboard,json_lines]' -m optimizer.lr=1e-3,1e-2,5e-2"
    line += " model.dropout=0.0"
    assert command(f"{line} sweep.name=stacked hydra/launcher=vectorized")[0] == 0
    assert command(f"{line} sweep.name=single")[0] == 0
    stacked = trials("stacked")
    single = trials("single")
    assert len(stacked) == len(single) == 3
    for row, expected in zip(stacked, single, strict=True):
        assert row["state"] == "done"
        assert row["folder"] == expected["folder"]
        assert row["settings"] == expected["settings"]
        assert row["metrics"].keys() == expected["metrics"].keys()
        run = run_of(row, "stacked")
        single_run = run_of(expected, "single")
        assert files(run) == files(single_run)
        assert len(logged(run)) > 3
        for values, single_values in zip(logged(run), logged(single_run), strict=True):
            # float32, summed in another order
            assert values == pytest.approx(single_values, rel=2e-3, abs=1e-4)
    status, out, _ = command(f"eval {run_of(stacked[0], 'stacked')} --json")
    assert status == 0
    loss = stacked[0]["metrics"]["test/loss"]
    assert json.loads(out)["metrics"]["test/loss"] == pytest.approx(loss, rel=1e-5)


def test_a_stacked_trial_resumes_alone(command):
    assert command(f"{TRAIN} -m optimizer.lr=1e-3,1e-2 {VECTORIZED}")[0] == 0
    run = run_of(trials()[1])
    status, _, err = command(f"resume {run} trainer.max_epochs=5 --inexact")
    assert status == 0, err
    assert logged(run)[-2]["epoch"] == 5


def test_a_trial_that_diverges_fails_and_the_others_are_done(command):
    line = f"{TRAIN} optimizer=sgd -m optimizer.lr=0.01,1e38,0.1 {VECTORIZED}"
    assert command(line)[0] != 0
    assert [row["state"] for row in trials()] == ["done", "failed", "done"]
    assert "non_finite" in trials()[1]["error"]
    status = json.loads((run_of(trials()[1]) / "status.json").read_text())
    assert trials()[1]["seconds"] < status["wall_seconds"] / 2, "its share of the common time"
    assert command(f"{line} resume=auto")[0] != 0
    started = [row["number"] for row in rows() if row["state"] == "running"]
    assert sorted(started) == [0, 1, 1, 2], "only the failed one runs again"


@pytest.fixture
def steps(monkeypatch):
    """Record the number of trials of each step; `steps.before` is called in each of them."""
    differentiate = StackedState.differentiate
    steps = SimpleNamespace(sizes=[], before=lambda state: None)

    def recording(self, losses, add=False):
        steps.sizes.append(len(losses))
        steps.before(self)
        differentiate(self, losses, add)

    monkeypatch.setattr(StackedState, "differentiate", recording)
    return steps


def test_trials_go_on_one_by_one_when_memory_is_full(command, steps):
    def fill_memory(state):
        if len(steps.sizes) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    steps.before = fill_memory
    status, out, err = command(f"{TRAIN} -m optimizer.lr=1e-3,1e-2 {VECTORIZED}")
    assert (status, steps.sizes) == (0, [2] * 5), err
    assert "2 trials continue one by one: memory is full" in out + err
    assert [row["state"] for row in trials()] == ["done", "done"]
    assert logged(run_of(trials()[0]))[-1]["epoch"] == 3


GROWS = """\
import torch
from torch import nn
from framework import Shape, models

@models.register("grows")
class Grows(nn.Module):
    def __init__(self, in_shape: Shape, out_shape: Shape):
        super().__init__()
        self.last = nn.Linear(in_shape[0], out_shape[0])
        self.register_buffer("places", torch.zeros(32, 1), persistent=False)

    def forward(self, inputs):
        if len(inputs) > len(self.places):
            self.places = torch.zeros(len(inputs), 1)
        return self.last(inputs) + self.places[:len(inputs)]
"""


def test_trials_go_on_one_by_one_when_they_turn_out_not_to_be_stackable(command, tmp_path):
    (tmp_path / "grows.py").write_text(GROWS)
    line = "train --plugins grows.py data=digits model=grows trainer.max_epochs=2"
    line += " loggers=[json_lines] -m optimizer.lr=1e-3,1e-2"
    status, out, err = command(f"{line} {VECTORIZED}")
    assert status == 0, err
    assert "2 trials continue one by one: the model replaces a buffer" in out + err
    for row in trials():
        assert row["state"] == "done"
        assert logged(run_of(row))[-1]["epoch"] == 2


def test_a_resumed_sweep_goes_on_from_the_checkpoints_of_its_trials(command, steps):
    def interrupt(state):
        if len(steps.sizes) == 50:
            raise KeyboardInterrupt

    steps.before = interrupt
    line = f"{TRAIN} callbacks.checkpoint.background=false -m optimizer.lr=1e-3,1e-2,1e-1"
    line += " hydra/launcher=vectorized"
    assert command(f"{line} sweep.name=s")[0] != 0
    assert command(f"{line} sweep.name=s resume=auto")[0] == 0
    assert [row["state"] for row in trials()] == ["done"] * 3
    assert command(f"{line} sweep.name=uninterrupted")[0] == 0
    expected = trials("uninterrupted")
    epoch = expected[0]["steps"] // 3
    assert 3 * epoch > 50 > epoch
    assert len(steps.sizes) == 50 + 2 * epoch + 3 * epoch, "it resumes after the first epoch"
    for row, uninterrupted in zip(trials(), expected, strict=True):
        loss = uninterrupted["metrics"]["test/loss"]
        assert row["metrics"]["test/loss"] == pytest.approx(loss, rel=1e-4)


def test_an_error_of_the_common_step_fails_only_the_trials_of_its_group(command, steps):
    def fail(state):
        if state.slots[0].shape[0] == 16:
            raise RuntimeError("a fault")

    steps.before = fail
    assert command(f"{TRAIN} -m model.width=16,8 'seed=range(2)' {VECTORIZED}")[0] == 1
    assert [row["state"] for row in trials()] == ["failed", "failed", "done", "done"]
    assert "a fault" in trials()[0]["error"]


def test_trials_that_cannot_be_stacked_train_one_by_one_with_a_note(command):
    line = f"{TRAIN} optimizer=muon -m optimizer.lr=0.01,0.02 {VECTORIZED}"
    status, out, err = command(line)
    assert status == 0
    assert [row["state"] for row in trials()] == ["done", "done"]
    assert "2 trials train one by one: Muon has no update for stacked trials" in out + err


def test_plan_lists_the_groups_and_leaves_no_files(command):
    swept = "optimizer.lr=1e-3,1e-2 model.width=8,16 optimizer=adamw,muon 'seed=range(2)'"
    status, out, _ = command(f"plan {SMALL} -m {swept}")
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "16 trials in 4 groups for hydra/launcher=vectorized"
    assert "4 as one model.width=8 optimizer=adamw" in lines
    assert (
        "4 one by one: Muon has no update for stacked trials model.width=16 optimizer=muon" in lines
    )
    assert not Path("runs").exists()


def job(dropout, width=8, lr=0.1, **sections):
    tree = {
        "trainer": {"max_epochs": 3, "accumulate": 1},
        "data": {"noise": 0.1},
        "loader": {},
        "optimizer": {"lr": lr},
        "model": {"width": width, "dropout": dropout},
        **sections,
    }
    return Job(SimpleNamespace(tree=tree), "default", [])


def test_a_group_shares_all_settings_that_determine_shapes():
    jobs = [
        job(dropout=0.1, seed=1),
        job(dropout=0.5, lr=0.2, seed=2),
        job(dropout=0.1, width=16, seed=1),
        job(dropout=0.1, data={"noise": 0.2}),
        job(dropout=0.3, scheduler={"name": "step"}),
    ]
    assert [list(group) for group in find_groups(jobs)] == [[0, 1, 4], [2], [3]]
    assert group_key(jobs[0].spec.tree) == group_key(jobs[1].spec.tree)
