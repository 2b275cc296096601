"""A search from its command line to its table, in real runs."""

import json

import pytest

from framework.cli import main
from framework.errors import FrameworkError
from framework.tuning.search.study import storage_in
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
            raise ValueError("this loss is not to be had")
        if self.how == "memory":
            torch.empty(10**15)
        return super().forward(outputs, targets) * (float("nan") if self.how == "no_number" else 1.0)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage_in.cache_clear()


def search(*overrides, name="a"):
    return main.run(["train", "-m", *QUICK, *SEARCH, f"sweep.name={name}", *overrides])


def rows(tmp_path, name="a"):
    return SweepFolder(tmp_path / "runs/default" / name).trials()


def test_a_search_leaves_runs_a_table_and_what_matters(tmp_path, capsys):
    search("model.depth=range(1, 3)", "loggers=[tensorboard, json_lines]", "hydra.sweeper.trials=5")
    folder, said = tmp_path / "runs/default/a", capsys.readouterr().out
    assert [row.state for row in rows(tmp_path)] == ["done"] * 5
    assert all(row.settings.keys() == {"optimizer.lr", "model.depth"} for row in rows(tmp_path))
    assert "matters for val/loss" in said
    best = min(rows(tmp_path), key=lambda row: row.metrics["val/loss"])
    assert (folder / "best/config.yaml").resolve().parent.name == best.folder
    assert json.loads((folder / best.folder / "status.json").read_text())["status"] == "done"
    assert list(folder.glob("events.out.tfevents.*")), "pictures for TensorBoard"


def test_the_same_command_goes_on_to_the_same_total(tmp_path, capsys):
    search("hydra.sweeper.trials=1")
    search("hydra.sweeper.trials=3", "resume=auto")
    search("hydra.sweeper.trials=3", name="b")
    assert (
        len((tmp_path / "runs/default/a/sweep.jsonl").read_text().splitlines()) == 6
    )  # a row at begin and end
    one, other = ([row.metrics["val/loss"] for row in rows(tmp_path, name)] for name in "ab")
    assert one == other


def test_what_fails_is_in_the_table_and_the_rest_goes_on(tmp_path, capsys):
    (tmp_path / "faulty.py").write_text(FAULTY)
    faults = ["loss=faulty", "loss.how=fine,fails,no_number,memory"]
    plugins = ["--plugins", "faulty.py", "callbacks=[checkpoint]"]
    with pytest.raises(FrameworkError, match="of 9 trials failed"):
        search(*faults, *plugins, "hydra.sweeper.trials=9", "hydra.sweeper.sampler=random")
    found = {row.settings["loss.how"]: row for row in rows(tmp_path)}
    assert len(rows(tmp_path)) == 9
    assert {how: row.state for how, row in found.items()} == {
        "fine": "done",
        "fails": "failed",
        "no_number": "done",
        "memory": "failed",
    }
    assert "this loss is not to be had" in found["fails"].error
    best = (tmp_path / "runs/default/a/best/config.yaml").resolve().parent.name
    assert best in {row.folder for row in rows(tmp_path) if row.settings["loss.how"] == "fine"}


def test_pruned_trials_end_early_and_are_told_apart(tmp_path, capsys):
    longer = ["trainer.max_steps=null", "trainer.max_epochs=4", "loader.batch_size=512"]
    pruner = ["hydra.sweeper.pruner=halving", "hydra.sweeper.trials=8", "hydra.sweeper.warmup=1"]
    search(*longer, *pruner)
    found = rows(tmp_path)
    pruned = [row for row in found if row.state == "pruned"]
    assert pruned
    assert all(row.settings.keys() == {"optimizer.lr"} for row in found), (
        "all have it: it tells nothing"
    )
    longest = max(row.steps for row in found)
    assert all(row.steps < longest for row in pruned)
    assert {row.steps for row in found if row.state == "done"} == {longest}


def test_trials_that_train_as_one_are_pruned_one_by_one(tmp_path, capsys):
    """Two batches of 8, the second of which knows how the first ones went."""
    pruning = ["hydra.sweeper.pruner=median", "hydra.sweeper.startup=3", "hydra.sweeper.warmup=1"]
    longer = ["hydra.sweeper.trials=16", "hydra.sweeper.sampler=random", "trainer.max_steps=null"]
    longer += ["trainer.max_epochs=4", "data=blobs", "optimizer.lr=tag(log, interval(1e-6, 1e-1))"]
    search(*pruning, *longer, "hydra/launcher=vectorized", name="v")
    found, said = rows(tmp_path, "v"), capsys.readouterr()
    assert "one by one" not in said.out + said.err
    assert {row.state for row in found} == {"done", "pruned"}
    assert len(found) == 16
    longest = max(row.steps for row in found)
    for row in found:
        curve = (
            (tmp_path / "runs/default/v" / row.folder / "metrics.jsonl").read_text().splitlines()
        )
        steps = [json.loads(line)["step"] for line in curve]
        assert max(steps) == row.steps, "what is pruned trains no further, what is not goes on"
        assert (row.steps < longest) == (row.state == "pruned")


def test_several_metrics_have_a_front(tmp_path, capsys):
    search("sweep.metric=[val/loss,val/accuracy]", "model.depth=range(1, 3)")
    assert len(rows(tmp_path)) == 4
    assert (tmp_path / "runs/default/a/study.journal").is_file()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hydra.sweeper.trials=0"], "hydra.sweeper.trials=0: expected int in"),
        (["hydra.sweeper.sampler=tbe"], "hydra.sweeper.sampler=tbe: expected one of auto, tpe"),
        (["hydra.sweeper.trails=4"], "hydra.sweeper.trails"),
        (["optimizer.lr=tag(log, interval(0, 1))"], "`low > 0` must hold"),
        (["optimizer.lr=0.1"], "a search needs something to choose"),
        (["model.depht=range(1, 3)"], "mlp has no setting 'depht'; did you mean 'depth'?"),
        (
            ["sweep.metric=[val/loss,val/accuracy]", "hydra.sweeper.pruner=median"],
            "goes with one sweep.metric",
        ),
    ],
)
def test_a_wrong_search_is_told_before_there_is_a_folder(overrides, said, tmp_path):
    with pytest.raises(FrameworkError) as error:
        search(*overrides)
    assert said in str(error.value)
    assert not list(tmp_path.glob("runs/*/*/*"))
