"""Trial calls of a loss have no side effects: it trains as in a plain loop."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework import Callback, Task, Trainer
from framework.contracts.loss import Mean
from framework.errors import SettingError

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, -100, 1, 2, -100, -100, -100, 1, 0, 2, 2, 1])
CLASSES = torch.tensor([0, 1, 1, 2, 0, 2, 0, 1, 0, 2, 2, 1])


def batches(targets=CLASSES, size=4):
    return list(zip(X.split(size), targets.split(size), strict=True))


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


class Centred(nn.Module):
    """A loss that replaces its buffer, as the centring of some self-supervised methods."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(3))

    def forward(self, outputs, targets):
        self.center = self.center * 0.9 + outputs.detach().mean(0) * 0.1
        return F.cross_entropy(outputs - self.center, targets)


class Warming(nn.Module):
    """A loss that counts its calls."""

    calls = 0

    def forward(self, outputs, targets):
        self.calls += 1
        return F.cross_entropy(outputs, targets) * min(1.0, self.calls / 5)


def warming_function():
    calls = 0

    def loss(outputs, targets):
        nonlocal calls
        calls += 1
        return F.cross_entropy(outputs, targets) * min(1.0, calls / 5)

    return loss


def recording_function():
    history = []

    def loss(outputs, targets):
        history.append(float(outputs.detach().sum()))
        return F.cross_entropy(outputs, targets) * min(1.0, len(history) / 5)

    return loss


class Calling:
    """An object that is not a module."""

    calls = 0

    def __call__(self, outputs, targets):
        self.calls += 1
        return F.cross_entropy(outputs, targets) * min(1.0, self.calls / 5)


@pytest.mark.parametrize("make", [Centred, Warming, warming_function, recording_function, Calling])
def test_a_loss_with_state_trains_as_in_a_plain_loop(make):
    expected = network()
    loss = make()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.5)
    for _ in range(2):
        for inputs, targets in batches():
            optimizer.zero_grad()
            loss(expected(inputs), targets).backward()
            optimizer.step()
    model = network()
    trainer = Trainer(max_epochs=2, device="cpu")
    trainer.fit(
        model, batches(), task=make(), optimizer=torch.optim.SGD(model.parameters(), lr=0.5)
    )
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


VOCABULARY = 7


def viewed(outputs, targets):
    return F.cross_entropy(outputs.view(-1, VOCABULARY), targets.view(-1))


def transposed(outputs, targets):
    return F.cross_entropy(outputs.transpose(1, 2), targets)


def picked(outputs, targets):
    return F.cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten())


def taken(outputs, targets):
    return 0.5 * F.nll_loss(F.log_softmax(outputs.logits, -1).transpose(1, 2), targets)


class Inside(nn.Module):
    def forward(self, outputs, targets):
        return F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=-100)


@pytest.mark.parametrize(
    "loss", [viewed, transposed, picked, taken, Inside()], ids=lambda loss: type(loss).__name__
)
def test_the_mean_of_a_cross_entropy_is_over_the_targets_that_it_does_not_ignore(loss):
    targets = torch.tensor([[0, -100, 2], [1, 3, -100]])
    assert int(Mean.of(loss).count(loss, targets)) == 4


def test_a_mean_over_several_kinds_of_items_gives_a_warning():
    class Mixed(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            return super().forward(outputs, targets) + 0.1 * outputs.logsumexp(1).square().mean()

    with pytest.warns(UserWarning, match="give the loss a method `count"):
        Mean.of(Mixed(torch.tensor([1.0, 2.0, 50.0])))


def test_a_loss_of_pairs_is_not_taken_for_a_sum():
    def spread(outputs, targets):
        return torch.cdist(outputs, outputs).sum() / len(outputs)

    model = network()
    fit = Trainer(max_steps=1, device="cpu").fit
    fit(model, batches(), task=spread, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_copied_backbone_is_trained_in_the_next_fit():
    backbone = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def fit(model, *callbacks):
        trainer = Trainer(max_epochs=1, device="cpu", callbacks=callbacks)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer.fit(model, batches(), task=nn.CrossEntropyLoss(), optimizer=optimizer)

    fit(nn.Sequential(backbone, nn.Linear(4, 3)))
    copied = copy.deepcopy(backbone)
    assert not copied.training
    before = copied[1].running_mean.clone()
    fit(nn.Sequential(copied, nn.Linear(4, 3)))
    assert not torch.equal(copied[1].running_mean, before)


def test_a_callback_may_update_parameters_that_the_optimizer_does_not_hold():
    class Second(Callback):
        def on_step_end(self, trainer):
            self.optimizer.step()

    model = network()
    second = Second()
    second.optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    trainer = Trainer(max_epochs=1, device="cpu", callbacks=[second])
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    trainer.fit(model, batches(), task=nn.CrossEntropyLoss(), optimizer=optimizer)
    assert not torch.equal(model[0].weight, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_norm_in_eval_mode_trains_on_one_sample():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[1].eval()
    fit = Trainer(max_epochs=1, device="cpu").fit
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit(model, batches(size=1), task=nn.CrossEntropyLoss(), optimizer=optimizer)


class Own(Task):
    """A task with a parameter, or with a network that it trains itself."""

    def __init__(self, scale=None, critic=None):
        self.scale = scale
        self.critic = critic

    def step(self, model, batch):
        outputs = model(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        if self.scale is not None:
            loss = loss * self.scale.exp()
        if self.critic is not None:
            loss = loss - self.critic(outputs).mean()
        return fw.Step(loss, outputs, batch[1])


@pytest.mark.parametrize("size", [1, 4])
def test_a_parameter_of_a_task_is_an_error_and_a_network_of_it_gives_a_warning(size):
    def fit(task):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Trainer(max_steps=1, device="cpu").fit(
            model, batches(size=size), task=task, optimizer=optimizer
        )

    with pytest.raises(SettingError, match="only parameters of the model are trained"):
        fit(Own(scale=nn.Parameter(torch.zeros(()))))
    with pytest.warns(UserWarning, match="only parameters of the model are trained"):
        fit(Own(critic=nn.Linear(3, 1)))
