"""status.json is complete at any moment, and correct."""

import json
import os

import pytest
from torch import nn

from fits import OPTIMIZERS, SPLIT, At, network
from framework import Trainer
from framework.runs.status_file import Status


def run(folder, *callbacks, **settings):
    model = network()
    status = Status()
    status.seconds = 0
    settings = {"max_epochs": 2, "log_every": "1steps", "device": "cpu"} | settings
    trainer = Trainer(callbacks=[*callbacks, status], folder=folder, **settings)
    trainer.fit(
        model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=OPTIMIZERS["sgd"](model), batch_size=16
    )
    if trainer.state.stop is None:
        assert folder is None or read(folder)["status"] == "testing"
        status.done(trainer)


def read(folder):
    return json.loads((folder / "status.json").read_text())


def test_a_run_is_running_and_then_done(tmp_path):
    seen = []
    run(tmp_path, At(4, lambda trainer: seen.append(read(tmp_path))))
    [during] = seen
    after = read(tmp_path)
    assert (during["status"], during["step"], during["total_steps"], during["epoch"]) == (
        "running",
        4,
        10,
        0,
    )
    assert during["eta_seconds"] == pytest.approx(during["wall_seconds"] / 4 * 6, abs=0.06)
    assert during["samples_per_second"] > 0
    assert during["pid"] == os.getpid()
    assert (after["status"], after["step"], after["eta_seconds"], after["reason"]) == (
        "done",
        10,
        None,
        None,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_the_kind_of_steps_that_was_kept_is_in_the_status(tmp_path):
    found = []
    for mode in ("off", "auto"):
        trainer = Trainer(max_steps=1, compile=mode, folder=tmp_path, device="cpu")
        trainer.compile_choice.kind = "eager"
        Status().claim(trainer)
        found.append(read(tmp_path).get("step_kind"))
    assert found == [None, "eager"]


def test_the_status_is_written_at_most_once_a_second(tmp_path):
    status = Status()
    trainer = Trainer(
        max_steps=5, log_every="1steps", callbacks=[status], folder=tmp_path, device="cpu"
    )
    model = network()
    written = []
    trainer.callbacks[0]._write = lambda trainer, what, real=status._write: (
        written.append(what),
        real(trainer, what),
    )
    trainer.fit(
        model, SPLIT, task=nn.CrossEntropyLoss(), optimizer=OPTIMIZERS["sgd"](model), batch_size=16
    )
    assert written == ["running", "testing"]


def test_the_status_of_a_stopped_or_failed_run_has_the_reason(tmp_path):
    run(tmp_path, At(3, lambda trainer: setattr(trainer.state, "stop", "enough")))
    assert (read(tmp_path)["status"], read(tmp_path)["reason"]) == ("stopped", "enough")
    run(tmp_path, At(3, lambda trainer: trainer.stop("at", "enough")))
    assert (read(tmp_path)["status"], read(tmp_path)["reason"]) == ("stopped", "at: enough")
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, At(3, lambda trainer: 1 / 0))
    assert read(tmp_path)["status"] == "failed"
    assert read(tmp_path)["reason"].startswith("ZeroDivisionError: division by zero (")


def test_a_trainer_without_a_folder_writes_no_status(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(None)
    assert not list(tmp_path.iterdir())
