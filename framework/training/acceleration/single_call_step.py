"""A training step with its update as one call: the base of compiled and graphed steps."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from framework.contracts.task import Step
from framework.data.dataset import Batch
from framework.runtime.identity import identical, kept_tensors

from .callbacks import GradientCallbacks


class SingleCallStep:
    """Base of steps from a batch to the updated parameters in one call.

    The call reads the learning rates from tensors, since a number would become a constant in it.

    Args:
        optimizer: the optimizer, whose state the call updates.
        callbacks: those that listen to `gradients`.

    Attributes:
        trainable: the parameters that require gradients.
        group_indices: the index of the group of each of them.
        learning_rates: a tensor of shape () for each group.
        rate_dtype: the dtype of these tensors; None for that of the parameters.
    """

    rate_dtype: ClassVar[torch.dtype | None] = None

    def __init__(self, optimizer: Optimizer, callbacks: GradientCallbacks):
        self.optimizer = optimizer
        self.callbacks = callbacks
        self.trainable: list[nn.Parameter] = []
        self.group_indices: list[int] = []
        self.learning_rates: list[Tensor] = []
        # The state of the optimizer that the call is prepared for, and its tensors:
        self.prepared_state: object = None
        self.prepared_tensors: list[Tensor] = []

    def __call__(self, batch: Batch) -> tuple[Step, bool]:
        """Return the result of the task, and whether the parameters are updated."""
        raise NotImplementedError

    def is_supported(self) -> bool:
        """Return whether the optimizer, with its present settings, can be updated in the call."""
        raise NotImplementedError

    def prepare_state(self) -> bool:
        """Prepare for the state of the optimizer, and return whether it is complete.

        The first step of an optimizer creates its state, and therefore is not a single call.
        """
        raise NotImplementedError

    def gradients_needed(self) -> bool:
        """Return whether a callback needs the gradients of this step."""
        return self.callbacks.need_gradients()

    def is_ready(self) -> bool:
        """Prepare for this step, and return whether it can be a single call."""
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
        self.trainable = trainable
        self.group_indices = indices
        if not self.prepare_state():
            return False
        self.learning_rates = self._make_learning_rates()
        self.prepared_state = self.optimizer.state
        self.prepared_tensors = kept_tensors(self.optimizer.state)
        return True

    def _is_prepared_for(self, trainable: list[nn.Parameter], indices: list[int]) -> bool:
        groups = self.optimizer.param_groups
        state = self.optimizer.state
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
        """Copy the learning rates of this step into the tensors that the call reads."""
        for rate, group in zip(self.learning_rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
