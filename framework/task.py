"""The contract of a task: what one training step means, from a batch to a loss and to what metrics see."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .data import Batch, Data


class Step(NamedTuple):
    """What a task makes of a batch: the mean loss (a scalar with gradient), the outputs and the targets."""

    loss: Tensor
    outputs: Tensor
    targets: Tensor


class Task:
    """One step in four questions. `criterion` is the loss module, if the task has one."""

    criterion: nn.Module | None = None

    def step(self, model: nn.Module, batch: Batch) -> Step:
        """Run the model on a batch (already on the model's device) and return the mean loss."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int | Tensor:
        """Return over how many items `step` averages the loss: by it, unequal batches are weighted exactly."""
        return len(batch[0])

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        """Return predictions for people: columns by name, each a tensor or list with one item a row."""
        return {"output": outputs}

    def check(self, data: Data) -> None:
        """Raise DataError when the data has not the targets that this task needs."""


class LossTask(Task):
    """The simplest task: a loss of (outputs, targets), as `nn.CrossEntropyLoss()` or any function."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]):
        self.loss = loss
        self.criterion = loss if isinstance(loss, nn.Module) else None

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs, targets = batch
        outputs = model(inputs)
        return Step(self.loss(outputs, targets), outputs, targets)
