"""`hydra/launcher=vectorized`: a sweep whose trials train as one leaves what trials of their own leave."""

import json
from pathlib import Path

import pytest
import torch

from framework.composition.compose import Job
from framework.tuning.vectorized.launcher import form, groups
from framework.tuning.vectorized.stacked_update import Rows
from runs import logged
from sweeps import rows, trials

SMALL = "data=blobs model.width=8 model.depth=1 trainer.max_epochs=3 callbacks=[checkpoint,non_finite] seed=1"
SWEEP = f"train {SMALL} 'loggers=[tensorboard,json_lines]' -m optimizer.lr=1e-3,1e-2,5e-2 model.dropout=0.0"


def files(run):
    return sorted(
        p.name.partition(".tfevents")[0]
        for p in run.rglob("*")
        if p.is_file() and p.name != "output.txt"
    )


def test_trials_that_train_as_one_leave_the_runs_of_trials_alone(command):
    assert command(f"{SWEEP} sweep.name=one hydra/launcher=vectorized")[0] == 0
    assert command(f"{SWEEP} sweep.name=alone")[0] == 0
    pairs = list(zip(trials("one"), trials("alone"), strict=True))
    assert len(pairs) == 3
    for mine, other in pairs:
        assert (mine["folder"], mine["settings"], mine["state"]) == (
            other["folder"],
            other["settings"],
            "done",
        )
        assert mine["metrics"].keys() == other["metrics"].keys()
        runs = [Path("runs/default") / name / mine["folder"] for name in ("one", "alone")]
        assert files(runs[0]) == files(runs[1])
        assert len(logged(runs[0])) == len(logged(runs[1])) > 3
        for line, expected in zip(*map(logged, runs), strict=True):
            assert line == pytest.approx(
                expected, rel=2e-3, abs=1e-4
            )  # float32, summed in another order
    status, out, _ = command(f"eval runs/default/one/{pairs[0][0]['folder']} --json")
    assert status == 0
    assert json.loads(out)["test/loss"] == pytest.approx(
        pairs[0][0]["metrics"]["test/loss"], rel=1e-5
    )


def test_a_trial_of_a_stack_goes_on_alone(command):
    line = f"train {SMALL} 'loggers=[json_lines]' -m optimizer.lr=1e-3,1e-2 hydra/launcher=vectorized sweep.name=s"
    assert command(line)[0] == 0
    run = Path("runs/default/s") / trials("s")[1]["folder"]
    status, _, err = command(f"resume {run} trainer.max_epochs=5 --inexact")
    assert status == 0, err
    assert logged(run)[-2]["epoch"] == 5


def test_one_that_diverges_fails_and_the_others_are_done(command):
    line = f"train {SMALL} 'loggers=[json_lines]' optimizer=sgd -m optimizer.lr=0.01,1e38,0.1 sweep.name=s"
    assert command(f"{line} hydra/launcher=vectorized")[0] != 0
    assert [row["state"] for row in trials("s")] == ["done", "failed", "done"]
    assert "non_finite" in trials("s")[1]["error"]
    assert command(f"{line} hydra/launcher=vectorized resume=auto")[0] != 0
    began = [row["number"] for row in rows("s") if row["state"] == "running"]
    assert sorted(began) == [0, 1, 1, 2]  # only the failed one ran again


def test_when_memory_is_full_trials_go_on_one_by_one(command, monkeypatch):
    steps = []
    differentiate = Rows.differentiate

    def full(self, losses, add=False):
        steps.append(len(losses))
        if len(steps) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        differentiate(self, losses, add)

    monkeypatch.setattr(Rows, "differentiate", full)
    line = f"train {SMALL} 'loggers=[json_lines]' -m optimizer.lr=1e-3,1e-2 sweep.name=s hydra/launcher=vectorized"
    status, out, err = command(line)
    assert (status, steps) == (0, [2] * 5), err
    assert "2 trials go on one by one: memory is full" in out + err
    assert [row["state"] for row in trials("s")] == ["done", "done"]
    assert [line["epoch"] for line in logged(Path("runs/default/s") / trials("s")[0]["folder"])][
        -1
    ] == 3


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


def test_trials_that_turn_out_not_to_go_together_go_on_one_by_one(command, tmp_path):
    (tmp_path / "grows.py").write_text(GROWS)
    line = (
        "train --plugins grows.py data=digits model=grows trainer.max_epochs=2 loggers=[json_lines]"
    )
    status, out, err = command(
        f"{line} -m optimizer.lr=1e-3,1e-2 sweep.name=s hydra/launcher=vectorized"
    )
    assert status == 0, err
    assert (
        "2 trials go on one by one: the model puts another tensor in the place of a buffer"
        in out + err
    )
    for row in trials("s"):
        run = Path("runs/default/s") / row["folder"]
        assert (row["state"], logged(run)[-1]["epoch"]) == ("done", 2)


