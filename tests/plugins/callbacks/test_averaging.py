"""Averages of weights, against a plain loop, and through checkpoints and resumes."""

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

INPUTS = torch.linspace(-1, 1, 24).reshape(12, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))


def network():
    torch.manual_seed(1)
    first, last = nn.Linear(2, 2), nn.Linear(2, 2)
    last.weight = first.weight  # tied
    return nn.Sequential(first, nn.BatchNorm1d(2), nn.Dropout(0.2), last, nn.Linear(2, 1))


def fit(*callbacks, epochs=4, folder=None, resume=None, model=None):
    """Three steps an epoch."""
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
    expected = average(
        history.weights, settings.get("decay", 0.999), settings.get("warmup", True), every
    )
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
        expected, state = (
            average(history.weights[: step + 1], 0.9, True),
            training["callbacks"]["0:Ema"],
        )
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
        ema, saving = (
            build(),
            fw.callbacks.build("checkpoint", every="2steps", background=background),
        )
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
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True)
    )


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


# the mean of the last epochs' weights


def averaged_by_torch(history, epochs):
    """torch's own, over the weights at the ends of epochs, and batch norms measured anew by torch's `update_bn`."""
    theirs = AveragedModel(network())
    for epoch in epochs:
        model = network()
        model.load_state_dict(history.weights[3 * epoch], strict=False)
        theirs.update_parameters(model)
    theirs.module[2].p = 0.0
    update_bn(
        Loader(SPLIT, 4, shuffle=True).epoch(epochs[-1]), theirs
    )  # a mean of variances is one of these batches
    return theirs.module


def without_dropout():
    model = network()
    model[2].p = 0.0
    return model


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [({"start": 2}, [3, 4, 5, 6]), ({}, [5, 6]), ({"start": 0}, range(1, 7))],
)
def test_swa_is_torchs_with_its_batch_norms_measured_anew(settings, epochs):
    history = Collect()
    trainer = fit(history, swa(**settings), epochs=6, model=without_dropout())
    expected = averaged_by_torch(history, epochs)
    for name, tensor in expected.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(
                trainer.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name
            )
    assert trainer.model[1].num_batches_tracked == 6 * 3, "measuring is no training"
    assert trainer.model[1].momentum == 0.1


def test_swa_leaves_training_bitwise_as_it_is_and_is_what_is_evaluated():
    with_one, without = Collect(), Collect()
    trainer = fit(with_one, swa(start=1), epochs=6)
    fit(without, epochs=6)
    for a, b in zip(with_one.weights, without.weights, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert trainer.evaluate(SPLIT, name="val")["val/loss"] == pytest.approx(
        with_one.validated[-1]["val/loss"]
    )
    assert with_one.validated[0]["val/loss"] == without.validated[0]["val/loss"], (
        "before there is a mean"
    )
    assert with_one.validated[-1]["val/loss"] != without.validated[-1]["val/loss"]


def test_swa_can_leave_the_statistics_of_training():
    plain, trainer = fit(epochs=6), fit(swa(start=1, batches=0), epochs=6)
    assert torch.equal(trainer.model[1].running_mean, plain.model[1].running_mean)
    few = fit(swa(start=1, batches=1), epochs=6).model[1].running_mean
    assert not torch.equal(few, plain.model[1].running_mean)
    assert not torch.equal(few, fit(swa(start=1), epochs=6).model[1].running_mean)


@pytest.mark.parametrize("at", [2, 6, 8, 11, 18])
@pytest.mark.parametrize("first", ["swa", "checkpoint"])
def test_a_resumed_swa_is_bitwise_the_uninterrupted_one(tmp_path, at, first):
    def parts():
        mean, saving = (
            swa(start=2),
            fw.callbacks.build("checkpoint", every="2steps", background=False),
        )
        return [mean, saving] if first == "swa" else [saving, mean]

    def stop(trainer):
        trainer.state.stop = "enough" if trainer.state.step == at else None

    cutter = type("Stop", (Callback,), {"on_step_end": lambda self, trainer: stop(trainer)})()
    whole = fit(*parts(), epochs=6, folder=tmp_path / "whole")
    fit(*parts(), cutter, epochs=6, folder=tmp_path / "cut")
    model, training = load(newest(tmp_path / "cut" / "checkpoints")[0])
    assert training["counters"]["step"] == at
    again = fit(*parts(), epochs=6, folder=tmp_path / "cut", resume={"model": model} | training)
    ours, theirs = (load(newest(t.folder / "checkpoints")[0]) for t in (again, whole))
    assert ours[0].keys() == theirs[0].keys() == network().state_dict().keys()
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in theirs[0])
    weights = [each[1]["callbacks"]["0:Swa"]["weights"] for each in (ours, theirs)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert not torch.equal(weights[0]["1.running_mean"], ours[0]["1.running_mean"]), (
        "those of training"
    )


def test_swa_that_never_began_says_so():
    with pytest.warns(UserWarning, match="swa averaged nothing: .* epoch 5"):
        fit(swa(start=4), epochs=4)
    with pytest.raises(SettingError, match="swa: the number of epochs is unknown"):
        model = network()
        batches = (batch for batch in [SPLIT[:4]])
        Trainer(max_steps=1, callbacks=[swa()], device="cpu").fit(
            model, batches, task=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters())
        )


def test_swa_of_a_run_that_is_given_more_epochs_goes_on_averaging():
    state = fit(swa(), epochs=2).state_dict()
    longer = swa()
    fit(longer, epochs=8, resume=state)
    assert longer.updates == 7  # the ends of epochs 2 to 8
