"""A whole training step as one call, from a batch to the new weights: what compiled and graphed ones share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.contracts.callback import Callback
from framework.contracts.task import Step
from framework.data.dataset import Batch
from framework.runtime.identity import identical, kept_tensors

if TYPE_CHECKING:
    from ..trainer import Trainer


class Whole:
    """Says when a step can be one call, and keeps each group's learning rate where that call reads it.

    Attributes:
        listening: the callbacks that want to be told of gradients.
        trained: the parameters, and `groups` the number of the group of each.
        rates: a tensor for each group, on its device; of its type, if `rate_type` says no other.
    """

    rate_type: ClassVar[torch.dtype | None] = None

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.listening: list[Callback] = []
        self.trained: list[nn.Parameter] = []
        self.groups: list[int] = []
        self.rates: list[Tensor] = []
        self.made_for: Any = None  # the optimizer's state, and `kept` its tensors
        self.kept: list[Tensor] = []

    def attach(self, trainer: Trainer, listening: list[Callback]) -> None:
        """Take note of whom the trainer tells of gradients."""
        self.trainer, self.listening = trainer, listening

    def wanted(self) -> bool:
        """Whether somebody must see the gradients of this step even though they are finite."""
        return any(each.needs_gradients(self.trainer) for each in self.listening)

    def ready(self) -> bool:
        """Whether this step can be one; not an optimizer's first, which makes the state that it keeps."""
        if not self.able() or self.wanted():
            return False
        groups, state = self.optimizer.param_groups, self.optimizer.state
        trained: list[nn.Parameter] = []
        numbers: list[int] = []
        for number, group in enumerate(groups):
            own = [p for p in group["params"] if p.requires_grad]
            trained += own
            numbers += [number] * len(own)
        if self._made_for(trained, numbers):
            return True
        self.made_for = None
        self.trained, self.groups = trained, numbers
        if not self.begun():
            return False
        self.rates = []
        for group in groups:
            first = (group["params"] or trained)[0]
            dtype = self.rate_type or first.dtype
            self.rates.append(torch.zeros((), device=first.device, dtype=dtype))
        self.made_for, self.kept = state, kept_tensors(state)
        return True

    def _made_for(self, trained: list[nn.Parameter], numbers: list[int]) -> bool:
        """Whether the call was made for these parameters, groups and tensors of the state."""
        groups, state = self.optimizer.param_groups, self.optimizer.state
        if self.made_for is not state or numbers != self.groups or len(self.rates) != len(groups):
            return False
        return identical(trained, self.trained) and identical(kept_tensors(state), self.kept)

    def able(self) -> bool:
        """Whether nothing else stands against it."""
        raise NotImplementedError

    def begun(self) -> bool:
        """Whether the optimizer has all the state of `trained`; what is made from that is made here."""
        raise NotImplementedError

    def set_rates(self) -> None:
        """Put the learning rates of this step where the call reads them."""
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])

    def __call__(self, batch: Batch) -> tuple[Step, bool]:
        """Return what the task made of the batch, and whether the update is done."""
        raise NotImplementedError