def test_a_sweep_that_was_cut_off_goes_on_where_its_trials_stood(command, monkeypatch):
    differentiate, steps = Rows.differentiate, []

    def cut_off(self, losses, add=False):
        steps.append(len(losses))
        if len(steps) == 50:
            raise KeyboardInterrupt
        differentiate(self, losses, add)

    monkeypatch.setattr(Rows, "differentiate", cut_off)
    line = f"train {SMALL} 'loggers=[json_lines]' callbacks.checkpoint.background=false -m optimizer.lr=1e-3,1e-2,1e-1"
    line += " sweep.name=s hydra/launcher=vectorized"
    assert command(line)[0] != 0
    assert command(f"{line} resume=auto")[0] == 0
    assert [row["state"] for row in trials("s")] == ["done"] * 3
    whole = command(f"{line.replace('sweep.name=s', 'sweep.name=whole')}")[0]
    assert whole == 0
    epoch = trials("whole")[0]["steps"] // 3
    assert 3 * epoch > 50 > epoch
    assert (
        len(steps) == 50 + 2 * epoch + 3 * epoch
    )  # it went on from the checkpoints of the first epoch
    for mine, other in zip(trials("s"), trials("whole"), strict=True):
        assert mine["metrics"]["test/loss"] == pytest.approx(
            other["metrics"]["test/loss"], rel=1e-4
        )


def test_a_fault_of_the_step_that_all_take_fails_them_and_nothing_else(command, monkeypatch):
    differentiate = Rows.differentiate

    def faulty(self, losses, add=False):
        if self.places[0].shape[0] == 16:
            raise RuntimeError("a fault")
        differentiate(self, losses, add)

    monkeypatch.setattr(Rows, "differentiate", faulty)
    line = f"train {SMALL} 'loggers=[json_lines]' -m model.width=16,8 'seed=range(2)' sweep.name=s"
    assert command(f"{line} hydra/launcher=vectorized")[0] == 1
    assert [row["state"] for row in trials("s")] == ["failed", "failed", "done", "done"]
    assert "a fault" in trials("s")[0]["error"]


def test_what_cannot_be_stacked_trains_one_by_one_and_it_is_said(command):
    line = f"train {SMALL} 'loggers=[json_lines]' optimizer=muon -m optimizer.lr=0.01,0.02 sweep.name=s"
    status, out, err = command(f"{line} hydra/launcher=vectorized")
    assert status == 0
    assert [row["state"] for row in trials("s")] == ["done", "done"]
    assert "2 trials train one by one: Muon has no pure update" in out + err


def test_plan_tells_the_groups_and_leaves_nothing(command):
    line = f"plan {SMALL} -m optimizer.lr=1e-3,1e-2 model.width=8,16 optimizer=adamw,muon 'seed=range(2)'"
    status, out, _ = command(line)
    assert status == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "16 trials in 4 groups for hydra/launcher=vectorized"
    assert "4 as one model.width=8 optimizer=adamw" in lines
    assert "4 one by one: Muon has no pure update model.width=16 optimizer=muon" in lines
    assert not Path("runs").exists()


class Of:
    def __init__(self, **tree):
        self.tree = {
            "trainer": {"max_epochs": 3, "accumulate": 1},
            "data": {"noise": 0.1},
            "loader": {},
            **tree,
        }


def test_groups_have_in_common_what_decides_on_shapes():
    recipes = [
        {"optimizer": {"lr": 0.1}, "model": {"width": 8, "dropout": 0.1}, "seed": 1},
        {"optimizer": {"lr": 0.2}, "model": {"width": 8, "dropout": 0.5}, "seed": 2},
        {"optimizer": {"lr": 0.1}, "model": {"width": 16, "dropout": 0.1}, "seed": 1},
        {"optimizer": {"lr": 0.1}, "model": {"width": 8, "dropout": 0.1}, "data": {"noise": 0.2}},
        {
            "optimizer": {"lr": 0.1},
            "model": {"width": 8, "dropout": 0.3},
            "scheduler": {"name": "step"},
        },
    ]
    jobs = [Job(Of(**recipe), "default", []) for recipe in recipes]
    assert groups(jobs) == [[0, 1, 4], [2], [3]]
    assert form(jobs[0].spec.tree) == form(jobs[1].spec.tree)
