"""Small fits that several test files share."""

import inspect

import torch
from torch import nn

from framework import Callback, Data, Logger, TensorSplit, Trainer

torch.manual_seed(7)
X = torch.randn(70, 6)

Y = (X @ torch.randn(6, 3)).argmax(1)

SPLIT = TensorSplit(X, Y)

VAL = TensorSplit(X[:20] + 0.1, Y[:20])


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    )


def smooth_network():
    """Return a network without batch norm, which would amplify rounding in the bias before it."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3, fused=False
    ),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
}


class Record(Logger):
    """Records its calls, and the logged values as (step, values)."""

    def __init__(self):
        self.lines = []
        self.opened = []
        self.closed = 0

    def open(self, folder, step, metrics):
        self.opened.append((step, list(metrics)))

    def scalars(self, values, *, step, epoch, wall_seconds):
        self.lines.append((step, dict(values)))

    def close(self):
        self.closed += 1

    def of(self, name):
        return [values[name] for _, values in self.lines if name in values]

    def steps(self, name):
        return [step for step, values in self.lines if name in values]


class At(Callback):
    """Calls `do(trainer)` at the end of a step."""

    def __init__(self, step, do):
        self.step = step
        self.do = do

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            self.do(trainer)


def fit(
    data=SPLIT, *, model=None, optimizer="sgd", callbacks=(), resume=None, task=None, **settings
):
    """Fit a small network, and return (trainer, record).

    settings: arguments of `Trainer`; all others go to its `fit`.
    """
    trainer_settings = {"max_epochs": 3, "log_every": "1steps", "device": "cpu"}
    fit_settings = {"batch_size": 16}
    known = inspect.signature(Trainer).parameters
    for name, value in settings.items():
        (trainer_settings if name in known else fit_settings)[name] = value
    record = Record()
    model = model or network()
    optimizer = OPTIMIZERS[optimizer](model)
    task = task or nn.CrossEntropyLoss()
    trainer = Trainer(callbacks=callbacks, loggers=[record], **trainer_settings)
    trainer.fit(model, data, task=task, optimizer=optimizer, resume=resume, **fit_settings)
    return trainer, record


def same(one, two):
    """Return whether two models have equal states."""
    first = one.state_dict()
    second = two.state_dict()
    if list(first) != list(second):
        return False
    return all(torch.equal(first[name], second[name]) for name in first)


class Three(Data):
    """A data set with three splits."""

    def __init__(self):
        self.train = SPLIT
        self.val = VAL
        self.test = TensorSplit(X[:9], Y[:9])
        self.in_shape = (6,)
        self.out_shape = (3,)
        self.classes = "abc"
