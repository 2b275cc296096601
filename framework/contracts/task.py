"""The contract of a task: what one training step means, from a batch to a loss and to what metrics see."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from framework.data.dataset import Batch, Data, Target
from framework.errors import DataError
from framework.registry.kinds import Shape
from framework.runtime.torch_internals.pytree import tree_map

from .alignment import call_aligned
from .loss import (
    DataDependentLoss,
    Mean,
    check_call,
    check_classes,
    check_first,
    check_scalar,
    describe_outputs,
    harmless,
    loss_name,
    without_graph,
)


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
        return Step(self.loss.detach(), tree_map(without_graph, self.outputs), self.targets, values)


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
    splits_batches: bool = True
    """Whether the loss of a batch is the mean of the losses of its parts (see `micro_batch`)."""
    all_kept: bool = False
    """Whether it is known of the batches being read that the loss ignores none of their targets."""

    def step(self, model: nn.Module, batch: Batch) -> Step:
        """Run the model on a batch (already on the model's device) and return the mean loss."""
        raise NotImplementedError

    def phase(self, name: str, model: nn.Module, batch: Batch) -> Step:
        """Do what `step` does, in the phase of that name; `step` itself is then for evaluation alone."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int | Tensor:
        """Return over how many items `step` averages the loss, which weights unequal batches exactly.

        A batch of 0 items adds nothing to a step or a mean. A step without any item has gradients of 0:
        the optimizer makes an update with them.
        """
        return len(batch[0])

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        """Return predictions for people: columns by name, each a tensor or list with one item a row."""
        return {"output": outputs}

    def check(self, data: Data) -> None:
        """Raise DataError when the data has not the targets that this task needs."""

    def know_targets(self, targets: Sequence[Tensor] | None) -> None:
        """Take note of all targets of the batches to come, or None where they are not in memory.

        A task may find out here, once, that none of them is ignored.
        """

    def check_first(self, step: Step) -> None:
        """Raise DataError for what shows in the first step of a fit or an evaluation.

        It may read the device.
        """

    def targets_of(self, data: Data) -> tuple[Target, Shape]:
        """Return the kind of the targets that `step` gives, and the shape of an output of the model."""
        return data.target, tuple(data.out_shape)

    def check_model(self, model: nn.Module) -> None:
        """Raise BuildError when the model has not the parts that this task calls."""


@runtime_checkable
class TextTask(Protocol):
    """A task whose model continues a text, as `framework predict --prompt` asks for."""

    def generate(
        self,
        model: nn.Module,
        tokens: Tensor,
        context: int,
        **sampling: Any,
    ) -> list[int]:
        """Return the tokens after some.

        Args:
            tokens: of the text to continue, shape (length,).
            context: the most tokens that the model takes.
            sampling: how to draw, such as `length` and `temperature`.
        """


@runtime_checkable
class PictureTask(Protocol):
    """A task that shows what its model makes, for the callback `pictures`."""

    def pictures(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        """Return rows of the inputs' shape, by tag; generated inputs by the tag "samples"."""


def inputs_and_targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the two tensors of a batch. Raises DataError when there are more or fewer."""
    if len(batch) != 2:
        raise DataError(
            f"a batch has {len(batch)} tensors; this task takes (inputs, targets): write a Task, whose "
            "`step` may take any number of tensors"
        )
    return batch[0], batch[1]


def check_tensor_output(model: nn.Module, outputs: Any) -> None:
    """Raise DataError when a model returns more, or something else, than one tensor."""
    if not isinstance(outputs, Tensor):
        name = type(model).__name__
        what = describe_outputs(outputs)
        raise DataError(f"the model {name} returns {what}: this task takes one tensor")


class LossTask(Task):
    """The simplest task: a loss of (outputs, targets), as `nn.CrossEntropyLoss()` or any function.

    For the losses of torch, as modules or functions, what the mean is over is known: class weights,
    ignored targets, the number of values. Targets are reshaped to the outputs, and class indices
    converted, where that is safe. Any other function is called once with a few samples: where it calls
    `F.cross_entropy` with the targets, its mean is that of the cross entropy. Otherwise its mean must be
    over all numbers of the targets, or it must have an attribute `count`: a function of the targets that
    returns how many items its mean is over.
    """

    def __init__(self, loss: Callable[[Any, Tensor], Tensor]):
        if type(self).step is LossTask.step:
            check_call(loss)
        self.loss = loss
        self.criterion = loss if isinstance(loss, nn.Module) else None
        self.mean = Mean.of(loss)
        self.watched = (
            harmless(loss) is None
        )  # no copy of it can be tried, so that its real calls are checked

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs, targets = inputs_and_targets(batch)
        outputs = model(inputs)
        targets = self.mean.fit(self.loss, outputs, targets)
        function = self.loss
        if self.watched and not torch.compiler.is_compiling():
            function = partial(call_aligned, f"the loss {loss_name(self.loss)}", self.loss)
        loss = self.mean.call(function, outputs, targets, self.all_kept)
        check_scalar(self.loss, loss)
        return Step(loss, outputs, self.mean.shown(targets, self.all_kept))

    def count(self, batch: Batch) -> int | Tensor:
        if type(self).step is not LossTask.step and len(batch) != 2:
            return len(batch[0])
        return self.mean.count(self.loss, inputs_and_targets(batch)[1], self.all_kept)

    def know_targets(self, targets: Sequence[Tensor] | None) -> None:
        self.all_kept = self.mean.none_ignored(targets)

    def check(self, data: Data) -> None:
        if self.mean.form == "classes" and data.target == "class" and hasattr(data, "out_shape"):
            check_classes(data, self.mean.ignored)
        if isinstance(self.loss, DataDependentLoss):
            self.loss.learn(data)

    def check_first(self, step: Step) -> None:
        if not self.mean.certain:
            check_first(self.loss, step.outputs, step.targets)
