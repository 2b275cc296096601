"""Infinity and NaN as first values of a monitored metric, and complex parameters."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

import framework as fw
from framework import Callback, Logger, TensorSplit, Trainer
from framework.errors import SettingError
from framework.runs.checkpoint import listed, load, read_manifest

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*it replaces the value that the trainer itself logs"
)

INF = math.inf
NAN = math.nan
INPUTS = torch.linspace(-1, 1, 24).reshape(12, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))
LOSS = nn.MSELoss()


class Script(Callback):
    """Replaces the values of validation by a list of values."""

    changes_training = False

    def __init__(self, values):
        self.values = values

    def on_validation_end(self, trainer):
        trainer.log({"val/loss": self.values[trainer.state.step - 1]})


def fit(*callbacks, steps, folder=None):
    torch.manual_seed(1)
    model = nn.Linear(2, 1)
    trainer = Trainer(
        max_steps=steps, validate_every="1steps", callbacks=callbacks, folder=folder, device="cpu"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer.fit(model, SPLIT, val=SPLIT, task=LOSS, optimizer=optimizer, batch_size=12)
    return trainer


# first values that are not finite

FIRST = [[INF], [NAN], [-INF], [INF, NAN, -INF]]


@pytest.mark.parametrize("first", FIRST, ids=str)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_plateau_starts_with_the_first_finite_value(first, mode):
    values = [3.0, 2.0, 1.0, 1.0, 1.0] if mode == "min" else [1.0, 2.0, 3.0, 3.0, 3.0]
    schedule = fw.schedulers.build("reduce_on_plateau", 99, mode=mode, patience=1, factor=0.5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = ReduceLROnPlateau(optimizer, mode=mode, patience=1, factor=0.5)
    for value in values:
        theirs.step(value)
    for value in first[:1] + values:
        schedule.observe({"val/loss": value})
    assert schedule(0) == optimizer.param_groups[0]["lr"] == 0.5
    assert schedule.best == values[-1]


def test_a_plateau_drops_an_infinite_best_value_of_an_older_checkpoint():
    schedule = fw.schedulers.build("reduce_on_plateau", 99, patience=0)
    schedule.load_state_dict({"scale": 1.0, "bad": 0, "cooling": 0, "best": INF})
    schedule.observe({"val/loss": 2.0})
    assert (schedule.best, schedule(0)) == (2.0, 1.0)


@pytest.mark.parametrize("first", FIRST, ids=str)
@pytest.mark.parametrize(
    ("mode", "min_delta"), [("min", 0.0), ("min", 0.5), ("max", 0.0), ("max", 0.5)]
)
def test_best_checkpoint_and_early_stop_start_with_the_first_finite_value(
    first, mode, min_delta, tmp_path
):
    sign = 1 if mode == "max" else -1
    values = [*first, 1.0 * sign, 2.0 * sign, 2.0 * sign, 2.0 * sign]
    stop = fw.callbacks.build("early_stop", mode=mode, min_delta=min_delta, patience=4)
    stop.patience = 2 if len(first) == 1 else 4
    checkpoint = fw.callbacks.build(
        "checkpoint", mode=mode, every="1steps", keep=9, background=False
    )
    trainer = fit(Script(values), stop, checkpoint, steps=len(values), folder=tmp_path)
    best = len(first) + 2
    assert (tmp_path / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    assert stop.best.ranked == [(2.0 * sign, best)]
    assert (trainer.state.stop is None) is (len(first) > 1)


# complex parameters


class Complex(nn.Module):
    """A linear map of complex weights; `pairs` holds them as pairs of reals instead."""

    def __init__(self, pairs):
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(2, 3, 2)
        self.weight = nn.Parameter(weight if pairs else torch.view_as_complex(weight))
        self.bias = nn.Parameter(torch.zeros(3))
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0)))

    def forward(self, x):
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        return ((x.to(weight.dtype) @ weight) * self.turn).abs() + self.bias


class Record(Logger):
    def __init__(self):
        self.lines = []
        self.histograms = []

    def scalars(self, values, *, step, epoch, wall_seconds):
        for name, value in values.items():
            if "second" not in name:
                self.lines.append((step, name, value))

    def histogram(self, tag, values, step):
        self.histograms.append((step, tag, values.tolist()))


TARGETS = torch.linspace(0, 2, 36).reshape(12, 3)


def fit_complex(pairs, optimizer, callbacks, folder=None, **settings):
    model = Complex(pairs)
    record = Record()
    split = TensorSplit(INPUTS, TARGETS)
    trainer = Trainer(
        max_epochs=2,
        log_every="1steps",
        callbacks=callbacks,
        loggers=[record],
        folder=folder,
        device="cpu",
    )
    built = fw.optimizers.build(optimizer, model.parameters(), lr=0.05, **settings)
    trainer.fit(model, split, val=split, task=LOSS, optimizer=built, batch_size=4)
    return model, record


CALLBACKS = [
    ("ema", {"decay": 0.5}),
    ("swa", {"start": 0}),
    ("lookahead", {"k": 2}),
    ("schedule_free", {}),
    ("sam", {}),
    ("noise_scale", {"every": "1steps", "parts": 2}),
    ("gradient_norm", {}),
    ("clip_gradients", {"norm": 0.1}),
    ("clip_gradients", {"norm": None, "value": 0.01}),
    ("histograms", {"every": "1steps"}),
    ("health", {"every": "2steps"}),
    ("non_finite", {"policy": "skip"}),
    ("freeze", {"patterns": ["bias"]}),
]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lion"])
@pytest.mark.parametrize(("name", "settings"), CALLBACKS)
def test_complex_weights_are_trained_like_pairs_of_reals(name, settings, optimizer):
    own = {}
    if name == "schedule_free" and optimizer != "sgd":
        own["betas"] = [0.0, 0.99]
    callback = fw.callbacks.build(name, **settings)
    model, record = fit_complex(False, optimizer, [callback], **own)
    callback = fw.callbacks.build(name, **settings)
    pairs, expected = fit_complex(True, optimizer, [callback], **own)
    torch.testing.assert_close(torch.view_as_real(model.weight.detach()), pairs.weight.detach())
    torch.testing.assert_close(model.bias.detach(), pairs.bias.detach())
    assert [line[:2] for line in record.lines] == [line[:2] for line in expected.lines]
    for one, other in zip(record.lines, expected.lines, strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-4, nan_ok=True)
    assert [line[:2] for line in record.histograms] == [line[:2] for line in expected.histograms]
    for one, other in zip(record.histograms, expected.histograms, strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-4, abs=1e-6)


def test_muon_refuses_complex_weights():
    with pytest.raises(SettingError, match="complex"):
        fw.optimizers.build("muon", Complex(False).parameters())


class Spoil(Callback):
    def on_gradients(self, trainer):
        trainer.model.weight.grad[0, 0] = complex(1.0, NAN)


def test_nan_in_an_imaginary_part_is_found():
    non_finite = fw.callbacks.build("non_finite", policy="skip")
    fit_complex(False, "sgd", [Spoil(), non_finite])
    assert non_finite.skipped == 6


def test_a_checkpoint_of_complex_weights_is_complete_and_names_weights_with_nan(tmp_path):
    saving = fw.callbacks.build("checkpoint", every="1epoch")
    model, _ = fit_complex(False, "adamw", [saving, fw.callbacks.build("ema")], tmp_path)
    last = listed(tmp_path / "checkpoints")[-1]
    assert torch.equal(load(last)[0]["weight"], model.weight)
    model.weight.data[0, 0] = complex(1.0, NAN)
    spoiled = fw.checkpoints.save(tmp_path / "spoiled", model.state_dict(), {}, 1)
    assert read_manifest(spoiled)["nan"] == ["weight"]
