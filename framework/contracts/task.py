"""The contract of a task, which computes the outputs and the loss of a batch.

class Autoencoder(Task):
    criterion = nn.MSELoss()

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs, _ = batch
        outputs = model(inputs)
        return Step(self.criterion(outputs, inputs), outputs, inputs)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from framework.data.dataset import Batch, Data, Target
from framework.errors import DataError
from framework.registry.kinds import Shape
from framework.runtime.batch import count_rows, named_parts
from framework.runtime.torch_internals.pytree import tree_map

from .alignment import call_aligned
from .fields import Field, Fields, Inputs, pair
from .loss import (
    DataDependentLoss,
    Mean,
    check_call,
    check_classes,
    check_first,
    check_scalar,
    without_graph,
)
from .loss_properties import describe_outputs, loss_name
from .loss_trials import trial_copy
from .strategy import Strategy


class Step(NamedTuple):
    """The result of a task for a batch.

    Attributes:
        loss: the mean loss, shape () with gradient.
        outputs: of the model, for the metrics.
        targets: in the form that the metrics take (see `Data.target`).
        values: other means over the same items, logged by their names next to the loss; for
            example the terms of a sum.
    """

    loss: Tensor
    outputs: Tensor
    targets: Tensor
    values: Mapping[str, Tensor] = MappingProxyType({})

    def detach(self) -> "Step":
        """Return the same values without their autograd graph."""
        values = {name: value.detach() for name, value in self.values.items()}
        return Step(self.loss.detach(), tree_map(without_graph, self.outputs), self.targets, values)


class Phase(NamedTuple):
    """A part of a training step with its own update, such as that of a generator.

    Attributes:
        name: the name, which `Task.phase` receives.
        moves: patterns of the names of the parameters that it updates, such as "generator.*". The
            other parameters get no gradient.
    """

    name: str
    moves: Sequence[str]


class Task:
    """Base of all tasks. Only `step` must be overridden.

    Attributes:
        criterion: the loss module, which is moved to the device; None without one.
        phases: the phases of a training step, in order; empty for one update of all parameters.
        splits_batches: whether the loss of a batch is the mean of the losses of its parts, so that
            `micro_batch` may split it. With several processes, `step` of a task that does not split
            them gets the rows of one process in training, and must use `strategy` to compare them
            with those of the others (`Strategy.gather_rows`); it gets whole batches in evaluation.
        strategy: the processes of the run, which the trainer sets.
        all_kept: whether it is known that the loss ignores no target of the current batches.
        fields: the fields of a batch that the model is called with, and that of the targets.
    """

    criterion: nn.Module | None = None
    phases: Sequence[Phase] = ()
    splits_batches: bool = True
    strategy: Strategy = Strategy()
    all_kept: bool = False
    fields: Fields = Fields()

    def step(self, model: nn.Module, batch: Batch) -> Step:
        """Return the mean loss, outputs and targets of a batch.

        Args:
            model: the model, or a compiled function that computes the same.
            batch: as the loader gives it, such as (inputs, targets), on the device of the model.
        """
        raise NotImplementedError

    def phase(self, name: str, model: nn.Module, batch: Batch) -> Step:
        """Return the result of `step` for one of the `phases`; `step` is then for evaluation."""
        raise NotImplementedError

    def count(self, batch: Batch) -> int | Tensor:
        """Return the number of items that the mean loss of `step` is over; by default the samples.

        Batches of unequal size are weighted by it. A batch of 0 items contributes nothing. A step
        without any item has gradients of 0, with which the optimizer makes an update.
        """
        return count_rows(batch)

    def model_outputs(self, model: nn.Module, batch: Batch) -> Any:
        """Return the outputs of the model for a batch whose targets may be missing.

        Predictions are made with it. By default the model is called with the `fields`; without
        them, with the first tensor of a tuple.
        """
        return self.fields.call(model, batch)

    def predict(self, outputs: Any) -> dict[str, Any]:
        """Return readable predictions.

        Args:
            outputs: of the model, shape (samples, ...), or a mapping of such outputs.

        Returns:
            Columns by name, each a tensor or a list with one item for each sample.
        """
        if isinstance(outputs, Mapping):
            return {str(name): part for name, part in outputs.items() if part is not None}
        return {"output": outputs}

    def exported(self, outputs: Tensor) -> dict[str, Tensor]:
        """Return the outputs of an exported model; by default the tensors of `predict`.

        Args:
            outputs: of the model, shape (samples, ...), in the unit of the targets.
        """
        columns = self.predict(outputs)
        tensors = {name: each for name, each in columns.items() if isinstance(each, Tensor)}
        return tensors or {"output": outputs}

    def check(self, data: Data) -> None:
        """Check that the data has the targets that this task needs.

        Raises:
            DataError: it has not.
        """

    def know_targets(self, targets: Sequence[Tensor] | None) -> None:
        """Receive all targets of the batches that follow, so that a task may set `all_kept`.

        Args:
            targets: a tensor for each split, or None if they are not in memory.
        """

    def check_first(self, step: Step) -> None:
        """Check the first step of a fit or an evaluation; the check may read the device.

        Raises:
            DataError: the outputs and targets do not fit the loss.
        """

    def targets_of(self, data: Data) -> tuple[Target, Shape]:
        """Return the kind of the targets that `step` returns, and the shape of an output.

        Args:
            data: the data set of the run.

        Returns:
            The kind (see `Data.target`), and the shape of the model's output for one sample.
        """
        return data.target, tuple(data.out_shape)

    def check_model(self, model: nn.Module) -> None:
        """Check that the model has the methods and modules that this task calls.

        Raises:
            BuildError: it has not.
        """


@runtime_checkable
class TextTask(Protocol):
    """A task whose model continues a text, for `framework predict --prompt`."""

    def generate(
        self,
        model: nn.Module,
        tokens: Tensor,
        context: int,
        **sampling: Any,
    ) -> list[int]:
        """Return the tokens that continue a text.

        Args:
            model: the model of the run.
            tokens: the text to continue, shape (length,).
            context: the maximum number of tokens that the model takes.
            sampling: settings of the sampling, such as `length` and `temperature`.
        """


@runtime_checkable
class GeneratorTask(Protocol):
    """A task whose model makes samples of noise, which `framework export` writes."""

    def generator(self, model: nn.Module) -> tuple[nn.Module, Shape]:
        """Return the module that makes samples, and the shape of the noise of one sample.

        The noise is drawn from a standard normal distribution.
        """


@runtime_checkable
class PictureTask(Protocol):
    """A task that shows outputs of its model as images, for the callback `pictures`."""

    def pictures(self, model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
        """Return images by tag; the tag "samples" is for generated ones.

        Args:
            model: the model of the run.
            inputs: shape (samples, *in_shape).

        Returns:
            Rows of images, each a tensor of the shape of the inputs.
        """


def inputs_and_targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the two tensors of a batch.

    Raises:
        DataError: the batch has more or fewer tensors, or is nested.
    """
    return pair(batch)


