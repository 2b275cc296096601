"""Pure updates equal `step()`, for one parameter and for stacked parameters of several trials."""

import pytest
import torch
from torch import nn

import framework as fw
from framework.contracts.pure_optimizer import PureOptimizer, pure_updates

fw.discover()

RECIPES = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("sgd", {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    ("adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("adam", {"lr": 0.01, "amsgrad": True, "betas": (0.5, 0.8)}),
    ("adamw", {"lr": 0.01, "weight_decay": 0.1}),
    ("rmsprop", {"lr": 0.01, "weight_decay": 0.1}),
    ("rmsprop", {"lr": 0.01, "momentum": 0.9, "centered": True, "alpha": 0.9}),
    ("adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    ("lion", {"lr": 0.01, "weight_decay": 0.1}),
]


def build(name, parameter, **settings):
    return fw.optimizers.build(name, [parameter], **settings)


def gradient(step, size=7):
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def after_one_step(name, settings, start):
    parameter = nn.Parameter(start.clone())
    optimizer = build(name, parameter, **settings)
    parameter.grad = gradient(0)
    optimizer.step()
    return parameter, optimizer


@pytest.mark.parametrize(("name", "settings"), RECIPES, ids=str)
def test_a_pure_update_equals_step(name, settings):
    start = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    parameter, optimizer = after_one_step(name, settings, start)
    update = pure_updates.find(optimizer)
    p = parameter.detach().clone()
    state = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    for step in range(1, 50):
        parameter.grad = gradient(step)
        optimizer.step()
        p, state = update(p, gradient(step), state, optimizer.param_groups[0])
        torch.testing.assert_close(p, parameter.detach(), rtol=0, atol=1e-12)
    assert state.keys() == optimizer.state[parameter].keys()
    for key, value in state.items():
        torch.testing.assert_close(value, optimizer.state[parameter][key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "settings"), RECIPES, ids=str)
def test_settings_may_be_tensors_with_a_value_for_each_row(name, settings):
    rates = [settings["lr"] * factor for factor in (0.5, 1.0, 2.0)]
    start = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    alone = [after_one_step(name, settings | {"lr": lr}, start) for lr in rates]
    update = pure_updates.find(alone[0][1])
    rows = torch.stack([p.detach() for p, _ in alone])
    state = {}
    for key in alone[0][1].state[alone[0][0]]:
        state[key] = rows_of([optimizer.state[parameter][key] for parameter, optimizer in alone])
    rate = torch.tensor(rates, dtype=torch.float64).unsqueeze(1)
    group = {**alone[0][1].param_groups[0], "lr": rate}
    for step in range(1, 20):
        rows, state = update(rows, gradient(step).expand(3, -1), state, group)
        for parameter, optimizer in alone:
            parameter.grad = gradient(step)
            optimizer.step()
    expected = torch.stack([parameter.detach() for parameter, _ in alone])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)


def rows_of(tensors):
    stacked = torch.stack(tensors)
    return stacked if stacked.ndim == 2 else stacked.unsqueeze(1)


def test_an_optimizer_of_a_user_is_a_class_with_an_update():
    class Signed(PureOptimizer):
        """p - lr * sign(g), and a count of the steps that increased each number."""

        kept = ("ups",)

        def __init__(self, params, lr=0.1):
            super().__init__(params, {"lr": lr})

        @staticmethod
        def update(p, g, state, settings):
            return p - settings["lr"] * g.sign(), {"ups": state["ups"] + (g < 0)}

    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Signed([parameter])
    for _ in range(3):
        loss = optimizer.step(lambda: parameter.grad.sum() if parameter.grad is not None else None)
        parameter.grad = torch.tensor([1.0, -1.0])
    assert loss == 0
    assert parameter.tolist() == pytest.approx([0.8, 2.2])
    assert optimizer.state[parameter]["ups"].tolist() == [0, 2]
    assert pure_updates.find(optimizer) is Signed.update


def test_some_optimizers_and_settings_have_no_pure_update():
    parameter = nn.Parameter(torch.ones(2, 2))
    assert pure_updates.find(torch.optim.SGD([parameter], lr=0.1, maximize=True)) is None
    muon = fw.optimizers.build("muon", [parameter, nn.Parameter(torch.ones(2))])
    assert pure_updates.find(muon) is None

    class Changed(torch.optim.AdamW):
        def step(self, closure=None):
            return None

    assert pure_updates.find(Changed([parameter])) is None
