"""The fused implementation of an optimizer of torch whose user has left the choice to torch.

`torch.optim.AdamW(parameters)` has `fused=None` and `foreach=None`. torch then never selects its
fused kernel: on a CPU it loops over the parameters, on an accelerator it uses `foreach`. The fused
kernel has the same state and the same formula; results differ by rounding. Gain: see the rows
"ours, in memory, AdamW()" of `scripts/bench api`, with and without fused=False.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from framework.contracts.optimizer import implementation

UserSettings = Sequence[Mapping[str, Any]]
"""`optimizer_settings` of a fit: the settings of each group as the user has set them."""


def select_fused(optimizer: Optimizer, user_settings: UserSettings) -> None:
    """Select the fused implementation of each group that leaves the choice to torch.

    It is selected if torch has it for the device and dtype of each parameter of the group.

    Args:
        optimizer: with its saved state if the fit resumes.
        user_settings: the settings of the user.
    """
    if not is_of_torch(optimizer):
        return
    for index, group in enumerate(optimizer.param_groups):
        if leaves_choice(user_settings, index) and supports_fused(type(optimizer), group):
            group["fused"] = True
            move_counters(optimizer, group, on_device=True)
            optimizer.defaults["fused"] = True  # also of groups that a callback adds


def release_fused(optimizer: Optimizer, user_settings: UserSettings) -> None:
    """Undo `select_fused`: after a fit the optimizer has the settings of the user."""
    if not is_of_torch(optimizer):
        return
    for index, group in enumerate(optimizer.param_groups):
        if leaves_choice(user_settings, index) and group.get("fused") is not None:
            group["fused"] = None
            move_counters(optimizer, group, on_device=False)
            optimizer.defaults["fused"] = None


def avoid_fused_for_sparse(optimizer: Optimizer) -> None:
    """Set `fused` of each group with a sparse gradient to False, as no fused kernel takes these.

    This also holds for groups that were built with `fused=True`; their first step would fail.
    """
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        gradients = [parameter.grad for parameter in group["params"]]
        if any(gradient is not None and gradient.is_sparse for gradient in gradients):
            group["fused"] = False


def is_of_torch(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is one of torch; a subclass may have another `step`."""
    return type(optimizer).__module__.startswith("torch.optim.")


def leaves_choice(user_settings: UserSettings, index: int) -> bool:
    """Return whether the user has set neither `fused` nor `foreach` of a group.

    Args:
        user_settings: the settings of the user.
        index: of the group. A callback may have added groups after those of the user.
    """
    settings = user_settings[min(index, len(user_settings) - 1)]["settings"]
    return settings.get("fused", False) is None and settings.get("foreach", False) is None


def supports_fused(kind: type[Optimizer], group: Mapping[str, Any]) -> bool:
    """Return whether the fused kernel of an optimizer serves a group with its settings."""
    if group.get("capturable") or group.get("differentiable"):
        return False
    numbers = [group.get("lr"), *group.get("betas", ())]
    if any(isinstance(number, Tensor) for number in numbers):
        return False
    return "fused" in implementation(kind, group["params"])


def move_counters(optimizer: Optimizer, group: Mapping[str, Any], on_device: bool) -> None:
    """Move the numbers of steps to where torch expects them.

    Args:
        optimizer: the optimizer.
        group: one of its groups.
        on_device: to the device of the parameter, as fused kernels do; otherwise to the CPU.
    """
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        step = state.get("step")
        if not isinstance(step, Tensor):
            continue
        if on_device:
            state["step"] = step.to(parameter.device, torch.float32)
        else:
            state["step"] = step.cpu()