def check_tensor_output(model: nn.Module, outputs: Any) -> None:
    """Check that a model returns one tensor.

    Raises:
        DataError: it returns several tensors or another type.
    """
    if not isinstance(outputs, Tensor):
        raise DataError(
            f"the model {type(model).__name__} returns {describe_outputs(outputs)}, but this task "
            f"takes one tensor{output_advice(outputs)}"
        )


def output_advice(outputs: Any) -> str:
    """Return the advice to name a field of outputs, for a message; empty for other outputs."""
    parts = named_parts(outputs) or {}
    tensors = [name for name, part in parts.items() if isinstance(part, Tensor) and part.ndim]
    return f"; name one of them, such as task.output={tensors[0]}" if tensors else ""


class LossTask(Task):
    """The task of a loss of (outputs, targets), such as `nn.CrossEntropyLoss()` or a function.

    For losses of torch (modules and functions) the items of the mean are known: class weights,
    ignored targets, or all numbers of the targets. Targets are reshaped to the outputs and class
    indices are converted where that is safe. Another function is called with a few samples: if it
    calls `F.cross_entropy` with the targets, its mean is that of the cross entropy. Otherwise its
    mean must be over all numbers of the targets, or the function must have an attribute `count`, a
    function of the targets that returns the number of items.

    Args:
        loss: a function of (outputs, targets).
        inputs: the fields of a batch that the model is called with (see `Inputs`); None: the first
            tensor of (inputs, targets), or all fields but the target if it is named.
        target: the field with the targets.
        output: the field of the model's outputs that the loss and the metrics receive.
    """

    def __init__(
        self,
        loss: Callable[[Any, Tensor], Tensor],
        inputs: Inputs | None = None,
        target: Field | None = None,
        output: Field | None = None,
    ):
        self.fields = Fields(inputs, target, output)
        if type(self).step is LossTask.step:
            check_call(loss)
        self.loss = loss
        self.criterion = loss if isinstance(loss, nn.Module) else None
        self.mean = Mean.of(loss)
        # `check_first` cannot try a loss that may have side effects: each call is checked instead.
        self.checks_each_call = trial_copy(loss) is None

    def step(self, model: nn.Module, batch: Batch) -> Step:
        """Return the loss of the model's outputs and the targets."""
        targets = self.fields.targets(batch)
        outputs = self.fields.call(model, batch)
        targets = self.mean.fit(self.loss, outputs, targets)
        function = self.loss
        if self.checks_each_call and not torch.compiler.is_compiling():
            function = partial(call_aligned, f"the loss {loss_name(self.loss)}", self.loss)
        loss = self.mean.call(function, outputs, targets, self.all_kept)
        check_scalar(self.loss, loss)
        return Step(loss, outputs, self.mean.shown(targets, self.all_kept))

    def count(self, batch: Batch) -> int | Tensor:
        """Return the number of items that the mean of the loss is over."""
        if type(self).step is not LossTask.step and not self.fields.has_targets(batch):
            return count_rows(batch)
        return self.mean.count(self.loss, self.fields.targets(batch), self.all_kept)

    def know_targets(self, targets: Sequence[Tensor] | None) -> None:
        """Find out whether the loss ignores none of the targets."""
        self.all_kept = self.mean.none_ignored(targets)

    def check(self, data: Data) -> None:
        """Check class indices in memory, and let a loss that depends on the data read it."""
        if self.mean.form == "classes" and data.target == "class" and hasattr(data, "out_shape"):
            check_classes(data, self.mean.ignored, self.fields.known_targets)
        if isinstance(self.loss, DataDependentLoss):
            self.loss.learn(data)

    def check_first(self, step: Step) -> None:
        """Check that the loss is a mean, and that it broadcasts nothing along the wrong axis."""
        if not self.mean.certain:
            check_first(self.loss, step.outputs, step.targets)
