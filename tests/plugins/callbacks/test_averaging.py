"""Averages of weights, compared with plain loops, and through checkpoints and resumes."""

import math

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import framework as fw
from framework import Callback, TensorSplit, Trainer
from framework.data.dataset import Loader
from framework.errors import SettingError
from framework.runs.checkpoint import load, newest
from regressions import StopAt, assert_same_weights

INPUTS = torch.linspace(-1, 1, 24).reshape(12, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))


def network():
    torch.manual_seed(1)
    first = nn.Linear(2, 2)
    last = nn.Linear(2, 2)
    last.weight = first.weight  # tied
    return nn.Sequential(first, nn.BatchNorm1d(2), nn.Dropout(0.2), last, nn.Linear(2, 1))


def fit(*callbacks, epochs=4, folder=None, resume=None, model=None):
    """Fit with three steps per epoch."""
    model = network() if model is None else model
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, folder=folder, device="cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trainer.fit(
        model, SPLIT, task=nn.MSELoss(), optimizer=optimizer, val=SPLIT, batch_size=4, resume=resume
    )
    return trainer


def build(**settings):
    return fw.callbacks.build("ema", **settings)


def swa(**settings):
    return fw.callbacks.build("swa", **settings)


def in_order(average, checkpoint, first):
    """Return both callbacks, the one named `first` first."""
    return [checkpoint, average] if first == "checkpoint" else [average, checkpoint]


class Collect(Callback):
    """Stores the weights after every step, and the metrics of every validation."""

    def __init__(self):
        self.weights = []
        self.validated = []

    def on_fit_start(self, trainer):
        self.weights.append(copy_weights(trainer.model))

    def on_step_end(self, trainer):
        self.weights.append(copy_weights(trainer.model))

    def on_validation_end(self, trainer):
        self.validated.append(dict(trainer.state.metrics))


def copy_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def assert_same_history(collected, expected):
    for weights, expected_weights in zip(collected.weights, expected.weights, strict=True):
        assert_equal(weights, expected_weights)


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
def test_the_average_equals_that_of_a_plain_loop(settings, every):
    history = Collect()
    trainer = fit(history, build(**settings))
    decay = settings.get("decay", 0.999)
    expected = average(history.weights, decay, settings.get("warmup", True), every)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-6)


def test_an_average_does_not_change_training():
    with_average = Collect()
    without = Collect()
    fit(build(), with_average)
    fit(without)
    assert_same_history(with_average, without)


def test_validation_and_the_model_after_the_run_use_the_average():
    history = Collect()
    trainer = fit(build(decay=0.9), history)
    measured = trainer.evaluate(SPLIT, name="val")
    assert measured["val/loss"] == pytest.approx(history.validated[-1]["val/loss"], rel=1e-6)
    assert not torch.equal(trainer.model[4].weight, history.weights[-1]["4.weight"])


@pytest.mark.parametrize("first", ["ema", "checkpoint"])
def test_a_checkpoint_contains_the_average_and_the_weights_of_training(tmp_path, first):
    history = Collect()
    checkpoint = fw.callbacks.build("checkpoint", every="1steps", keep=20)
    fit(history, *in_order(build(decay=0.9), checkpoint, first), folder=tmp_path)
    for step in (4, 6, 12):
        model, training = load(tmp_path / "checkpoints" / f"step-{step:08d}")
        expected = average(history.weights[: step + 1], 0.9, True)
        state = training["callbacks"]["0:Ema"]
        assert state["updates"] == step
        assert torch.equal(model["0.weight"], model["3.weight"])
        for name, weight in history.weights[step].items():
            torch.testing.assert_close(model[name], expected[name], rtol=1e-5, atol=1e-6)
            assert torch.equal(state["weights"][name], weight)
        network().load_state_dict(model)


@pytest.mark.parametrize("first", ["ema", "checkpoint"])
@pytest.mark.parametrize("at", [3, 4, 12])
@pytest.mark.parametrize("background", [True, False])
def test_a_resumed_average_equals_the_uninterrupted_one(tmp_path, first, at, background):
    def parts():
        settings = {"every": "2steps", "background": background}
        return in_order(build(), fw.callbacks.build("checkpoint", **settings), first)

    check_resumed_run(parts, "0:Ema", at, tmp_path)


def check_resumed_run(parts, key, at, tmp_path):
    """Compare the last checkpoint of a run resumed at a step with that of an uninterrupted run.

    Return the model and the weights of training in this checkpoint.
    """
    folder = tmp_path / "interrupted"
    fit(*parts(), epochs=6, folder=tmp_path / "uninterrupted")
    fit(*parts(), StopAt(at), epochs=6, folder=folder)
    model, training = load(newest(folder / "checkpoints")[0])
    assert training["counters"]["step"] == at
    fit(*parts(), epochs=6, folder=folder, resume={"model": model} | training)
    expected_model, expected_training = load(newest(tmp_path / "uninterrupted/checkpoints")[0])
    model, training = load(newest(folder / "checkpoints")[0])
    weights = training["callbacks"][key]["weights"]
    assert_equal(model, expected_model)
    assert_equal(weights, expected_training["callbacks"][key]["weights"])
    return model, weights


def test_the_state_of_a_trainer_is_enough_to_resume_without_a_checkpoint():
    uninterrupted = fit(build(), epochs=4)
    half = fit(build(), epochs=2)
    resumed = fit(build(), epochs=4, resume=half.state_dict())
    assert_same_weights(resumed.model, uninterrupted.model)


