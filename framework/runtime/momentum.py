"""Momentum of parameters that an optimizer updates for the first time."""

import torch
from torch.optim import SGD, Optimizer


def complete_momentum(optimizer: Optimizer) -> None:
    """Give a momentum to the parameters that have none yet, where others have one.

    torch's fused SGD raises a TypeError for such a group, which comes about when a parameter is
    unfrozen or added. As in the SGD that is not fused, the momentum after the first step of a
    parameter is its gradient.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        if not group.get("fused") or not group["momentum"]:
            continue
        moved = [p for p in group["params"] if p.grad is not None]
        new = [p for p in moved if optimizer.state.get(p, {}).get("momentum_buffer") is None]
        if len(new) == len(moved):
            continue
        for p in new:
            buffer = torch.zeros_like(p)
            if group["dampening"]:
                gradient = -p.grad if group["maximize"] else p.grad
                gradient = gradient + group["weight_decay"] * p
                buffer.add_(gradient, alpha=group["dampening"] / group["momentum"])
            optimizer.state[p]["momentum_buffer"] = buffer
