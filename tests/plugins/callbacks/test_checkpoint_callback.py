"""The checkpoint callback in fits of a tiny regression."""

import math
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from framework import Callback
from framework.errors import SettingError
from framework.runs.checkpoint import load, newest, read_manifest
from regressions import Script, StopAt, assert_same_weights, build, fit, linear

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*it replaces the value that the trainer itself logs"
)


def saved_steps(folder: Path) -> list[int]:
    paths = (folder / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in paths)


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    script = Script("val/loss", [5, 1, math.nan, 3, 2, 4])
    fit(script, build("checkpoint", keep=2), epochs=6, folder=tmp_path)
    assert saved_steps(tmp_path) == [6, 15, 18]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step-00000006"


def test_the_end_of_a_run_is_always_saved(tmp_path):
    trainer, _ = fit(build("checkpoint", every="5epochs", monitor=None), folder=tmp_path)
    assert saved_steps(tmp_path) == [12]
    model, training = load(tmp_path / "checkpoints" / "step-00000012")
    assert torch.equal(model["weight"], trainer.model.weight)
    assert training["counters"]["epoch"] == 4


@pytest.mark.parametrize(
    ("every", "steps"), [("5steps", [5, 10, 12]), ("2epochs", [6, 12]), ("1h", [12])]
)
def test_checkpoints_are_saved_at_the_cadence(tmp_path, every, steps):
    fit(build("checkpoint", every=every, monitor=None, keep=9), folder=tmp_path)
    assert saved_steps(tmp_path) == steps


def test_the_best_is_saved_even_if_no_checkpoint_is_due(tmp_path):
    checkpoint = build("checkpoint", every="9epochs", keep=1)
    fit(Script("val/loss", [3, 1, 2, 2]), checkpoint, folder=tmp_path)
    assert saved_steps(tmp_path) == [6, 12]


def test_the_k_best_checkpoints_are_kept(tmp_path):
    script = Script("val/loss", [5, 1, 3, 1, 2, 9, 8])
    fit(script, build("checkpoint", keep=1, best=3), epochs=7, folder=tmp_path)
    assert saved_steps(tmp_path) == [6, 12, 15, 21]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step-00000006"  # the first of equals


def test_a_resumed_run_continues_the_ranking_and_keeps_its_first_checkpoint(tmp_path):
    script = Script("val/loss", [4, 1, 3, 2, 9, 9, 9])
    checkpoint = build("checkpoint", keep=1, best=2)
    first, _ = fit(script, checkpoint, epochs=3, folder=tmp_path)
    assert saved_steps(tmp_path) == [6, 9]

    class ResumedFrom(Callback):
        def on_fit_start(self, trainer):
            trainer.resumed_from = trainer.state.step

    again = build("checkpoint", keep=1, best=2)
    resume = first.state_dict()
    fit(ResumedFrom(), script, again, epochs=7, folder=tmp_path, resume=resume)
    assert saved_steps(tmp_path) == [6, 9, 12, 21]
    assert again.state_dict()["best"] == [[1, 6], [2, 12]]


def test_the_manifest_contains_the_facts_of_the_run(tmp_path):
    class Facts(Callback):
        def on_fit_start(self, trainer):
            trainer.manifest = {"run_id": "abc", "config_hash": "123"}

    fit(Facts(), build("checkpoint"), epochs=1, folder=tmp_path)
    manifest = read_manifest(tmp_path / "checkpoints" / "step-00000003")
    assert manifest["run"] == {
        "threads": torch.get_num_threads(),
        "run_id": "abc",
        "config_hash": "123",
    }


@pytest.mark.parametrize("background", [True, False])
def test_saving_in_the_background_does_not_change_the_content(tmp_path, background):
    checkpoint = build("checkpoint", every="1steps", keep=20, background=background)
    fit(checkpoint, folder=tmp_path)
    assert saved_steps(tmp_path) == list(range(1, 13))
    assert "checkpoint" not in [thread.name for thread in threading.enumerate()]
    model, training = load(tmp_path / "checkpoints" / "step-00000007")
    stopped, _ = fit(StopAt(7), folder=tmp_path / "again")
    assert training["counters"]["step"] == 7
    assert torch.equal(model["weight"], stopped.model.weight)


def test_checkpoints_with_nan_are_neither_counted_nor_kept(tmp_path):
    class FillWithNan(Callback):
        def on_epoch_start(self, trainer):
            if trainer.state.epoch == 2:
                trainer.model.weight.data.fill_(math.nan)

    fit(FillWithNan(), build("checkpoint", background=False), folder=tmp_path)
    assert saved_steps(tmp_path) == [3, 6, 12]
    assert read_manifest(tmp_path / "checkpoints" / "step-00000012")["nan"] == ["weight", "bias"]
    assert newest(tmp_path / "checkpoints")[0].name == "step-00000006"


@pytest.mark.parametrize("at", [3, 5, 6])
def test_a_run_resumed_from_its_checkpoint_equals_the_uninterrupted_run(tmp_path, at):
    class Crash(Callback):
        def on_step_start(self, trainer):
            if trainer.state.step == at:
                raise KeyboardInterrupt

    def parts():
        model = nn.Sequential(linear(), nn.Dropout(0.5), nn.Linear(1, 1))
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}

    uninterrupted_folder = tmp_path / "uninterrupted"
    folder = tmp_path / "interrupted"
    checkpoint = partial(build, "checkpoint", every="1steps")
    uninterrupted, _ = fit(checkpoint(), folder=uninterrupted_folder, **parts())
    with pytest.raises(KeyboardInterrupt):
        fit(checkpoint(), Crash(), folder=folder, **parts())
    found, skipped = newest(folder / "checkpoints")
    assert (found.name, skipped) == (f"step-{at:08d}", [])
    model, training = load(found)
    resumed, _ = fit(checkpoint(), folder=folder, resume={"model": model} | training, **parts())
    assert_same_weights(uninterrupted.model, resumed.model)
    assert saved_steps(folder) == [at, 11, 12]
    assert saved_steps(uninterrupted_folder) == [11, 12]


def test_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / "checkpoints" / ".step-00000003-01234567").mkdir(parents=True)
    fit(build("checkpoint"), folder=tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_run_without_a_folder_is_an_error():
    with pytest.raises(SettingError, match="no folder"):
        fit(build("checkpoint"))
