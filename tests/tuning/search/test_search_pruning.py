"""A trial of a search that is behind the others is pruned; a resumed one reports nothing twice."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

import framework as fw
from distributed_runs import run_in_processes
from framework import Callback, TensorSplit, Trainer
from framework.errors import RunError, SettingError
from framework.tuning.search.space import Space
from framework.tuning.search.study import cached_storage, create_study, make_pruner

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*it replaces the value that the trainer itself logs"
)

INPUTS = torch.linspace(-1, 1, 24).reshape(12, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))
GOOD = [5.0, 4.0, 3.0, 2.0, 1.0]
BAD = [5.0, 4.5, 4.0, 3.5, 3.0]


@dataclass
class ScriptedLoss(Callback):
    """Replaces the validation loss of each epoch."""

    values: list[float]

    def on_validation_end(self, trainer):
        trainer.log({"val/loss": self.values[trainer.state.epoch - 1]})


@dataclass
class CheckpointAfter(Callback):
    """Keeps the state after some epochs, as the checkpoint of a killed run."""

    epochs: int
    saved: dict | None = None

    def on_step_end(self, trainer):
        if trainer.state.epoch == self.epochs and trainer.state.batch == 0 and self.saved is None:
            self.saved = trainer.state_dict()


@pytest.fixture
def study(tmp_path):
    """Return a search with three good trials, and a fourth that has started."""
    space = Space(["++seed=range(9)"])
    study = create_study(tmp_path, ["minimize"], {"metric": ["val/loss"], "space": space.texts})
    study.pruner = make_pruner("halving", startup=0, warmup=0)
    for _ in range(3):
        trial = study.ask()
        for point, value in enumerate(GOOD, 1):
            trial.report(value, point)
            trial.should_prune()  # halving stores the progress of each trial
        study.tell(trial, GOOD[-1])
    study.ask()
    return study


def train(folder, values, resume=None, callbacks=(), **settings):
    prune = fw.callbacks.build("prune", **{"startup": 2, "warmup": 0, **settings})
    trainer = Trainer(
        max_epochs=len(values),
        strategy=fw.strategies.build("auto"),
        callbacks=[ScriptedLoss(values), prune, *callbacks],
        folder=folder,
    )
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return trainer.fit(
        model,
        SPLIT,
        val=SPLIT,
        task=torch.nn.MSELoss(),
        optimizer=optimizer,
        batch_size=4,
        resume=resume,
    )


def test_a_trial_behind_the_others_is_pruned(study, tmp_path):
    state = train(tmp_path / "003_seed-3", BAD)
    assert state.stop.by == "prune"
    assert state.stop.reason.startswith("val/loss is worse")
    assert state.epoch == 2
    assert study.trials[3].intermediate_values == {1: 5.0, 2: 4.5}


def epochs_and_stop(folder):
    fw.discover()
    torch.manual_seed(0)
    state = train(folder, BAD)
    return state.epoch, state.stop.by


def test_all_processes_of_a_trial_are_pruned_after_the_same_epoch(study, tmp_path):
    (tmp_path / "results").mkdir()
    folder = tmp_path / "003_seed-3"
    ends = run_in_processes(epochs_and_stop, 2, tmp_path / "results", folder)
    assert ends == [(2, "prune")] * 2
    assert study.trials[3].intermediate_values == {1: 5.0, 2: 4.5}


def test_a_trial_ahead_goes_on(study, tmp_path):
    assert train(tmp_path / "003_seed-3", [value - 1 for value in GOOD]).stop is None


@pytest.mark.parametrize(
    ("settings", "epochs"), [({"warmup": 3}, 4), ({"startup": 4}, 5), ({"pruner": "halving"}, 3)]
)
def test_the_pruner_and_its_settings_can_be_chosen(study, tmp_path, settings, epochs):
    assert train(tmp_path / "003_seed-3", BAD, **settings).epoch == epochs


def test_a_resumed_trial_reports_nothing_twice_and_is_pruned_at_the_same_epoch(study, tmp_path):
    checkpoint = CheckpointAfter(1)
    assert train(tmp_path / "003", BAD, callbacks=[checkpoint]).epoch == 2
    cached_storage.cache_clear()
    state = train(tmp_path / "003", BAD, resume=checkpoint.saved, callbacks=[CheckpointAfter(9)])
    assert (state.epoch, state.stop is not None) == (2, True)
    assert study.trials[3].intermediate_values == {1: 5.0, 2: 4.5}


def test_a_trial_killed_where_it_is_pruned_ends_at_once_when_resumed(study, tmp_path):
    checkpoint = CheckpointAfter(2)
    train(tmp_path / "003", BAD, callbacks=[checkpoint])
    state = train(tmp_path / "003", BAD, resume=checkpoint.saved, callbacks=[CheckpointAfter(9)])
    assert (state.epoch, state.stop is not None) == (2, True)


def test_nan_is_not_reported(study, tmp_path):
    assert train(tmp_path / "003", [float("nan"), 4.0, 3.0, 2.0, 1.0]).epoch == 5
    assert 1 not in study.trials[3].intermediate_values


def test_pruning_outside_a_search_is_an_error(tmp_path):
    with pytest.raises(SettingError, match="not a trial of a search"):
        train(tmp_path / "mine", BAD)
    with pytest.raises(RunError, match="is not the folder of a search"):
        train(tmp_path / "003_seed-1", BAD)


def test_building_the_callback_does_not_import_optuna():
    script = (
        "import sys, framework as fw; fw.discover(); fw.callbacks.build('prune'); "
        "print('optuna' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
