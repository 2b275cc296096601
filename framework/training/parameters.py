"""The parameters of a model: those in the groups of an optimizer, and the others."""

from torch import nn
from torch.optim import Optimizer

from framework.runtime.identity import identical


class ModelParameters:
    """The parameters of a model and its optimizer, which callbacks may add and replace.

    Attributes:
        optimized: those in the groups of the optimizer, in order.
        others: those of the model that are in no group.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self.model = model
        self.optimizer = optimizer
        self.optimized: list[nn.Parameter] = []
        self.others: list[nn.Parameter] = []

    def refresh(self) -> None:
        """Update both lists if the groups of the optimizer have changed."""
        optimized: list[nn.Parameter] = []
        for group in self.optimizer.param_groups:
            optimized += group["params"]
        if identical(optimized, self.optimized):
            return
        self.optimized = optimized
        in_groups = set(optimized)
        self.others = [p for p in self.model.parameters() if p not in in_groups]

    def clear_other_gradients(self) -> None:
        """Delete the gradients of the other parameters.

        The next step does this when it begins: until then callbacks may use them.
        """
        for parameter in self.others:
            parameter.grad = None
