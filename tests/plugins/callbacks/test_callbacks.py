"""Callbacks, each in a real run of a tiny regression."""

import math
import os
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, Logger, Metric, TensorSplit, Trainer
from framework.errors import FrameworkError, SettingError
from framework.runs.checkpoint import load, newest, read_manifest

INPUTS = torch.linspace(-1, 1, 24).reshape(12, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))


class Record(Logger):
    """Keeps what it is given."""

    def __init__(self):
        self.values: list[tuple[int, str, float]] = []
        self.histograms: list[tuple[int, str, torch.Tensor]] = []

    def scalars(self, values, *, step, epoch, wall_seconds):
        self.values += [(step, name, value) for name, value in values.items()]

    def histogram(self, tag, values, step):
        self.histograms.append((step, tag, values))

    def of(self, name):
        return {step: value for step, each, value in self.values if each == name}


@dataclass
class Script(Callback):
    """Says what validation measures, epoch after epoch, in place of what it measured."""

    name: str
    values: list[float]
    seen: list[float] = field(default_factory=list)

    def on_validation_end(self, trainer):
        trainer.log({self.name: self.values[trainer.state.epoch - 1]})


class Correct(Metric):
    name = "correct"
    better: ClassVar = "higher"

    def sums(self, outputs, targets):
        return torch.tensor([1.0, 2.0])

    def compute(self, sums):
        return float(sums[0] / sums[1])


class Until(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            trainer.state.stop = "until"


class Wait(Callback):
    """Makes steps that take the same time on any machine, by the clock that a test turns."""

    def __init__(self, clock):
        self.clock = clock

    def on_gradients(self, trainer):
        self.clock[0] += 1.0


def linear():
    torch.manual_seed(1)
    return nn.Linear(2, 1)


def fit(
    *callbacks,
    epochs=4,
    model=None,
    optimizer=None,
    lr=0.1,
    folder=None,
    resume=None,
    log_every="1epoch",
    **fit,
):
    """Three steps an epoch; returns (trainer, record)."""
    record, model = Record(), model or linear()
    trainer = Trainer(
        max_epochs=epochs,
        log_every=log_every,
        callbacks=callbacks,
        loggers=[record],
        folder=folder,
        device="cpu",
    )
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    fit = {"task": nn.MSELoss(), "val": SPLIT, "batch_size": 4} | fit
    trainer.fit(model, SPLIT, optimizer=optimizer, resume=resume, **fit)
    return trainer, record


def build(name, **settings):
    return fw.callbacks.build(name, **settings)


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


# early_stop


@pytest.mark.parametrize(
    ("values", "settings", "stops_after"),
    [
        ([5, 4, 4, 4, 3, 3], {"patience": 2}, 4),
        ([5, 4, 4, 3, 3, 2], {"patience": 2}, None),
        ([5, 4.9, 4.8, 4.7, 4.6, 4.5], {"patience": 3, "min_delta": 0.5}, 4),
        ([math.nan, 5, math.nan, math.nan, 4, 4], {"patience": 2}, 4),
        ([math.nan] * 6, {"patience": 3}, 3),
        ([-math.inf, 5, 4, 3, 2, 1], {"patience": 2}, None),
        ([1, 2, 3, 3, 3, 9], {"patience": 2, "mode": "max"}, 5),
    ],
)
def test_early_stop_waits_for_its_patience(values, settings, stops_after):
    trainer, _ = fit(Script("val/loss", values), build("early_stop", **settings), epochs=6)
    assert trainer.state.epoch == (stops_after or 6)
    assert str(trainer.state.stop or "").startswith("early_stop: val/loss" if stops_after else "")


def test_early_stop_says_why():
    trainer, _ = fit(Script("val/loss", [5, 4, 4, 4]), build("early_stop", patience=2))
    assert (
        str(trainer.state.stop)
        == "early_stop: val/loss is best at 4 (step 6) and did not improve 2 times in a row"
    )
    trainer, _ = fit(Script("val/loss", [math.nan] * 4), build("early_stop", patience=2))
    assert (
        str(trainer.state.stop)
        == "early_stop: val/loss has never been finite and did not improve 2 times in a row"
    )


def test_which_way_is_better_comes_from_the_metric_itself():
    script = Script("val/correct", [0.1, 0.2, 0.3, 0.4])
    trainer, _ = fit(
        script, build("early_stop", monitor="val/correct", patience=1), metrics=[Correct()]
    )
    assert trainer.state.epoch == 4
    script = Script("val/correct", [0.4, 0.3, 0.2, 0.1])
    trainer, _ = fit(
        script, build("early_stop", monitor="val/correct", patience=1), metrics=[Correct()]
    )
    assert trainer.state.epoch == 2


@pytest.mark.parametrize("name", ["early_stop", "checkpoint"])
def test_a_metric_that_nobody_knows_is_an_error_before_the_first_step(tmp_path, name):
    with pytest.raises(
        SettingError, match="'val/corect' is better high or low; did you mean 'val/correct'"
    ):
        fit(build(name, monitor="val/corect"), metrics=[Correct()], folder=tmp_path)
    with pytest.raises(SettingError, match="nothing logs 'val/mine'"):
        fit(build(name, monitor="val/mine", mode="max"), folder=tmp_path)


def test_early_stop_needs_something_to_look_at():
    with pytest.raises(SettingError, match="monitor=val/loss: there is no validation split"):
        fit(build("early_stop"), val=None)
    trainer, _ = fit(
        build("early_stop", monitor="train/loss", patience=1, min_delta=0.01), val=None, lr=0.0
    )
    assert trainer.state.epoch == 2


def test_early_stop_goes_on_counting_after_a_resume():
    first, second = build("early_stop", patience=3), build("early_stop", patience=3)
    values = [5, 4, 4, 4, 4, 4]
    trainer, _ = fit(Script("val/loss", values), first, epochs=3)
    trainer, _ = fit(Script("val/loss", values), second, epochs=6, resume=trainer.state_dict())
    assert trainer.state.epoch == 5


# checkpoint


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


# gradients


def gradients_of(model, inputs, targets):
    nn.functional.mse_loss(model(inputs), targets).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradients_are_clipped_by_norm_and_then_by_value():
    expected = gradients_of(linear(), *SPLIT.tensors)
    norm = expected.norm()
    by_norm = expected * (0.01 / norm)
    by_both = by_norm.clamp(-0.004, 0.004)
    assert norm > 0.01
    assert not torch.allclose(by_norm, by_both)
    for settings, wanted in (({"norm": 0.01}, by_norm), ({"norm": 0.01, "value": 0.004}, by_both)):
        before, model = linear(), linear()
        _, record = fit(
            build("clip_gradients", **settings), epochs=1, model=model, lr=1.0, batch_size=12
        )
        change = torch.cat(
            [
                (b - a).flatten()
                for b, a in zip(before.parameters(), model.parameters(), strict=True)
            ]
        )
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-7)
        assert record.of("train/gradient_norm") == {1: pytest.approx(float(norm), rel=1e-5)}


