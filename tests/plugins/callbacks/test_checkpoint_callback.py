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
from regressions import Script, build, fit, linear


class Until(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            trainer.state.stop = "until"


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def test_the_newest_and_the_best_checkpoints_stay(tmp_path):
    script = Script("val/loss", [5, 1, math.nan, 3, 2, 4])
    fit(script, build("checkpoint", keep=2), epochs=6, folder=tmp_path)
    assert saved(tmp_path) == [6, 15, 18]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step-00000006"


def test_nothing_but_the_end_is_saved_when_nothing_else_is_asked_for(tmp_path):
    trainer, _ = fit(build("checkpoint", every="5epochs", monitor=None), folder=tmp_path)
    assert saved(tmp_path) == [12]
    model, training = load(tmp_path / "checkpoints" / "step-00000012")
    assert torch.equal(model["weight"], trainer.model.weight)
    assert training["counters"]["epoch"] == 4


@pytest.mark.parametrize(
    ("every", "steps"), [("5steps", [5, 10, 12]), ("2epochs", [6, 12]), ("1h", [12])]
)
def test_cadences(tmp_path, every, steps):
    fit(build("checkpoint", every=every, monitor=None, keep=9), folder=tmp_path)
    assert saved(tmp_path) == steps


def test_the_best_is_saved_even_when_nothing_is_due(tmp_path):
    fit(
        Script("val/loss", [3, 1, 2, 2]),
        build("checkpoint", every="9epochs", keep=1),
        folder=tmp_path,
    )
    assert saved(tmp_path) == [6, 12]


def test_the_best_k_stay(tmp_path):
    script = Script("val/loss", [5, 1, 3, 1, 2, 9, 8])
    fit(script, build("checkpoint", keep=1, best=3), epochs=7, folder=tmp_path)
    assert saved(tmp_path) == [6, 12, 15, 21]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step-00000006"  # the first of equals


def test_the_ranking_goes_on_after_a_resume_and_the_one_resumed_from_stays(tmp_path):
    values = [4, 1, 3, 2, 9, 9, 9]
    first, _ = fit(
        Script("val/loss", values), build("checkpoint", keep=1, best=2), epochs=3, folder=tmp_path
    )
    assert saved(tmp_path) == [6, 9]

    class From(Callback):
        def on_fit_start(self, trainer):
            trainer.resumed_from = trainer.state.step

    again = build("checkpoint", keep=1, best=2)
    fit(
        From(),
        Script("val/loss", values),
        again,
        epochs=7,
        folder=tmp_path,
        resume=first.state_dict(),
    )
    assert saved(tmp_path) == [6, 9, 12, 21]
    assert again.state_dict()["best"] == [[1, 6], [2, 12]]


def test_the_manifest_has_the_facts_of_the_run(tmp_path):
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
def test_saving_in_the_background_changes_nothing(tmp_path, background):
    build_one = partial(build, "checkpoint", every="1steps", keep=20, background=background)
    fit(build_one(), folder=tmp_path)
    assert saved(tmp_path) == list(range(1, 13))
    assert not [each for each in threading.enumerate() if each.name == "checkpoint"]
    model, training = load(tmp_path / "checkpoints" / "step-00000007")
    seven, _ = fit(Until(7), folder=tmp_path / "again")
    assert training["counters"]["step"] == 7
    assert torch.equal(model["weight"], seven.model.weight)


def test_checkpoints_with_nan_neither_count_nor_stay(tmp_path):
    class Spoil(Callback):
        def on_epoch_start(self, trainer):
            if trainer.state.epoch == 2:
                trainer.model.weight.data.fill_(math.nan)

    fit(Spoil(), build("checkpoint", background=False), folder=tmp_path)
    assert saved(tmp_path) == [3, 6, 12]
    assert read_manifest(tmp_path / "checkpoints" / "step-00000012")["nan"] == ["weight", "bias"]
    assert newest(tmp_path / "checkpoints")[0].name == "step-00000006"


@pytest.mark.parametrize("at", [3, 5, 6])
def test_a_run_resumed_from_its_checkpoint_ends_bitwise_as_the_uninterrupted_one(tmp_path, at):
    class Crash(Callback):
        def on_step_start(self, trainer):
            if trainer.state.step == at:
                raise KeyboardInterrupt

    def parts():
        model = nn.Sequential(linear(), nn.Dropout(0.5), nn.Linear(1, 1))
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}

    whole, _ = fit(build("checkpoint", every="1steps"), folder=tmp_path / "whole", **parts())
    with pytest.raises(KeyboardInterrupt):
        fit(build("checkpoint", every="1steps"), Crash(), folder=tmp_path / "cut", **parts())
    found, skipped = newest(tmp_path / "cut" / "checkpoints")
    assert (found.name, skipped) == (f"step-{at:08d}", [])
    model, training = load(found)
    again, _ = fit(
        build("checkpoint", every="1steps"),
        folder=tmp_path / "cut",
        resume={"model": model} | training,
        **parts(),
    )
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert saved(tmp_path / "cut") == [at, 11, 12]
    assert saved(tmp_path / "whole") == [11, 12]


def test_what_a_killed_process_left_is_cleaned_up(tmp_path):
    (tmp_path / "checkpoints" / ".step-00000003-01234567").mkdir(parents=True)
    fit(build("checkpoint"), folder=tmp_path)
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_run_without_a_folder_cannot_be_saved():
    with pytest.raises(SettingError, match="no folder"):
        fit(build("checkpoint"))
