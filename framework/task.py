"""The contract of a task: what one training step means, from a batch to a loss and to what metrics see."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from .data import Batch, Data, Target
from .kinds import Shape


class Step(NamedTuple):
    """What a task makes of a batch: the mean loss (a scalar with gradient), the outputs and the targets.

    values: other means over the same items, logged by their names beside the loss (the parts of it, say).
    """

    loss: Tensor
    outputs: Tensor
    targets: Tensor
    values: Mapping[str, Tensor] = MappingProxyType({})

    def detach(self) -> "Step":
        """Return it without the graph of its gradients."""
        values = {name: value.detach() for name, value in self.values.items()}
        return Step(self.loss.detach(), self.outputs.detach(), self.targets, values)


class Phase(NamedTuple):
    """A part of a training step with an update of its own.

    moves: patterns of the names of the parameters that it moves ("generator.*"); the others get no gradient in it.
    """

    name: str
    moves: Sequence[str]


class Task:
    """One step in four questions. `criterion` is the loss module, if the task has one."""

    criterion: nn.Module | None = None
    phases: Sequence[Phase] = ()
    """What a training step consists of, in this order, where one update of all parameters will not do."""

    def step(self, model: nn.Module, batch: Batch) -> Step:
        """Run the model on a batch (already on the model's device) and return the mean loss."""
        raise NotImplementedError

    def phase(self, name: str, model: nn.Module, batch: Batch) -> Step:
        """Do what `step` does, in the phase of that name; `step` itself is then for evaluation alone."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int | Tensor:
        """Return over how many items `step` averages the loss: by it, unequal batches are weighted exactly."""
        return len(batch[0])

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        """Return predictions for people: columns by name, each a tensor or list with one item a row."""
        return {"output": outputs}

    def check(self, data: Data) -> None:
        """Raise DataError when the data has not the targets that this task needs."""

    def targets_of(self, data: Data) -> tuple[Target, Shape]:
        """Return the kind of the targets that `step` gives, and the shape of an output of the model."""
        return data.target, tuple(data.out_shape)

    def check_model(self, model: nn.Module) -> None:
        """Raise BuildError when the model has not the parts that this task calls."""


class LossTask(Task):
    """The simplest task: a loss of (outputs, targets), as `nn.CrossEntropyLoss()` or any function."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]):
        self.loss = loss
        self.criterion = loss if isinstance(loss, nn.Module) else None

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs, targets = batch
        outputs = model(inputs)
        return Step(self.loss(outputs, targets), outputs, targets)
