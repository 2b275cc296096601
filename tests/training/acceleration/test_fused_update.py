"""The update by the kernel of a fused optimizer equals `step()` bit for bit."""

import copy

import pytest
import torch
from torch import nn

from framework.runtime.torch_internals.fused_kernels import FusedKernel
from framework.training.acceleration.fused_update import FusedUpdate

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "adam": lambda params: torch.optim.Adam(
        params, lr=0.01, betas=(0.8, 0.99), weight_decay=0.1, fused=True
    ),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, fused=True),
    "momentum": lambda params: torch.optim.SGD(
        params, lr=0.1, momentum=0.9, nesterov=True, fused=True
    ),
    "dampening": lambda params: torch.optim.SGD(
        params, lr=0.1, momentum=0.9, dampening=0.3, fused=True
    ),
    "maximize": lambda params: torch.optim.AdamW(params, lr=0.01, maximize=True, fused=True),
}
OTHERS = {
    "not fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=False),
    "amsgrad": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True, fused=True),
    "no fused one": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "lr as a tensor": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01), fused=True),
}


class Twins:
    """Two equal models: one is updated by `FusedUpdate`, the other by `step()`."""

    def __init__(self, make):
        torch.manual_seed(0)
        self.ours = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
        self.theirs = copy.deepcopy(self.ours)
        self.optimizers = [make(list(model.parameters())) for model in (self.ours, self.theirs)]
        self.step = FusedUpdate(self.optimizers[0])

    def train(self, steps, without=()):
        for _ in range(steps):
            inputs = torch.randn(4, 7)
            for model in (self.ours, self.theirs):
                model.zero_grad()
                model(inputs).square().sum().backward()
                for name in without:
                    model.get_parameter(name).grad = None
            self.step()
            self.optimizers[1].step()

    def same(self):
        states = [optimizer.state_dict()["state"] for optimizer in self.optimizers]
        for ours, theirs in zip(states[0].values(), states[1].values(), strict=True):
            for name, value in ours.items():
                if not torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])):
                    return False
        pairs = zip(self.ours.parameters(), self.theirs.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    @property
    def direct(self):
        """Whether the next update calls the kernel."""
        return self.step.current_inputs() is not None


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_update_equals_step(make):
    twins = Twins(make)
    twins.train(20)
    assert twins.direct
    assert twins.same()


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_optimizers_are_updated_by_step(make):
    twins = Twins(make)
    twins.train(5)
    assert not twins.direct
    assert twins.same()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_settings_groups_and_states_may_change_at_any_time(make):
    twins = Twins(make)
    twins.train(3)
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["lr"] *= 0.5
    twins.train(3)
    saved = copy.deepcopy(twins.optimizers[1].state_dict())
    twins.train(2)
    for optimizer in twins.optimizers:
        optimizer.load_state_dict(copy.deepcopy(saved))
    twins.train(3)
    extra = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for model, parameter, optimizer in zip(
        (twins.ours, twins.theirs), extra, twins.optimizers, strict=True
    ):
        optimizer.add_param_group({"params": [parameter], "lr": 0.3})
        model[0].register_forward_hook(lambda module, given, output, p=parameter: output + p.sum())
    twins.train(4)
    assert twins.direct
    assert twins.same()
    assert torch.equal(*extra)
    assert extra[0][0] != 1


def test_a_parameter_without_a_gradient_is_not_updated():
    twins = Twins(OPTIMIZERS["adamw"])
    twins.train(3)
    before = twins.ours[2].weight.clone()
    twins.train(3, without=["2.weight"])
    assert torch.equal(twins.ours[2].weight, before)
    assert twins.same()


@pytest.mark.parametrize("where", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_are_called(where):
    twins = Twins(OPTIMIZERS["adamw"])
    seen = []
    twins.train(2)
    getattr(twins.optimizers[0], where)(lambda *arguments: seen.append(1))
    twins.train(3)
    assert len(seen) == 3
    assert twins.same()


def test_a_wrapped_step_is_called():
    twins = Twins(OPTIMIZERS["adamw"])
    # It wraps `step` to count its calls.
    scheduler = torch.optim.lr_scheduler.StepLR(twins.optimizers[0], 1)
    twins.train(2)
    assert not twins.direct
    assert twins.same()
    assert scheduler.last_epoch == 0


def test_a_kernel_with_another_result_is_not_used(monkeypatch):
    from framework.training.acceleration import fused_update

    def other(group, params, gradients, kept):
        params[0].add_(1)

    kernel = FusedKernel(("exp_avg", "exp_avg_sq", "step"), other)
    monkeypatch.setattr(fused_update, "fused_kernel", lambda kind: kernel)
    twins = Twins(OPTIMIZERS["adamw"])
    twins.train(4)
    assert not twins.direct
    assert twins.same()
