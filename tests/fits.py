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


OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3
    ),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
}


class Record(Logger):
    """Keeps what it is given: lines of (step, values), and whether it is open."""

    def __init__(self):
        self.lines, self.opened, self.closed = [], [], 0

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
    """Does something at the end of a step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            self.do(trainer)


def fit(
    data=SPLIT, *, model=None, optimizer="sgd", callbacks=(), resume=None, task=None, **settings
):
    """Returns (trainer, record). Names of `Trainer` go to it, the others to `fit`."""
    ours = inspect.signature(Trainer).parameters
    limits = {name: settings.pop(name) for name in list(settings) if name in ours}
    limits = {"max_epochs": 3, "log_every": "1steps", "device": "cpu"} | limits
    record, model = Record(), model or network()
    trainer = Trainer(callbacks=callbacks, loggers=[record], **limits)
    task, optimizer = task or nn.CrossEntropyLoss(), OPTIMIZERS[optimizer](model)
    settings = {"batch_size": 16} | settings
    trainer.fit(model, data, task=task, optimizer=optimizer, resume=resume, **settings)
    return trainer, record


def same(one, two):
    pairs = zip(one.state_dict().items(), two.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


class Three(Data):
    def __init__(self):
        self.train, self.val, self.test = SPLIT, VAL, TensorSplit(X[:9], Y[:9])
        self.in_shape, self.out_shape, self.classes = (6,), (3,), "abc"
