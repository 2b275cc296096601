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
from framework.runtime.dtensors import FUSED_OPTIMIZERS, is_dtensor


class FusedSelection:
    """Selects the fused implementation of an optimizer for a fit, and undoes that after it.

    It is selected for each group that leaves the choice to torch, if torch has it for the device
    and dtype of each parameter of the group.

    Args:
        optimizer: with its saved state if the fit resumes.
        user_settings: `optimizer_settings` of the fit: the settings of each group as the user has
            set them.
        allowed: whether to select anything.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        user_settings: Sequence[Mapping[str, Any]],
        allowed: bool,
    ):
        self.optimizer = optimizer
        self.groups = len(optimizer.param_groups)
        self.selected: set[int] = set()  # indices of groups
        self.default = optimizer.defaults.get("fused")
        # A subclass may have another `step`.
        if not allowed or not type(optimizer).__module__.startswith("torch.optim."):
            return
        for index, group in enumerate(optimizer.param_groups):
            by_user: Mapping[str, Any] = {}
            if index < len(user_settings):
                by_user = user_settings[index]["settings"]
            if leaves_choice(by_user) and supports_fused(type(optimizer), group):
                group["fused"] = True
                move_counters(optimizer, group, on_device=True)
                self.selected.add(index)
        if self.selected and self.default is None:
            optimizer.defaults["fused"] = True  # for groups that a callback adds

    def release(self) -> None:
        """Undo the selection, also for groups that were added with the default since."""
        if not self.selected:
            return
        for index, group in enumerate(self.optimizer.param_groups):
            added = index >= self.groups and self.default is None
            if (added or index in self.selected) and group.get("fused") is not None:
                group["fused"] = None
                move_counters(self.optimizer, group, on_device=False)
        self.optimizer.defaults["fused"] = self.default
        self.selected = set()


def leaves_choice(settings: Mapping[str, Any]) -> bool:
    """Return whether the settings of a group have neither `fused` nor `foreach`."""
    return settings.get("fused", False) is None and settings.get("foreach", False) is None


def supports_fused(kind: type[Optimizer], group: Mapping[str, Any]) -> bool:
    """Return whether the fused kernel of an optimizer serves a group with its settings."""
    if group.get("capturable") or group.get("differentiable"):
        return False
    if kind not in FUSED_OPTIMIZERS and any(map(is_dtensor, group["params"])):
        return False
    numbers = [group.get("lr"), *group.get("betas", ())]
    if any(isinstance(number, Tensor) for number in numbers):
        return False
    return "fused" in implementation(kind, group["params"])


def prepare_step(optimizer: Optimizer) -> None:
    """Prepare for `step()` of an optimizer with fused groups.

    A group with a sparse gradient gets `fused=False`, even if it was built with `fused=True`: no
    fused kernel takes sparse gradients. A gradient gets the strides of its parameter, since the
    kernels read both in the order of their memory.
    """
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                group["fused"] = False
                break
            if gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(gradient)


def move_counters(optimizer: Optimizer, group: Mapping[str, Any], on_device: bool) -> None:
    """Move the numbers of steps to where torch expects them.

    Args:
        optimizer: the optimizer.
        group: one of its groups.
        on_device: to the device of the parameter, as fused kernels do; otherwise to the CPU.
    """
    on_cpu = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        step = state.get("step")
        if not isinstance(step, Tensor):
            continue
        if on_device:
            state["step"] = step.to(parameter.device, torch.float32)
        else:
            state["step"] = step.to("cpu", on_cpu)
