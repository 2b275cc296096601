"""An optimizer's update as a function of tensors: for the compiler, and for many trials that are updated as one.

    class Lion(PureOptimizer):
        kept = ("momentum",)

        @staticmethod
        def update(p, g, state, settings): ...     # -> the new p, the new state

What torch's own optimizers do is written so too, beside their registration: `pure_updates.register(optim.SGD, sgd)`.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

State = Mapping[str, Tensor]
Settings = Mapping[str, Any]
PureUpdate = Callable[[Tensor, Tensor, State, Settings], tuple[Tensor, State]]
"""(parameter, gradient, state, settings) -> (new parameter, new state): each number from those in its own place.

The settings are a parameter group's. A float among them may as well be a tensor that broadcasts against the parameter
(a rate for each of many trials); what is zero, or a bool, is never one, so that it may be asked. No tensor is written.
"""


class PureOptimizer(Optimizer):
    """Base of optimizers of one's own that move each number by itself.

    Attributes:
        kept: names of the tensors that are kept for each parameter, of its shape; they begin as zeros.
    """

    kept: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def update(p: Tensor, g: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
        """Return the parameter and its state after a step (see `PureUpdate`)."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; returns the closure's loss, if there is one."""
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
                number, gradient, kept = as_real(p), as_real(p.grad), state
                if p.is_complex():
                    kept = {name: as_real(tensor) for name, tensor in state.items()}
                write_update(number, kept, self.update(number, gradient, kept, group))
        return loss


def as_real(tensor: Tensor) -> Tensor:
    """Return a view of complex numbers as pairs of reals; other tensors as they are."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def write_update(p: Tensor, state: State, new: tuple[Tensor, State]) -> None:
    """Put what an update gave into the tensors that it was made from."""
    p.copy_(new[0])
    for name, tensor in new[1].items():
        state[name].copy_(tensor)


def tensors_of(state: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The tensors of an optimizer's state of a parameter (SGD without momentum keeps a None)."""
    return {name: value for name, value in (state or {}).items() if isinstance(value, Tensor)}


class PureUpdates:
    """The updates of optimizers that do not bring their own, by class."""

    def __init__(self) -> None:
        self.of: dict[type, PureUpdate] = {}

    def register(self, optimizer: type[Optimizer], update: PureUpdate) -> None:
        """Say what an optimizer's `step()` does with a parameter that has been through its first step."""
        self.of[optimizer] = update

    def find(self, optimizer: Optimizer) -> PureUpdate | None:
        """Return the update of an optimizer as it is set, or None where only its `step()` will do."""
        special = ("maximize", "differentiable", "capturable")
        if any(group.get(name) for group in optimizer.param_groups for name in special):
            return None
        if any(p.is_complex() for group in optimizer.param_groups for p in group["params"]):
            return None  # `step()` squares the real and imaginary parts, not the numbers
        if isinstance(optimizer, PureOptimizer):
            return type(optimizer).update
        return self.of.get(type(optimizer))


pure_updates = PureUpdates()
