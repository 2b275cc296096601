"""Momentum of parameters that an optimizer updates for the first time."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


def complete_momentum(optimizer: Optimizer) -> None:
    """Give a momentum to the parameters of a fused SGD that have none yet, where others have one.

    The fused SGD of torch raises a TypeError for such a group. It occurs when a parameter is
    unfrozen or added. As in the SGD that is not fused, the momentum after the first step of a
    parameter is its gradient.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if not group.get("fused") or not group["momentum"]:
            continue
        updated = [p for p in group["params"] if p.grad is not None]
        new = [p for p in updated if optimizer.state.get(p, {}).get("momentum_buffer") is None]
        if len(new) == len(updated):
            continue
        for parameter in new:
            optimizer.state[parameter]["momentum_buffer"] = first_momentum(parameter, group)


def first_momentum(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """Return the buffer that the first update turns into the gradient of the parameter."""
    buffer = torch.zeros_like(parameter)
    if group["dampening"]:
        assert parameter.grad is not None
        gradient = -parameter.grad if group["maximize"] else parameter.grad
        gradient = gradient + group["weight_decay"] * parameter
        buffer.add_(gradient, alpha=group["dampening"] / group["momentum"])
    return buffer
