"""torch's fused optimizers, without what `step()` prepares anew each time (lists of tensors, by device and type).

The update is the very operation that `step()` ends in, on the same tensors: the same numbers, bit for bit. For six
small tensors it takes a third of the time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, optimizer as torch_optimizer

from framework.runtime.identity import identical, kept_tensors
from framework.runtime.momentum import complete_momentum

Update = Callable[[dict[str, Any], list[Tensor], list[Tensor], list[list[Tensor]]], None]


def adam(kernel: Callable[..., None]) -> Update:
    def update(group: dict[str, Any], params: list[Tensor], gradients: list[Tensor], kept: list[list[Tensor]]) -> None:
        averages, squares, steps = kept
        torch._foreach_add_(steps, 1)
        kernel(
            *(params, gradients, averages, squares, [], steps),
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    return update


def sgd(group: dict[str, Any], params: list[Tensor], gradients: list[Tensor], kept: list[list[Tensor]]) -> None:
    names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
    torch._fused_sgd_(params, gradients, kept[0], **{name: group[name] for name in names}, is_first_step=False)


UPDATES: dict[type, tuple[tuple[str, ...], Update | None]] = {
    Adam: (("exp_avg", "exp_avg_sq", "step"), adam(torch._fused_adam_)),
    AdamW: (("exp_avg", "exp_avg_sq", "step"), adam(torch._fused_adamw_)),
    SGD: (("momentum_buffer",), sgd),
}


class Lists(NamedTuple):
    """What the update of a group of parameters takes."""

    group: dict[str, Any]
    params: list[Tensor]
    names: tuple[str, ...]
    kept: list[list[Tensor]]


class FusedStep:
    """Calls the update of an optimizer; wherever that is not plainly the same as its `step()`, calls `step()`."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        unknown: tuple[tuple[str, ...], Update | None] = ((), None)
        self.names, self.update = UPDATES.get(type(optimizer), unknown)
        self.lists: list[Lists] | None = None
        self.made_for: Any = None
        self.kept: list[Tensor] = []  # all that the optimizer kept when the lists were made
        if self.update is None or not all(map(plain, optimizer.param_groups)) or not self._reproduces(self.update):
            self.update = None

    def __call__(self) -> None:
        lists = self._current()
        gradients = None if lists is None else [[p.grad for p in each.params] for each in lists]
        if lists is None or gradients is None or any(g is None for each in gradients for g in each):
            complete_momentum(self.optimizer)
            self.optimizer.step()
            return
        with torch.no_grad():
            for (group, params, _, kept), grads in zip(lists, gradients, strict=True):
                self.update(group, params, grads, kept)  # type: ignore[misc, arg-type]

    def _current(self) -> list[Lists] | None:
        """Return the lists for the optimizer as it is now; None where only its `step()` will do."""
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        if self.update is None or "step" in optimizer.__dict__ or has_hooks(optimizer):
            return None
        if self.lists is None or self.made_for is not optimizer.state or not self._fits(groups):
            made = [self._listed(group) for group in groups]
            self.lists = [each for each in made if each is not None] if all(made) else None
            self.made_for, self.kept = optimizer.state, kept_tensors(optimizer.state)
        return self.lists

    def _fits(self, groups: list[dict[str, Any]]) -> bool:
        assert self.lists is not None
        kept = kept_tensors(self.optimizer.state)
        if len(groups) != len(self.lists) or not identical(kept, self.kept):
            return False
        for group, lists in zip(groups, self.lists, strict=True):
            if group is not lists.group or not identical(group["params"], lists.params):
                return False
            if not plain(group) or self._kept_names(group) != lists.names:
                return False
        return True

    def _kept_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return () if group.get("momentum") == 0 else self.names

    def _listed(self, group: dict[str, Any]) -> Lists | None:
        """Return the lists of a group; None before its first step, and where the tensors are not all of one kind."""
        params, names = list(group["params"]), self._kept_names(group)
        states = [self.optimizer.state.get(p, {}) for p in params]
        whole = all(isinstance(state.get(name), Tensor) for state in states for name in names)
        if not whole or not plain(group) or len({(p.device, p.dtype) for p in params}) != 1:
            return None
        kept = [[state[name] for state in states] for name in names]
        return Lists(group, params, names, kept or [[]])

    def _reproduces(self, update: Update) -> bool:
        """Whether, on one number, the update does exactly what a `step()` does in this release of torch."""
        given = self.optimizer.param_groups[0]
        like = {"device": given["params"][0].device, "dtype": given["params"][0].dtype}
        ours, theirs = (nn.Parameter(torch.ones(1, **like)) for _ in range(2))
        try:
            make: Callable[..., Optimizer] = type(self.optimizer)
            pair = [make([parameter]) for parameter in (ours, theirs)]
            for optimizer in pair:
                optimizer.param_groups[0].update({name: value for name, value in given.items() if name != "params"})
                optimizer.param_groups[0]["params"][0].grad = torch.full((1,), 0.5, **like)
                optimizer.step()
            pair[1].step()
            kept = [[pair[0].state[ours][name]] for name in (() if given.get("momentum") == 0 else self.names)]
            with torch.no_grad():
                update(pair[0].param_groups[0], [ours], [torch.full((1,), 0.5, **like)], kept or [[]])
        except (RuntimeError, TypeError, ValueError, KeyError, NotImplementedError):
            return False
        return torch.equal(ours, theirs)


@torch.no_grad()
def plain(group: dict[str, Any]) -> bool:
    """Whether a group's settings leave the update as simple as it is here."""
    if not group.get("fused") or not group["params"]:
        return False
    if group.get("amsgrad") or group.get("capturable") or group.get("differentiable"):
        return False
    if isinstance(group["lr"], Tensor):
        return False
    return not any(isinstance(beta, Tensor) for beta in group.get("betas", ()))


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether somebody wants to be told of a step, or has a word in it (a scaler, `non_finite`)."""
    return may_leave_out(optimizer) or is_hooked(optimizer)


def may_leave_out(optimizer: Optimizer) -> bool:
    """Whether the device decides itself if an update is left out: where a number was not finite."""
    return getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None


def is_hooked(optimizer: Optimizer) -> bool:
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks)
