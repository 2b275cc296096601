"""Searches from the command line to the table, with real runs."""

import json

import pytest

from framework.cli import main
from framework.errors import FrameworkError
from framework.runs.folder import read_config
from framework.tuning.search.study import cached_storage
from framework.tuning.sweep.folder import SweepFolder

QUICK = [
    "trainer.max_steps=4",
    "model.width=8",
    "loggers=json_lines",
    "callbacks=[checkpoint]",
    "seed=1",
]
SEARCH = [
    "hydra/sweeper=optuna",
    "hydra.sweeper.trials=4",
    "optimizer.lr=tag(log, interval(1e-3, 1e-1))",
]

FAULTY = """
import torch
from framework import PositiveFloat, losses

@losses.register("faulty")
class Faulty(torch.nn.CrossEntropyLoss):
    def __init__(self, how: str = "fine"):
        super().__init__()
        self.how = how

    def forward(self, outputs, targets):
        if self.how == "fails":
            raise ValueError("this loss fails")
        if self.how == "memory":
            torch.empty(10**15)
        loss = super().forward(outputs, targets)
        return loss * float("nan") if self.how == "no_number" else loss
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached_storage.cache_clear()


def search(*overrides, name="a"):
    return main.run(["train", "-m", *QUICK, *SEARCH, f"sweep.name={name}", *overrides])


def rows(tmp_path, name="a"):
    return SweepFolder(tmp_path / "runs/default" / name).trials()


def test_a_search_leaves_runs_and_prints_a_table_with_importances(tmp_path, capsys):
    search("model.depth=range(1, 3)", "loggers=[tensorboard, json_lines]", "hydra.sweeper.trials=5")
    folder = tmp_path / "runs/default/a"
    found = rows(tmp_path)
    assert [row.state for row in found] == ["done"] * 5
    assert all(row.settings.keys() == {"optimizer.lr", "model.depth"} for row in found)
    assert "matters for val/loss" in capsys.readouterr().out
    best = min(found, key=lambda row: row.metrics["val/loss"])
    assert (folder / "best/config.yaml").resolve().parent.name == best.folder
    assert json.loads((folder / best.folder / "status.json").read_text())["status"] == "done"
    assert list(folder.glob("events.out.tfevents.*")), "charts for TensorBoard"


def test_a_resumed_search_gives_the_same_trials(tmp_path, capsys):
    search("hydra.sweeper.trials=1")
    search("hydra.sweeper.trials=3", "resume=auto")
    search("hydra.sweeper.trials=3", name="b")
    lines = (tmp_path / "runs/default/a/sweep.jsonl").read_text().splitlines()
    assert len(lines) == 6, "a row at the start and end of each trial"
    losses = [row.metrics["val/loss"] for row in rows(tmp_path, "a")]
    assert losses == [row.metrics["val/loss"] for row in rows(tmp_path, "b")]


@pytest.mark.filterwarnings("ignore:the loss Faulty")
def test_failed_trials_are_recorded_and_the_search_goes_on(tmp_path, capsys):
    (tmp_path / "faulty.py").write_text(FAULTY)
    faults = ["loss=faulty", "loss.how=fine,fails,no_number,memory"]
    plugins = ["--plugins", "faulty.py", "callbacks=[checkpoint]"]
    with pytest.raises(FrameworkError, match="of 9 trials failed"):
        search(*faults, *plugins, "hydra.sweeper.trials=9", "hydra.sweeper.sampler=random")
    found = {row.settings["loss.how"]: row for row in rows(tmp_path)}
    assert len(rows(tmp_path)) == 9
    states = {how: row.state for how, row in found.items()}
    assert states == {"fine": "done", "fails": "failed", "no_number": "done", "memory": "failed"}
    assert "this loss fails" in found["fails"].error
    best = (tmp_path / "runs/default/a/best/config.yaml").resolve().parent.name
    assert best in {row.folder for row in rows(tmp_path) if row.settings["loss.how"] == "fine"}


def test_pruned_trials_end_early_and_are_marked(tmp_path, capsys):
    longer = ["trainer.max_steps=null", "trainer.max_epochs=4", "loader.batch_size=512"]
    pruner = ["hydra.sweeper.pruner=halving", "hydra.sweeper.trials=8", "hydra.sweeper.warmup=1"]
    search(*longer, *pruner)
    found = rows(tmp_path)
    pruned = [row for row in found if row.state == "pruned"]
    assert pruned
    assert all(row.settings.keys() == {"optimizer.lr"} for row in found)
    longest = max(row.steps for row in found)
    assert all(row.steps < longest for row in pruned)
    assert {row.steps for row in found if row.state == "done"} == {longest}


def test_stacked_trials_are_pruned_one_by_one(tmp_path, capsys):
    """The search trains two batches of 8; the second is compared with the results of the first."""
    pruning = ["hydra.sweeper.pruner=median", "hydra.sweeper.startup=3", "hydra.sweeper.warmup=1"]
    longer = ["hydra.sweeper.trials=16", "hydra.sweeper.sampler=random", "trainer.max_steps=null"]
    longer += ["trainer.max_epochs=4", "data=blobs", "optimizer.lr=tag(log, interval(1e-6, 1e-1))"]
    search(*pruning, *longer, "hydra/launcher=vectorized", name="v")
    found = rows(tmp_path, "v")
    printed = capsys.readouterr()
    assert "one by one" not in printed.out + printed.err
    assert {row.state for row in found} == {"done", "pruned"}
    assert len(found) == 16
    longest = max(row.steps for row in found)
    for row in found:
        metrics = (tmp_path / "runs/default/v" / row.folder / "metrics.jsonl").read_text()
        steps = [json.loads(line)["step"] for line in metrics.splitlines()]
        assert max(steps) == row.steps, "a pruned trial trains no further"
        assert (row.steps < longest) == (row.state == "pruned")


def test_a_search_may_have_several_objectives(tmp_path, capsys):
    search("sweep.metric=[val/loss,val/accuracy]", "model.depth=range(1, 3)")
    assert len(rows(tmp_path)) == 4
    assert (tmp_path / "runs/default/a/study.journal").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra.sweeper.trials=0"], "hydra.sweeper.trials=0: "),
        (["hydra.sweeper.sampler=tbe"], "hydra.sweeper.sampler=tbe: "),
        (["hydra.sweeper.trails=4"], "hydra.sweeper.trails"),
        (["optimizer.lr=tag(log, interval(0, 1))"], "`low > 0` must hold"),
        (["optimizer.lr=0.1"], "a search needs a hyperparameter"),
        (["model.depht=range(1, 3)"], "mlp has no setting 'depht'; did you mean 'depth'?"),
        (
            ["sweep.metric=[val/loss,val/accuracy]", "hydra.sweeper.pruner=median"],
            "expected one sweep.metric, got 2",
        ),
    ],
)
def test_an_invalid_search_is_reported_before_a_folder_is_created(overrides, message, tmp_path):
    with pytest.raises(FrameworkError) as error:
        search(*overrides)
    assert message in str(error.value)
    assert not list(tmp_path.glob("runs/*/*/*"))


@pytest.mark.parametrize("sweeper", ["optuna", "basic"])
def test_a_setting_is_varied_for_other_parts_than_that_of_the_experiment(sweeper, tmp_path):
    """The ranges are in the experiment file, which gives the setting to the part that it names."""
    experiments = tmp_path / "conf" / "experiment"
    experiments.mkdir(parents=True)
    space = "0.25, 0.5" if sweeper == "basic" else "interval(0.25, 0.5)"
    (experiments / "varied.yaml").write_text(f"""
defaults:
  - override /hydra/sweeper: {sweeper}
optimizer: {{name: adamw, lr: 0.01}}
hydra:
  sweeper:
    params:
      optimizer: sgd, rmsprop
      optimizer.lr: {space}
""")
    trials = ["hydra.sweeper.trials=4"] if sweeper == "optuna" else []
    main.run(["train", "-m", "experiment=varied", "sweep.name=a", *QUICK, *trials])
    found = SweepFolder(tmp_path / "runs/varied/a").trials()
    assert [row.state for row in found] == ["done"] * 4
    for row in found:
        config = read_config(tmp_path / "runs/varied/a" / row.folder)
        assert config["optimizer"]["name"] == row.settings["optimizer"]
        assert config["optimizer"]["lr"] == row.settings["optimizer.lr"]
