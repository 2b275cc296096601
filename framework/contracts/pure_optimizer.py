"""Optimizers whose update is a pure function of tensors.

`torch.compile` traces such an update, and trials that train together share one. For example:

    class SignSGD(PureOptimizer):
        kept = ("momentum",)

        def __init__(self, params, lr: float = 1e-3):
            super().__init__(params, {"lr": lr})

        @staticmethod
        def update(p, g, state, settings):
            momentum = 0.9 * state["momentum"] + g
            return p - settings["lr"] * momentum.sign(), {"momentum": momentum}

`pure_updates.register(optim.SGD, sgd)` adds the pure update of an optimizer that is not a
`PureOptimizer`.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

State = Mapping[str, Tensor]
Settings = Mapping[str, Any]
PureUpdate = Callable[[Tensor, Tensor, State, Settings], tuple[Tensor, State]]
"""(parameter, gradient, state, settings) -> (new parameter, new state).

All tensors have the shape of the parameter, and each element of the result depends on the same
element of the arguments only. The settings are those of a parameter group. A float among them may
be a tensor that broadcasts against the parameter (a learning rate for each of several trials), but
bools and zeros are never tensors, so that `if settings["momentum"]` works. The update must not
write into its arguments.
"""

StepNumbers = Callable[[Any, Settings], Mapping[str, Any]]
"""(number of the step, settings) -> numbers that depend on nothing else, by name.

A pure update may find them among its settings. Otherwise it computes them from the number of steps
in its state, which is a tensor.
"""


class PureOptimizer(Optimizer):
    """Base of optimizers with a pure update. A subclass defines `update` and maybe `kept`.

    Attributes:
        kept: the names of the state tensors of each parameter, which have its shape and start at 0.
    """

    kept: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def update(p: Tensor, g: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
        """Return the parameter and its state after a step.

        Args:
            p: the parameter.
            g: its gradient, of the same shape.
            state: the tensors named in `kept`.
            settings: the settings of the parameter's group, such as "lr" (see `PureUpdate`).
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss and the gradients.

        Returns:
            The loss of the closure; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update({name: torch.zeros_like(p) for name in self.kept})
                real = as_real(p)
                kept = state
                if p.is_complex():
                    kept = {name: as_real(tensor) for name, tensor in state.items()}
                write_update(real, kept, self.update(real, as_real(p.grad), kept, group))
        return loss


def as_real(tensor: Tensor) -> Tensor:
    """Return a view of complex numbers as pairs of reals; other tensors as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def write_update(p: Tensor, state: State, new: tuple[Tensor, State]) -> None:
    """Copy the result of an update into the parameter and its state."""
    p.copy_(new[0])
    for name, tensor in new[1].items():
        state[name].copy_(tensor)


def tensors_of(state: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Return the tensors of the state of a parameter; SGD without momentum also keeps a None."""
    return {name: value for name, value in (state or {}).items() if isinstance(value, Tensor)}


class PureUpdates:
    """The pure updates of optimizers that are not a `PureOptimizer`, by class."""

    def __init__(self) -> None:
        self._updates: dict[type, PureUpdate] = {}
        self._step_numbers: dict[type, StepNumbers] = {}

    def register(
        self,
        optimizer: type[Optimizer],
        update: PureUpdate,
        step_numbers: StepNumbers | None = None,
    ) -> None:
        """Register the update that equals `step()` of an optimizer, after its first step.

        Args:
            optimizer: a class whose state has the number of steps as "step", if `step_numbers` is
                given.
            update: its pure update.
            step_numbers: computes numbers that the update may find among its settings. Without
                them, code compiled for a CPU computes them once for each vector of elements.
        """
        self._updates[optimizer] = update
        if step_numbers is not None:
            self._step_numbers[optimizer] = step_numbers

    def find(self, optimizer: Optimizer) -> PureUpdate | None:
        """Return the update of an optimizer with its settings, or None if it has no pure one."""
        for group in optimizer.param_groups:
            if any(group.get(name) for name in ("maximize", "differentiable", "capturable")):
                return None
            if any(p.is_complex() for p in group["params"]):
                return None  # `step()` squares real and imaginary parts, not the complex numbers
        if isinstance(optimizer, PureOptimizer):
            return type(optimizer).update
        return self._updates.get(type(optimizer))

    def step_numbers(self, optimizer: Optimizer) -> StepNumbers | None:
        """Return the function that computes the numbers of a step, if the update has one."""
        return self._step_numbers.get(type(optimizer))


pure_updates = PureUpdates()
