"""The update of torch's fused optimizers without what `step()` prepares anew each time.

It is the operation that `step()` ends in, on the same tensors: the same numbers, bit for bit, in a
third of the time for six small tensors.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.runtime.identity import identical, kept_tensors
from framework.runtime.momentum import complete_momentum
from framework.runtime.torch_internals.fused_kernels import Kernel, fused_kernel
from framework.runtime.torch_internals.optimizer_hooks import has_step_hooks


class KernelInputs(NamedTuple):
    """What the kernel takes for a group of parameters, except their gradients."""

    group: dict[str, Any]
    parameters: list[Tensor]
    state_names: tuple[str, ...]
    state: list[list[Tensor]]


class FusedUpdate:
    """Updates the parameters of an optimizer.

    It calls the kernel of a fused optimizer where that does exactly what `step()` does. Everywhere
    else it calls `step()`: in the first step, with hooks, for a parameter without a gradient.

    Attributes:
        kernel: None if only `step()` will do.
        state_names: the state that the kernel keeps of each parameter.
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        found = fused_kernel(type(optimizer))
        self.kernel: Kernel | None = None
        self.state_names: tuple[str, ...] = ()
        if found is not None:
            self.state_names, self.kernel = found
        # What the kernel is called with, and what that was made from:
        self.inputs: list[KernelInputs] | None = None
        self.inputs_state: Any = None
        self.inputs_tensors: list[Tensor] = []
        plain = all(is_plain(group) for group in optimizer.param_groups)
        if self.kernel is None or not plain or not self._reproduces_step(self.kernel):
            self.kernel = None

    def __call__(self) -> None:
        inputs = self.current_inputs()
        gradients = None if inputs is None else gradients_of(inputs)
        if inputs is None or gradients is None or self.kernel is None:
            complete_momentum(self.optimizer)
            self.optimizer.step()
            return
        with torch.no_grad():
            for each, own in zip(inputs, gradients, strict=True):
                self.kernel(each.group, each.parameters, own, each.state)

    def current_inputs(self) -> list[KernelInputs] | None:
        """Return what to call the kernel with now; None where only `step()` will do."""
        optimizer = self.optimizer
        if self.kernel is None or "step" in optimizer.__dict__:  # somebody wrapped it
            return None
        if skips_on_device(optimizer) or has_step_hooks(optimizer):
            return None
        if not self._is_current():
            self.inputs = self._make_inputs()
            self.inputs_state = optimizer.state
            self.inputs_tensors = self._tensors()
        return self.inputs

    def _is_current(self) -> bool:
        """Return whether `inputs` are those of the optimizer as it is."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        if self.inputs is None or self.inputs_state is not state:
            return False
        if len(groups) != len(self.inputs):
            return False
        for group, inputs in zip(groups, self.inputs, strict=True):
            if group is not inputs.group or len(group["params"]) != len(inputs.parameters):
                return False
            has_state = group.get("momentum") != 0
            if not is_plain(group) or has_state != bool(inputs.state_names):
                return False
        return identical(self._tensors(), self.inputs_tensors)

    def _tensors(self) -> list[Tensor]:
        """Return the tensors of the state, and the parameters of all groups."""
        tensors = kept_tensors(self.optimizer.state)
        for group in self.optimizer.param_groups:
            tensors += group["params"]
        return tensors

    def _make_inputs(self) -> list[KernelInputs] | None:
        made = []
        for group in self.optimizer.param_groups:
            inputs = self._inputs_of(group)
            if inputs is None:
                return None
            made.append(inputs)
        return made

    def _inputs_of(self, group: dict[str, Any]) -> KernelInputs | None:
        """Return the inputs for a group.

        None before its first step, and for tensors of several types or devices.
        """
        parameters = list(group["params"])
        names = self.state_names_of(group)
        if not is_plain(group) or len({(p.device, p.dtype) for p in parameters}) != 1:
            return None
        states = [self.optimizer.state.get(p, {}) for p in parameters]
        for state in states:
            if not all(isinstance(state.get(name), Tensor) for name in names):
                return None
        kept = [[state[name] for state in states] for name in names]
        return KernelInputs(group, parameters, names, kept or [[]])

    def state_names_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of what is kept of the parameters of a group."""
        return () if group.get("momentum") == 0 else self.state_names

    def _reproduces_step(self, kernel: Kernel) -> bool:
        """Return whether, on one number, the kernel does what a `step()` of this torch does."""
        given = self.optimizer.param_groups[0]
        like = {"device": given["params"][0].device, "dtype": given["params"][0].dtype}
        settings = {name: value for name, value in given.items() if name != "params"}
        kind: Any = type(self.optimizer)
        ours, theirs = nn.Parameter(torch.ones(1, **like)), nn.Parameter(torch.ones(1, **like))
        try:
            by_kernel, by_step = kind([ours]), kind([theirs])
            for optimizer, parameter in ((by_kernel, ours), (by_step, theirs)):
                optimizer.param_groups[0].update(settings)
                parameter.grad = torch.full((1,), 0.5, **like)
                optimizer.step()
            by_step.step()
            group = by_kernel.param_groups[0]
            kept = [[by_kernel.state[ours][name]] for name in self.state_names_of(given)]
            with torch.no_grad():
                kernel(group, [ours], [torch.full((1,), 0.5, **like)], kept or [[]])
        except (RuntimeError, TypeError, ValueError, KeyError, NotImplementedError):
            return False
        return torch.equal(ours, theirs)


def gradients_of(inputs: list[KernelInputs]) -> list[list[Tensor]] | None:
    """Return the gradients of each group; None if one is missing."""
    found = []
    for each in inputs:
        gradients = []
        for parameter in each.parameters:
            if parameter.grad is None:
                return None
            gradients.append(parameter.grad)
        found.append(gradients)
    return found


def is_plain(group: dict[str, Any]) -> bool:
    """Return whether the settings of a group are those of which the kernel takes account."""
    if not group.get("fused") or not group["params"]:
        return False
    if group.get("amsgrad") or group.get("capturable") or group.get("differentiable"):
        return False
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    tensors = isinstance(group["lr"], Tensor) or isinstance(beta1, Tensor)
    return not (tensors or isinstance(beta2, Tensor))


def skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether the update is left out on the device if a gradient is not finite.

    A gradient scaler and the callback `non_finite` set these attributes of fused optimizers.
    """
    if getattr(optimizer, "grad_scale", None) is not None:
        return True
    return getattr(optimizer, "found_inf", None) is not None
