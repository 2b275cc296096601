"""The strategy ddp: several processes give the result of one."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import framework as fw
from distributed_runs import run_in_processes
from fits import Record
from framework import Callback, Step, Task, TensorSplit, Trainer
from framework.errors import DataError, SettingError
from framework_plugins.layers.norms import FeatureBatchNorm

torch.manual_seed(7)
INPUTS = torch.randn(70, 6)
CLASSES = (INPUTS @ torch.randn(6, 3)).argmax(1)
SPLIT = TensorSplit(INPUTS, CLASSES)
VAL = TensorSplit(INPUTS[:21] + 0.1, CLASSES[:21])


def mlp(norm=None):
    torch.manual_seed(3)
    norms = [] if norm is None else [norm]
    return nn.Sequential(nn.Linear(6, 16), *norms, nn.Tanh(), nn.Linear(16, 3))


def trained(data=SPLIT, model=None, *, task=None, **settings):
    """Fit a model in this process; return its weights and the logged values."""
    model = mlp() if model is None else model
    fit = {"batch_size": 16, "val": VAL}
    fit |= {key: settings.pop(key) for key in ("batch_size", "val", "metrics") if key in settings}
    record = Record()
    strategy = fw.strategies.build("auto")
    # sqrt(eps) is large, since Adam would amplify rounding in gradients that are nearly 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=False)
    trainer = Trainer(
        **{"max_epochs": 3, "log_every": "1steps", "device": "cpu"} | settings,
        strategy=strategy,
        loggers=[record],
    )
    trainer.fit(model, data, task=task or nn.CrossEntropyLoss(), optimizer=optimizer, **fit)
    losses = {name: record.of(name) for name in ("train/loss", "val/loss")}
    return {"weights": dict(model.state_dict()), "losses": losses, "lines": record.lines}


class Center(nn.Module):
    """Subtracts a running mean, which is a buffer that a forward pass changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("mask", torch.ones(16, dtype=torch.bool))
        self.register_buffer("waves", torch.ones(3, dtype=torch.complex64), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean * self.mask


class HalfUsed(nn.Module):
    """Uses one layer for large first inputs only, and another one never."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.body = nn.Linear(6, 3)
        self.sometimes = nn.Linear(6, 3)
        self.never = nn.Linear(6, 3)

    def forward(self, x):
        outputs = self.body(x)
        large = x[:, 0] > 1.0
        if large.any():
            outputs = outputs + self.sometimes(x) * large[:, None]
        return outputs


def weighted_loss():
    return nn.CrossEntropyLoss(torch.tensor([0.2, 3.0, 1.0]), ignore_index=1)


def normal(kind, **settings):
    return lambda: mlp(kind(16, **settings))


class Bert(nn.Module):
    """Tokens of which some are no targets."""


CASES = {
    "plain": {},
    "accumulate": {"accumulate": 3},  # 5 batches: the last window and the last batch are smaller
    "one row more": {"data": TensorSplit(INPUTS[:65], CLASSES[:65])},  # a last batch of one row
    "small validation": {"val": TensorSplit(INPUTS[:1], CLASSES[:1])},
    "weights": {"task": weighted_loss, "accumulate": 2},
    "micro-batches": {"micro_batch": 3},
    "batch norm": {"model": normal(nn.BatchNorm1d)},
    "mean of all batches": {"model": normal(nn.BatchNorm1d, momentum=None, affine=False)},
    "feature norm": {"model": normal(FeatureBatchNorm)},
    "unused": {"model": HalfUsed},
    "sam": {"callbacks": ["sam"]},
    "sam, accumulate": {"callbacks": ["sam", "clip_gradients"], "accumulate": 2},
    "swa": {"callbacks": ["swa"], "model": normal(nn.BatchNorm1d)},
    "ema": {"callbacks": ["ema"]},
    "lookahead": {"callbacks": ["lookahead"]},
    "double": {"data": TensorSplit(INPUTS.double(), CLASSES), "model": lambda: mlp().double()},
    "a list": {"data": list(zip(INPUTS.split(9), CLASSES.split(9), strict=True))},
    "shuffled": {"data": "shuffled"},
    "iterable": {"data": "iterable"},
    "deterministic": {"deterministic": True},
    "profile": {"profile": True},
}
UNEQUAL = {"swa"}  # TODO


class Rows(IterableDataset):
    def __iter__(self):
        return iter(zip(INPUTS, CLASSES, strict=True))


def loader(kind):
    data = TensorDataset(INPUTS, CLASSES)
    if kind == "shuffled":
        return DataLoader(data, batch_size=9, shuffle=True)
    return DataLoader(Rows(), batch_size=9)


def result_of(name):
    settings = dict(CASES[name])
    if isinstance(settings.get("data"), str):
        settings["data"] = loader(settings["data"])
        settings["val"] = DataLoader(TensorDataset(INPUTS[:21], CLASSES[:21]), batch_size=5)
    if "model" in settings:
        settings["model"] = settings["model"]()
    if "task" in settings:
        settings["task"] = settings["task"]()
    if "callbacks" in settings:
        settings["callbacks"] = [fw.callbacks.build(part) for part in settings["callbacks"]]
    return trained(**settings)


def all_results():
    fw.discover()
    return {name: result_of(name) for name in CASES}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each case: of one process, and of two."""
    two = run_in_processes(all_results, 2, tmp_path_factory.mktemp("two"))
    return all_results(), *two


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_result_of_one(name, results):
    one, main, other = (each[name] for each in results)
    for key, expected in one["weights"].items():
        torch.testing.assert_close(main["weights"][key], expected, rtol=2e-5, atol=2e-6, msg=key)
        assert torch.equal(main["weights"][key], other["weights"][key]), key
    for tag, expected in one["losses"].items():
        assert main["losses"][tag] == pytest.approx(expected, rel=1e-5), tag
        assert len(expected) > 0
    assert not other["lines"], "only the main process logs"
