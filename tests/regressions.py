"""Fits of a tiny regression that the tests of several callbacks share."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

import framework as fw
from framework import Callback, Logger, TensorSplit, Trainer

INPUTS = torch.linspace(-1, 1, 24).reshape(12, 2)
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True))


class Record(Logger):
    """Stores logged values and histograms."""

    def __init__(self):
        self.values: list[tuple[int, str, float]] = []
        self.histograms: list[tuple[int, str, torch.Tensor]] = []

    def scalars(self, values, *, step, epoch, wall_seconds):
        self.values += [(step, name, value) for name, value in values.items()]

    def histogram(self, tag, values, step):
        self.histograms.append((step, tag, values))

    def of(self, name):
        return {step: value for step, tag, value in self.values if tag == name}


@dataclass
class Script(Callback):
    """Logs scripted values of a metric, one per epoch, in place of the measured values."""

    name: str
    values: list[float]

    def on_validation_end(self, trainer):
        trainer.log({self.name: self.values[trainer.state.epoch - 1]})


class StopAt(Callback):
    """Ends the run after a step, and keeps a copy of the state of the trainer."""

    def __init__(self, step):
        self.step = step
        self.state = None

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            self.state = copy.deepcopy(trainer.state_dict())
            trainer.state.stop = "enough"


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
    """Fit with three steps per epoch; return (trainer, record)."""
    record = Record()
    model = model or linear()
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


def assert_same_weights(first, second):
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