def test_small_gradients_are_left_alone():
    clipped, _ = fit(build("clip_gradients", norm=1e6, value=1e6))
    free, _ = fit()
    assert torch.allclose(clipped.model.weight, free.model.weight, rtol=1e-6)


def test_clipping_nothing_is_refused():
    with pytest.raises(SettingError, match="set `norm` or `value`"):
        build("clip_gradients", norm=None)


@pytest.mark.parametrize(("log_every", "steps"), [("1epoch", [3, 6]), ("2steps", [2, 3, 4, 6])])
def test_the_gradient_norm_is_measured_on_logged_steps_only(log_every, steps):
    callback = build("gradient_norm")
    measured = []

    class Watch(Callback):
        def on_step_end(self, trainer):
            measured.extend([trainer.state.step] * (callback.measured is not None))

    _, record = fit(callback, Watch(), epochs=2, log_every=log_every)
    assert list(record.of("train/gradient_norm")) == measured == steps
    _, clipped = fit(build("clip_gradients", norm=1e9), epochs=2, log_every=log_every)
    assert record.of("train/gradient_norm") == pytest.approx(
        clipped.of("train/gradient_norm"), rel=1e-5
    )


# what is worth seeing


def test_every_group_s_learning_rate_is_logged():
    model = linear()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5, "name": "bias"}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    _, record = fit(
        build("learning_rate"),
        epochs=2,
        model=model,
        optimizer=optimizer,
        schedule=lambda step: 1 / (1 + step),
    )
    assert record.of("train/learning_rate") == pytest.approx({3: 0.5 / 3, 6: 0.5 / 6}), (
        "the largest"
    )
    assert record.of("train/learning_rate/0") == pytest.approx({3: 0.1 / 3, 6: 0.1 / 6})
    assert record.of("train/learning_rate/bias") == pytest.approx({3: 0.5 / 3, 6: 0.5 / 6})


def test_histograms_show_weights_and_gradients_from_the_start_to_the_end():
    _, record = fit(build("histograms"), epochs=2)
    tags = ["weights/weight", "weights/bias", "gradients/weight", "gradients/bias"]
    seen = [(step, tag) for step, tag, _ in record.histograms]
    assert seen == [(step, tag) for step in (0, 3) for tag in tags] + [(6, tag) for tag in tags[:2]]
    assert torch.equal(record.histograms[0][2], linear().weight.detach().flatten())


def test_the_timer_logs_each_epoch_and_stops_at_its_limit(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    trainer, record = fit(build("timer", limit="7s"), Wait(clock))
    assert (trainer.state.step, str(trainer.state.stop)) == (8, "timer: the limit of 7s is reached")
    assert record.of("train/seconds_per_epoch") == {3: 3.0, 6: 3.0}
    trainer, _ = fit(
        build("timer", limit="0.2min"), Wait(clock), epochs=9, resume=trainer.state_dict()
    )
    assert trainer.state.step == 13  # 12 seconds, of which the first part took 8


def test_a_limit_is_a_duration():
    for limit in ("3epochs", "soon"):
        with pytest.raises(FrameworkError, match="a duration like 90s"):
            build("timer", limit=limit)
