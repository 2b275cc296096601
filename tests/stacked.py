"""Trials that are trained together and alone, for several test files."""

import pytest
import torch
from torch import nn

import framework as fw
from framework import Trainer
from framework.contracts.optimizer import build_optimizer
from framework.data.dataset import Loader
from framework.tuning.vectorized.trainer import StackedTrainer

GENERATOR = torch.Generator().manual_seed(3)

INPUTS, CLASSES = torch.randn(90, 6, generator=GENERATOR, dtype=torch.float64), torch.arange(90) % 3

TRAIN, VAL = fw.TensorSplit(INPUTS[:70], CLASSES[:70]), fw.TensorSplit(INPUTS[70:], CLASSES[70:])

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
    def __init__(self):
        self.lines = []

    def scalars(self, values, *, step, epoch, wall_seconds):
        steady = {k: v for k, v in values.items() if "per_second" not in k}
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
    model = network(seed) if model is None else model
    recorder = Recorder()
    limits = {"max_epochs": 34, "log_every": "2steps", "seed": seed, "device": "cpu"}  # 102 steps
    trainer = Trainer(callbacks=callbacks, loggers=[recorder], **(limits | settings))
    trainer.metrics = [fw.metrics.build("accuracy")]
    trainer.recorder = recorder
    name, more = optimizer
    more = more | {"lr": more["lr"] * lr}
    fused = more.pop("fused", False)
    maker = fw.optimizers.maker(name, **more)
    made = build_optimizer(maker, model.parameters()) if fused else maker(list(model.parameters()))
    assert bool(made.defaults.get("fused")) == fused
    fit = {
        "model": model,
        "data": Loader(TRAIN, 32, 64, shuffle=True, seed=seed),
        "val": Loader(VAL, 32, 64),
        "task": task()
        if task
        else fw.tasks.build("classification", loss=loss or (lambda: nn.CrossEntropyLoss())),
        "optimizer": made,
        "schedule": schedule,
        "metrics": trainer.metrics,
        "batch_size": 32,
        "resume": None,
    }
    return trainer, fit


def alone(recipe):
    trainer, fit = recipe
    trainer.fit(**fit)
    return trainer


def together(*recipes):
    outcomes = {}
    StackedTrainer([t for t, _ in recipes], [fit for _, fit in recipes], outcomes.__setitem__).run()
    return [t for t, _ in recipes], [outcomes[number] for number in range(len(recipes))]


def assert_same(one, other, atol=1e-10):
    for (name, a), b in zip(
        one.model.state_dict().items(), other.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    mine, theirs = one.state_dict()["optimizer"]["state"], other.state_dict()["optimizer"]["state"]
    for number, state in theirs.items():
        for name, value in state.items():
            torch.testing.assert_close(mine[number][name], value, rtol=0, atol=max(atol, 1e-9))
    assert len(one.recorder.lines) == len(other.recorder.lines)
    for (step, epoch, values), (step_, epoch_, expected) in zip(
        one.recorder.lines, other.recorder.lines, strict=True
    ):
        assert (step, epoch) == (step_, epoch_)
        assert values == pytest.approx(expected, abs=1e-8)
