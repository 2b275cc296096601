"""Averages of weights, against a plain loop, and through checkpoints and resumes."""

import math

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, TensorSplit, Trainer
from framework.checkpoint import load, newest

INPUTS = torch.linspace(-1, 1, 24).reshape(12, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))


def network():
    torch.manual_seed(1)
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    last.weight = first.weight  # tied
    return nn.Sequential(first, nn.BatchNorm1d(2), nn.Dropout(0.2), last, nn.Linear(2, 1))


def fit(*callbacks, epochs=4, folder=None, resume=None):
    """Three steps an epoch."""
    model = network()
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, folder=folder, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trainer.fit(model, SPLIT, task=nn.MSELoss(), optimizer=optimizer, val=SPLIT, batch_size=4, resume=resume)
    return trainer


def build(**settings):
    return fw.callbacks.build("ema", **settings)


class Collect(Callback):
    """Keeps the weights after every step, and those that validations saw."""

    def __init__(self):
        self.weights, self.validated = [], []

    def on_fit_start(self, trainer):
        self.weights.append(copies(trainer.model))

    def on_step_end(self, trainer):
        self.weights.append(copies(trainer.model))

    def on_validation_end(self, trainer):
        self.validated.append(dict(trainer.state.metrics))


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def average(history, decay, warmup, every=1):
    mean = dict(history[0])
    for updates, weights in enumerate(history[every::every]):
        d = min(decay, (1 + updates) / (10 + updates)) if warmup else decay
        mean = {name: d * mean[name] + (1 - d) * weights[name] for name in mean}
    return mean


@pytest.mark.parametrize(
    ("settings", "every"),
    [
        ({"decay": 0.9, "warmup": False}, 1),
        ({"decay": 0.5}, 1),
        ({}, 1),
        ({"decay": 0.8, "warmup": False, "every": "5steps"}, 5),
        ({"decay": 0.8, "warmup": False, "every": "1epoch"}, 3),
    ],
)
def test_the_average_is_that_of_a_plain_loop(settings, every):
    history = Collect()
    trainer = fit(history, build(**settings))
    expected = average(history.weights, settings.get("decay", 0.999), settings.get("warmup", True), every)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-6)


def test_training_is_bitwise_the_same_with_and_without():
    with_one, without = Collect(), Collect()
    fit(build(), with_one)
    fit(without)
    for a, b in zip(with_one.weights, without.weights, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_validation_and_the_model_after_the_run_have_the_average():
    history = Collect()
    trainer = fit(build(decay=0.9), history)
    measured = trainer.evaluate(SPLIT, name="val")
    assert measured["val/loss"] == pytest.approx(history.validated[-1]["val/loss"], rel=1e-6)
    assert not torch.equal(trainer.model[4].weight, history.weights[-1]["4.weight"])


@pytest.mark.parametrize("first", ["ema", "checkpoint"])
def test_a_checkpoint_has_the_average_to_use_and_the_weights_to_go_on_with(tmp_path, first):
    history, ema = Collect(), build(decay=0.9)
    saving = fw.callbacks.build("checkpoint", every="1steps", keep=20)
    fit(history, *([ema, saving] if first == "ema" else [saving, ema]), folder=tmp_path)
    for step in (4, 6, 12):
        model, training = load(tmp_path / "checkpoints" / f"step-{step:08d}")
        expected, state = average(history.weights[: step + 1], 0.9, True), training["callbacks"]["0:Ema"]
        assert state["updates"] == step
        assert torch.equal(model["0.weight"], model["3.weight"])
        for name, weight in history.weights[step].items():
            torch.testing.assert_close(model[name], expected[name], rtol=1e-5, atol=1e-6)
            assert torch.equal(state["weights"][name], weight)
        fresh = network()
        fresh.load_state_dict(model)


@pytest.mark.parametrize("first", ["ema", "checkpoint"])
@pytest.mark.parametrize("at", [3, 4, 12])
@pytest.mark.parametrize("background", [True, False])
def test_a_resumed_average_is_bitwise_the_uninterrupted_one(tmp_path, first, at, background):
    class Stop(Callback):
        def on_step_end(self, trainer):
            if trainer.state.step == at:
                trainer.state.stop = "enough"

    def parts():
        ema, saving = build(), fw.callbacks.build("checkpoint", every="2steps", background=background)
        return [ema, saving] if first == "ema" else [saving, ema]

    whole = fit(*parts(), epochs=6, folder=tmp_path / "whole")
    fit(*parts(), Stop(), epochs=6, folder=tmp_path / "cut")
    model, training = load(newest(tmp_path / "cut" / "checkpoints")[0])
    assert training["counters"]["step"] == at
    again = fit(*parts(), epochs=6, folder=tmp_path / "cut", resume={"model": model} | training)
    ours, theirs = (load(newest(t.folder / "checkpoints")[0]) for t in (again, whole))
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in theirs[0])
    weights = [each[1]["callbacks"]["0:Ema"]["weights"] for each in (ours, theirs)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_what_the_trainer_gives_is_enough_to_go_on_without_a_checkpoint():
    whole, half = fit(build(), epochs=4), fit(build(), epochs=2)
    again = fit(build(), epochs=4, resume=half.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_a_failure_in_a_validation_leaves_the_weights_of_training():
    class Fail(Callback):
        def on_validation_start(self, trainer):
            if trainer.state.step == 6:
                raise ZeroDivisionError

    history, model = Collect(), []

    class Take(Callback):
        def on_close(self, trainer):
            model.append(copies(trainer.model))

    with pytest.raises(ZeroDivisionError):
        fit(history, build(), Fail(), Take())
    plain = Collect()
    fit(plain)
    assert all(torch.equal(model[0][name], plain.weights[6][name]) for name in model[0])


def test_a_rewind_brings_back_both_weights_and_average(tmp_path):
    """The first epoch's checkpoint holds 0.9-averages; a NaN at step 5 brings both back."""

    class Poison(Callback):
        def on_gradients(self, trainer):
            if trainer.state.step == 4:
                trainer.model[4].bias.grad.fill_(math.nan)

    seen = Collect()
    ema, policy = build(decay=0.9), fw.callbacks.build("non_finite", policy="rewind")
    saving = fw.callbacks.build("checkpoint", monitor=None, keep=9)
    fit(Poison(), policy, ema, saving, seen, epochs=2, folder=tmp_path)
    assert policy.skipped == 1
    after = seen.weights[5]  # step 5 made no update: it is the rewound state
    assert all(torch.equal(after[name], seen.weights[3][name]) for name in after)
    expected = average([*seen.weights[:4], *seen.weights[5:]], 0.9, True)
    model, _ = load(newest(tmp_path / "checkpoints")[0])
    for name in expected:
        torch.testing.assert_close(model[name], expected[name], rtol=1e-5, atol=1e-6)
