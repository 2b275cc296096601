"""The parameters of a model that an optimizer holds, and the others."""

from torch import nn
from torch.optim import Optimizer

from framework.runtime.identity import identical


class Parameters:
    """Which parameters of a model an optimizer holds; a callback may add or replace some.

    Attributes:
        optimized: those in the groups of the optimizer, in order.
        others: those of the model that are in no group.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self.model, self.optimizer = model, optimizer
        self.optimized: list[nn.Parameter] = []
        self.others: list[nn.Parameter] = []

    def refresh(self) -> None:
        """Find the parameters anew if the groups of the optimizer have changed."""
        optimized: list[nn.Parameter] = []
        for group in self.optimizer.param_groups:
            optimized += group["params"]
        if identical(optimized, self.optimized):
            return
        self.optimized = optimized
        held = set(optimized)
        self.others = [p for p in self.model.parameters() if p not in held]

    def clear_other_gradients(self) -> None:
        """Delete the gradients of the other parameters.

        It is done when the next step begins: until then callbacks may use them.
        """
        for parameter in self.others:
            parameter.grad = None
