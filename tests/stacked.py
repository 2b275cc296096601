"""Trains trials as one stacked model and alone, for several test files."""

from functools import partial

import pytest
import torch
from torch import nn

import framework as fw
from framework import Trainer
from framework.data.dataset import Loader
from framework.tuning.vectorized.stacked_update import NotStackable
from framework.tuning.vectorized.trainer import StackedTrainer

GENERATOR = torch.Generator().manual_seed(3)
INPUTS = torch.randn(90, 6, generator=GENERATOR, dtype=torch.float64)
CLASSES = torch.arange(90) % 3
TRAIN = fw.TensorSplit(INPUTS[:70], CLASSES[:70])
VAL = fw.TensorSplit(INPUTS[70:], CLASSES[70:])

OPTIMIZERS = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("adam", {"lr": 0.01}),
    ("adamw", {"lr": 0.01}),
    ("adamw", {"lr": 0.01, "fused": True}),
    ("sgd", {"lr": 0.1, "momentum": 0.5, "fused": True}),
    ("rmsprop", {"lr": 0.01, "momentum": 0.5}),
    ("adagrad", {"lr": 0.1}),
    ("lion", {"lr": 0.001}),
]


class Recorder(fw.Logger):
    """Records logged values, without those that depend on time."""

    def __init__(self):
        self.lines = []

    def scalars(self, values, *, step, epoch, wall_seconds):
        steady = {name: value for name, value in values.items() if "per_second" not in name}
        self.lines.append((step, epoch, steady))


def network(seed=0, dropout=0.0, norm=False):
    torch.manual_seed(seed)
    layers = [
        nn.Linear(6, 9),
        nn.BatchNorm1d(9) if norm else nn.Identity(),
        nn.Tanh(),
        nn.Dropout(dropout),
    ]
    return nn.Sequential(*layers, nn.Linear(9, 3)).double()


def trial(
    seed=0,
    lr=1.0,
    optimizer=OPTIMIZERS[3],
    callbacks=(),
    model=None,
    loss=None,
    schedule=None,
    task=None,
    **settings,
):
    """Return a trainer and the arguments of its fit."""
    model = network(seed) if model is None else model
    recorder = Recorder()
    limits = {"max_epochs": 34, "log_every": "2steps", "seed": seed, "device": "cpu"}  # 102 steps
    trainer = Trainer(callbacks=callbacks, loggers=[recorder], **(limits | settings))
    trainer.metrics = [fw.metrics.build("accuracy")]
    trainer.recorder = recorder
    name, optimizer_settings = optimizer
    optimizer_settings = optimizer_settings | {"lr": optimizer_settings["lr"] * lr}
    is_fused = optimizer_settings.pop("fused", False)
    maker = fw.optimizers.maker(name, **optimizer_settings)
    if is_fused:
        built = maker(model.parameters())
    else:
        built = maker.entry.build({"params": list(model.parameters())}, maker.settings)
    assert bool(built.defaults.get("fused")) == is_fused
    if task is None:
        loss = loss or (lambda: nn.CrossEntropyLoss())
        task = partial(fw.tasks.build, "classification", loss=loss)
    fit = {
        "model": model,
        "data": Loader(TRAIN, 32, 64, shuffle=True, seed=seed),
        "val": Loader(VAL, 32, 64),
        "task": task(),
        "optimizer": built,
        "schedule": schedule,
        "metrics": trainer.metrics,
        "batch_size": 32,
        "resume": None,
    }
    return trainer, fit


def alone(recipe):
    """Train one trial; return its trainer."""
    trainer, fit = recipe
    trainer.fit(**fit)
    return trainer


def together(*recipes):
    """Train trials as one stacked model; return the trainers, and the error of each or None."""
    trainers, fits = zip(*recipes, strict=True)
    errors = {}
    StackedTrainer(trainers, fits, errors.__setitem__).run()
    return list(trainers), [errors[number] for number in range(len(recipes))]


def assert_same(one, other, atol=1e-10):
    """Compare the weights, optimizer states and logged values of two trainers."""
    expected_weights = other.model.state_dict()
    assert one.model.state_dict().keys() == expected_weights.keys()
    for name, weights in one.model.state_dict().items():
        torch.testing.assert_close(
            weights,
            expected_weights[name],
            rtol=0,
            atol=atol,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    states = one.state_dict()["optimizer"]["state"]
    for number, expected_state in other.state_dict()["optimizer"]["state"].items():
        for name, value in expected_state.items():
            torch.testing.assert_close(states[number][name], value, rtol=0, atol=max(atol, 1e-9))
    assert len(one.recorder.lines) == len(other.recorder.lines)
    for line, expected_line in zip(one.recorder.lines, other.recorder.lines, strict=True):
        assert line[:2] == expected_line[:2]
        assert line[2] == pytest.approx(expected_line[2], abs=1e-8)


def assert_stacked_as_alone(*recipes, make=trial, **common):
    """Train trials as one stacked model and alone, compare them, and return the stacked trainers.

    Args:
        recipes: the arguments of `make` for each trial, as dicts.
        make: returns a trainer and the arguments of its fit.
        common: arguments of `make` for all trials.
    """
    trainers, errors = together(*[make(**common, **recipe) for recipe in recipes])
    assert errors == [None] * len(recipes)
    for trainer, recipe in zip(trainers, recipes, strict=True):
        assert_same(trainer, alone(make(**common, **recipe)))
    return trainers


def assert_not_stackable(message, *recipes, make=trial, **common):
    """Check that trials cannot be stacked, for a reason (a regular expression)."""
    with pytest.raises(NotStackable, match=message):
        together(*[make(**common, **recipe) for recipe in recipes])