def test_a_failure_in_a_validation_leaves_the_weights_of_training():
    class Fail(Callback):
        def on_validation_start(self, trainer):
            if trainer.state.step == 6:
                raise ZeroDivisionError

    left = []

    class KeepWeights(Callback):
        def on_close(self, trainer):
            left.append(copy_weights(trainer.model))

    with pytest.raises(ZeroDivisionError):
        fit(Collect(), build(), Fail(), KeepWeights())
    plain = Collect()
    fit(plain)
    assert_equal(left[0], plain.weights[6])


def test_a_rewind_restores_both_weights_and_average(tmp_path):
    class Poison(Callback):
        def on_gradients(self, trainer):
            if trainer.state.step == 4:
                trainer.model[4].bias.grad.fill_(math.nan)

    seen = Collect()
    policy = fw.callbacks.build("non_finite", policy="rewind")
    checkpoint = fw.callbacks.build("checkpoint", monitor=None, keep=9)
    fit(Poison(), policy, build(decay=0.9), checkpoint, seen, epochs=2, folder=tmp_path)
    assert policy.skipped == 1
    assert_equal(seen.weights[5], seen.weights[3])  # step 5 rewinds to the checkpoint of step 3
    expected = average([*seen.weights[:4], *seen.weights[5:]], 0.9, True)
    model, _ = load(newest(tmp_path / "checkpoints")[0])
    for name in expected:
        torch.testing.assert_close(model[name], expected[name], rtol=1e-5, atol=1e-6)


# swa


def averaged_by_torch(history, epochs):
    """Average the weights at the ends of epochs with torch, and measure batch norms with it."""
    averaged = AveragedModel(network())
    for epoch in epochs:
        model = network()
        model.load_state_dict(history.weights[3 * epoch], strict=False)
        averaged.update_parameters(model)
    averaged.module[2].p = 0.0
    batches = Loader(SPLIT, 4, shuffle=True).epoch(epochs[-1])  # the mean of variances needs these
    update_bn(batches, averaged)
    return averaged.module


def without_dropout():
    model = network()
    model[2].p = 0.0
    return model


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [({"start": 2}, [3, 4, 5, 6]), ({}, [5, 6]), ({"start": 0}, range(1, 7))],
)
def test_swa_equals_that_of_torch_with_measured_batch_norms(settings, epochs):
    history = Collect()
    trainer = fit(history, swa(**settings), epochs=6, model=without_dropout())
    state = trainer.model.state_dict()
    for name, tensor in averaged_by_torch(history, epochs).state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert trainer.model[1].num_batches_tracked == 6 * 3, "training batches only"
    assert trainer.model[1].momentum == 0.1


def test_swa_does_not_change_training_and_is_evaluated():
    averaged = Collect()
    plain = Collect()
    trainer = fit(averaged, swa(start=1), epochs=6)
    fit(plain, epochs=6)
    assert_same_history(averaged, plain)
    losses = [metrics["val/loss"] for metrics in averaged.validated]
    plain_losses = [metrics["val/loss"] for metrics in plain.validated]
    assert trainer.evaluate(SPLIT, name="val")["val/loss"] == pytest.approx(losses[-1])
    assert losses[0] == plain_losses[0], "before the first averaged epoch"
    assert losses[-1] != plain_losses[-1]


def test_swa_can_keep_the_statistics_of_training():
    plain = fit(epochs=6).model[1].running_mean
    kept = fit(swa(start=1, batches=0), epochs=6).model[1].running_mean
    of_one_batch = fit(swa(start=1, batches=1), epochs=6).model[1].running_mean
    of_all_batches = fit(swa(start=1), epochs=6).model[1].running_mean
    assert torch.equal(kept, plain)
    assert not torch.equal(of_one_batch, plain)
    assert not torch.equal(of_one_batch, of_all_batches)


@pytest.mark.parametrize("at", [2, 6, 8, 11, 18])
@pytest.mark.parametrize("first", ["swa", "checkpoint"])
def test_a_resumed_swa_equals_the_uninterrupted_one(tmp_path, at, first):
    def parts():
        settings = {"every": "2steps", "background": False}
        return in_order(swa(start=2), fw.callbacks.build("checkpoint", **settings), first)

    model, weights = check_resumed_run(parts, "0:Swa", at, tmp_path)
    assert model.keys() == network().state_dict().keys()
    assert not torch.equal(weights["1.running_mean"], model["1.running_mean"])


def test_swa_that_never_began_gives_a_warning():
    with pytest.warns(UserWarning, match="swa averaged no weights: .* epoch 5"):
        fit(swa(start=4), epochs=4)


def test_swa_of_a_run_of_unknown_length_needs_a_start():
    model = network()
    trainer = Trainer(max_steps=1, callbacks=[swa()], device="cpu")
    optimizer = torch.optim.SGD(model.parameters())
    batches = iter([SPLIT[:4]])
    with pytest.raises(SettingError, match="swa: the number of epochs is unknown"):
        trainer.fit(model, batches, task=nn.MSELoss(), optimizer=optimizer)


def test_swa_of_a_run_with_more_epochs_continues_to_average():
    state = fit(swa(), epochs=2).state_dict()
    longer = swa()
    fit(longer, epochs=8, resume=state)
    assert longer.updates == 7  # the ends of epochs 2 to 8
