"""The update of torch's fused optimizers without the preparations of `step()`.

It calls the kernel that `step()` calls, with the same tensors. The results are equal bit for bit;
for six small tensors it takes a third of the time.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.runtime.identity import identical, kept_tensors
from framework.runtime.momentum import complete_momentum
from framework.runtime.torch_internals.fused_kernels import Kernel, fused_kernel
from framework.runtime.torch_internals.optimizer_hooks import has_step_hooks

from .fused_selection import prepare_step


class KernelInputs(NamedTuple):
    """The arguments of the kernel for a group of parameters, except their gradients."""

    group: dict[str, Any]
    parameters: list[Tensor]
    state_names: tuple[str, ...]
    state: list[list[Tensor]]


class FusedUpdate:
    """Updates the parameters of an optimizer.

    It calls the kernel of a fused optimizer if that equals `step()`. Otherwise it calls `step()`:
    in the first step, with hooks, and for a parameter without a gradient.

    Attributes:
        kernel: the kernel; None if `step()` must be called.
        state_names: the names of the state tensors that the kernel takes.
    """

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        found = fused_kernel(type(optimizer))
        self.kernel: Kernel | None = None
        self.state_names: tuple[str, ...] = ()
        if found is not None:
            self.state_names, self.kernel = found
        # The arguments of the kernel, and the state and tensors that they were made from:
        self.inputs: list[KernelInputs] | None = None
        self.inputs_state: Any = None
        self.inputs_tensors: list[Tensor] = []
        plain = all(is_plain(group) for group in optimizer.param_groups)
        if self.kernel is None or not plain or not self._reproduces_step(self.kernel):
            self.kernel = None

    def __call__(self) -> None:
        """Update the parameters, as `optimizer.step()` does."""
        inputs = self.current_inputs()
        gradients = None if inputs is None else gradients_of(inputs)
        if inputs is None or gradients is None or self.kernel is None:
            prepare_step(self.optimizer)
            complete_momentum(self.optimizer)
            self.optimizer.step()
            return
        with torch.no_grad():
            for each, own in zip(inputs, gradients, strict=True):
                self.kernel(each.group, each.parameters, own, each.state)

    def current_inputs(self) -> list[KernelInputs] | None:
        """Return the arguments of the kernel for this step; None if `step()` must be called."""
        optimizer = self.optimizer
        if self.kernel is None or "step" in optimizer.__dict__:  # `step` is wrapped
            return None
        if skips_on_device(optimizer) or has_step_hooks(optimizer):
            return None
        if not self._is_current():
            self.inputs = self._make_inputs()
            self.inputs_state = optimizer.state
            self.inputs_tensors = self._tensors()
        return self.inputs

    def _is_current(self) -> bool:
        """Return whether `inputs` still belong to the groups and the state of the optimizer."""
        groups = self.optimizer.param_groups
        state = self.optimizer.state
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
        all_inputs = []
        for group in self.optimizer.param_groups:
            inputs = self._inputs_of(group)
            if inputs is None:
                return None
            all_inputs.append(inputs)
        return all_inputs

    def _inputs_of(self, group: dict[str, Any]) -> KernelInputs | None:
        """Return the inputs for a group.

        None before its first step, and for tensors of several dtypes or devices.
        """
        parameters = list(group["params"])
        names = self.state_names_of(group)
        if not is_plain(group) or len({(p.device, p.dtype) for p in parameters}) != 1:
            return None
        states = [self.optimizer.state.get(p, {}) for p in parameters]
        for state in states:
            if not all(isinstance(state.get(name), Tensor) for name in names):
                return None
        tensors = []
        for name in names:
            of_all_parameters = [state[name] for state in states]
            tensors.append(of_all_parameters)
        return KernelInputs(group, parameters, names, tensors or [[]])

    def state_names_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the state tensors of the parameters of a group."""
        return () if group.get("momentum") == 0 else self.state_names

    def _reproduces_step(self, kernel: Kernel) -> bool:
        """Return whether the kernel equals a `step()` of this release of torch, on one number."""
        group = self.optimizer.param_groups[0]
        first = group["params"][0]
        like = {"device": first.device, "dtype": first.dtype}
        settings = {name: value for name, value in group.items() if name != "params"}
        kind: Any = type(self.optimizer)
        by_kernel = nn.Parameter(torch.ones(1, **like))
        by_step = nn.Parameter(torch.ones(1, **like))
        try:
            optimizers = []
            for parameter in (by_kernel, by_step):
                optimizer = kind([parameter])
                optimizer.param_groups[0].update(settings)
                parameter.grad = torch.full((1,), 0.5, **like)
                optimizer.step()
                optimizers.append(optimizer)
            optimizers[1].step()
            state = optimizers[0].state[by_kernel]
            tensors = [[state[name]] for name in self.state_names_of(group)]
            gradient = torch.full((1,), 0.5, **like)
            with torch.no_grad():
                kernel(optimizers[0].param_groups[0], [by_kernel], [gradient], tensors or [[]])
        except (RuntimeError, TypeError, ValueError, KeyError, NotImplementedError):
            return False
        return torch.equal(by_kernel, by_step)


def gradients_of(inputs: list[KernelInputs]) -> list[list[Tensor]] | None:
    """Return the gradients of each group; None if `prepare_step` is needed before the update."""
    groups = []
    for each in inputs:
        gradients = []
        for parameter in each.parameters:
            gradient = parameter.grad
            if gradient is None or gradient.is_sparse:
                return None
            if gradient.stride() != parameter.stride():
                return None
            gradients.append(gradient)
        groups.append(gradients)
    return groups


def is_plain(group: dict[str, Any]) -> bool:
    """Return whether the kernel supports all settings of a group."""
    if not group.get("fused") or not group["params"]:
        return False
    if group.get("amsgrad") or group.get("capturable") or group.get("differentiable"):
        return False
    beta1, beta2 = group.get("betas", (0.0, 0.0))
    tensors = isinstance(group["lr"], Tensor) or isinstance(beta1, Tensor)
    return not (tensors or isinstance(beta2, Tensor))


def skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether the kernel skips the update if a gradient is not finite.

    A gradient scaler and the callback `non_finite` set these attributes of fused optimizers.
    """
    if getattr(optimizer, "grad_scale", None) is not None:
        return True
    return getattr(optimizer, "found_inf", None) is not None
