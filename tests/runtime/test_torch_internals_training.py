"""Private names of torch in the training step give the results of the public API."""

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from framework.runtime.torch_internals import backward_engine, fused_kernels, optimizer_hooks
from framework.training.acceleration.fused_update import FusedUpdate


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def gradients_after(loss_of, monkeypatch, engine):
    with monkeypatch.context() as patch:
        if not engine:
            patch.setattr(backward_engine, "RUN_BACKWARD", None)
        model = network()
        for _ in range(2):  # the second pass adds to the gradients of the first
            backward_engine.run_backward(loss_of(model(torch.ones(4, 7))))
        return [parameter.grad for parameter in model.parameters()]


def test_torch_has_the_engine():
    """A control: without the engine the tests below would compare the fallback with itself."""
    assert backward_engine.RUN_BACKWARD is not None


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda outputs: outputs.square().mean(),
        lambda outputs: outputs.double().square().sum(),
        lambda outputs: outputs.square().mean().reshape(1),  # for backward() only
    ],
    ids=["scalar", "double", "one number"],
)
def test_the_engine_gives_the_gradients_of_backward(loss_of, monkeypatch):
    by_engine = gradients_after(loss_of, monkeypatch, engine=True)
    by_backward = gradients_after(loss_of, monkeypatch, engine=False)
    for ours, theirs in zip(by_engine, by_backward, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("engine", [True, False])
def test_a_loss_without_a_graph_gives_the_error_of_backward(monkeypatch, engine):
    if not engine:
        monkeypatch.setattr(backward_engine, "RUN_BACKWARD", None)
    with pytest.raises(RuntimeError, match="does not require grad"):
        backward_engine.run_backward(torch.zeros(()))


def test_a_gradient_that_a_hook_changed_in_place_is_not_used_again():
    for _ in range(2):
        number = torch.ones((), requires_grad=True)
        loss = number * 3
        loss.register_hook(lambda gradient: gradient.mul_(2))
        backward_engine.run_backward(loss)
        assert number.grad == 6


def fused(name, model):
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)


KERNELS = {"adam": "_fused_adam_", "adamw": "_fused_adamw_", "sgd": "_fused_sgd_"}


def weights_after(name, monkeypatch, missing=None):
    with monkeypatch.context() as patch:
        model = network()
        optimizer = fused(name, model)
        if missing is not None:
            patch.delattr(torch, missing)
        update = FusedUpdate(optimizer)
        patch.undo()
        assert (update.kernel is None) == (missing is not None)
        for step in range(5):
            optimizer.zero_grad()
            model(torch.full((4, 7), float(step))).square().sum().backward()
            update()
        return list(model.parameters())


@pytest.mark.parametrize("name", KERNELS)
def test_an_update_without_the_kernel_gives_the_same_numbers(name, monkeypatch):
    by_kernel = weights_after(name, monkeypatch)
    by_step = weights_after(name, monkeypatch, missing=KERNELS[name])
    for ours, theirs in zip(by_kernel, by_step, strict=True):
        assert torch.equal(ours, theirs)


def test_an_adam_update_without_the_sum_of_lists_gives_the_same_numbers(monkeypatch):
    by_kernel = weights_after("adamw", monkeypatch)
    by_step = weights_after("adamw", monkeypatch, missing="_foreach_add_")
    for ours, theirs in zip(by_kernel, by_step, strict=True):
        assert torch.equal(ours, theirs)


def test_a_kernel_that_rejects_its_arguments_is_not_used(monkeypatch):
    def reject(*args, **settings):
        raise TypeError("unexpected argument")

    monkeypatch.setattr(torch, "_fused_adamw_", reject)
    optimizer = torch.optim.AdamW(network().parameters(), fused=True)
    assert FusedUpdate(optimizer).kernel is None


def test_other_optimizers_have_no_kernel():
    class Own(torch.optim.SGD):
        pass

    for kind in (torch.optim.RMSprop, Own):
        assert fused_kernels.fused_kernel(kind) is None


def test_step_hooks_are_found():
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    assert not optimizer_hooks.has_step_hooks(optimizer)
    registrations = [
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        torch_optimizer.register_optimizer_step_pre_hook,
        torch_optimizer.register_optimizer_step_post_hook,
    ]
    for register in registrations:
        handle = register(lambda *args: None)
        assert optimizer_hooks.has_step_hooks(optimizer)
        handle.remove()
        assert not optimizer_hooks.has_step_hooks(optimizer)


def test_without_the_private_names_an_optimizer_counts_as_hooked(monkeypatch):
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    monkeypatch.delattr(torch_optimizer, "_global_optimizer_pre_hooks")
    assert optimizer_hooks.has_step_hooks(optimizer)
