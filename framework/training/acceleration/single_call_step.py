"""A training step with its update as one call: what compiled and graphed steps share."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.contracts.task import Step
from framework.data.dataset import Batch
from framework.runtime.identity import identical, kept_tensors

from .callbacks import GradientCallbacks


class SingleCallStep:
    """Goes from a batch to the updated parameters in one call, if the step allows it.

    The call reads each learning rate from a tensor, since a number would become a part of it.

    Args:
        optimizer: the optimizer, whose state the call updates.
        callbacks: those that listen to `gradients`.

    Attributes:
        trainable: the parameters that require gradients.
        group_indices: for each of them, the index of its group in the optimizer.
        learning_rates: a tensor for each group.
        rate_dtype: of these tensors; None for that of the parameters.
    """

    rate_dtype: ClassVar[torch.dtype | None] = None

    def __init__(self, optimizer: Optimizer, callbacks: GradientCallbacks):
        self.optimizer, self.callbacks = optimizer, callbacks
        self.trainable: list[nn.Parameter] = []
        self.group_indices: list[int] = []
        self.learning_rates: list[Tensor] = []
        # The state of the optimizer that the call was prepared for, and its tensors:
        self.prepared_state: object = None
        self.prepared_tensors: list[Tensor] = []

    def __call__(self, batch: Batch) -> tuple[Step, bool]:
        """Return what the task made of the batch, and whether the parameters are updated."""
        raise NotImplementedError

    def is_supported(self) -> bool:
        """Return whether the optimizer, as it is set, can be updated in the call."""
        raise NotImplementedError

    def prepare_state(self) -> bool:
        """Prepare for the state of the optimizer; return whether it is complete.

        The first step of an optimizer creates the state, and cannot be a single call for that.
        """
        raise NotImplementedError

    def gradients_needed(self) -> bool:
        """Return whether a callback must see the gradients of this step."""
        return self.callbacks.need_gradients()

    def is_ready(self) -> bool:
        """Return whether this step can be a single call, and prepare it if so."""
        if not self.is_supported() or self.gradients_needed():
            return False
        trainable: list[nn.Parameter] = []
        indices: list[int] = []
        for index, group in enumerate(self.optimizer.param_groups):
            own = [p for p in group["params"] if p.requires_grad]
            trainable += own
            indices += [index] * len(own)
        if self._is_prepared_for(trainable, indices):
            return True
        self.prepared_state = None
        self.trainable, self.group_indices = trainable, indices
        if not self.prepare_state():
            return False
        self.learning_rates = self._make_learning_rates()
        self.prepared_state = self.optimizer.state
        self.prepared_tensors = kept_tensors(self.optimizer.state)
        return True

    def _is_prepared_for(self, trainable: list[nn.Parameter], indices: list[int]) -> bool:
        groups, state = self.optimizer.param_groups, self.optimizer.state
        if self.prepared_state is not state or len(self.learning_rates) != len(groups):
            return False
        if indices != self.group_indices or not identical(trainable, self.trainable):
            return False
        return identical(kept_tensors(state), self.prepared_tensors)

    def _make_learning_rates(self) -> list[Tensor]:
        rates = []
        for group in self.optimizer.param_groups:
            first = (group["params"] or self.trainable)[0]
            dtype = self.rate_dtype or first.dtype
            rates.append(torch.zeros((), device=first.device, dtype=dtype))
        return rates

    def set_learning_rates(self) -> None:
        """Put the learning rates of this step where the call reads them."""
        for rate, group in zip(self.learning_rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
