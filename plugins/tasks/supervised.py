"""Supervised tasks: classification, multilabel classification, regression."""

import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from framework import (
    Batch,
    Data,
    DataError,
    FrameworkError,
    Loss,
    Step,
    Target,
    Task,
    count_rows,
    tasks,
    user_code,
)
from framework.contracts.alignment import class_shape, probability_shape, same_shape
from framework.contracts.fields import Field, Fields, Inputs, field_of
from framework.contracts.loss import (
    IGNORED,
    DataDependentLoss,
    Mean,
    check_classes,
    check_first,
    check_scalar,
    class_weights,
    weights_of,
    without_ignored,
)
from framework.contracts.task import check_tensor_output

TARGET_NAMES = {"class": "classes", "labels": "labels", "value": "values", "none": "nothing"}
TASK_OF_TARGET = {"class": "classification", "labels": "multilabel", "value": "regression"}


class Supervised(Task):
    """Base of tasks that compare the outputs of the model with targets by a loss."""

    criterion: nn.Module
    target: Target
    row_size = 1  # numbers in the targets of a sample; known after `check`

    @cached_property
    def mean(self) -> Mean:
        """The items over which the loss averages."""
        return Mean.of(self.criterion)

    def step(self, model: nn.Module, batch: Batch) -> Step:
        targets = self.fields.targets(batch)
        outputs = self.fields.call(model, batch)
        check_tensor_output(model, outputs)
        targets = self.fit(outputs, targets)
        loss = self.mean.call(self.criterion, outputs, targets, self.all_kept)
        check_scalar(self.criterion, loss)
        return Step(loss, outputs, self.metric_targets(targets))

    def metric_targets(self, targets: Tensor) -> Tensor:
        """Return the targets for metrics."""
        return targets

    def count(self, batch: Batch) -> int | Tensor:
        """Return the number of items over which the loss averages."""
        targets = self.fields.targets(batch)
        number = self.mean.count(self.criterion, targets, self.all_kept)
        if self.row_size == 1 or self.mean.items != "targets":
            return number
        if number % self.row_size:
            return number / self.row_size
        return number // self.row_size

    def know_targets(self, targets: Sequence[Tensor] | None) -> None:
        self.all_kept = self.mean.none_ignored(targets)

    def check_first(self, step: Step) -> None:
        if not self.mean.certain:
            check_first(self.criterion, step.outputs, step.targets)

    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the targets in shape and type of the loss.

        Raises:
            DataError: the targets do not fit the loss.
        """
        return same_shape(outputs, targets if targets.is_floating_point() else targets.float())

    def check(self, data: Data) -> None:
        if data.target != self.target:
            advice = "choose other data"
            if data.target in TASK_OF_TARGET:
                advice = f"task={TASK_OF_TARGET[data.target]}"
            raise DataError(
                f"data {type(data).__name__} has {TARGET_NAMES[data.target]} as targets; "
                f"{TASK_OF_TARGET[self.target]} needs {TARGET_NAMES[self.target]}: {advice}"
            )
        if self.target != "class":
            self.row_size = math.prod(data.out_shape)
        if isinstance(self.criterion, DataDependentLoss):
            self.criterion.learn(data)
        self.try_loss(data.out_shape)
        self.check_mean(data.out_shape)

    def check_mean(self, out_shape: Sequence[int]) -> None:
        """Raise DataError if the loss is a sum over the samples."""
        if self.mean.certain:
            return
        outputs, targets = self.example(4, out_shape)
        check_first(self.criterion, outputs + 0.5, targets)  # a loss of zeros may be 0

    def example(self, rows: int, out_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return made-up outputs and targets of a batch, on the device of the loss."""
        buffer = next(self.criterion.buffers(), torch.empty(0))
        outputs = torch.zeros(rows, *out_shape, device=buffer.device)
        targets = torch.zeros_like(outputs)
        if self.target == "class":
            targets = targets[:, 0].long()
        return outputs, targets

    def try_loss(self, out_shape: Sequence[int]) -> None:
        """Raise DataError if the loss fails on outputs and targets of these shapes and types."""
        rows = 3 if out_shape[0] == 2 else 2  # unequal to the classes: no shape fits by accident
        outputs, targets = self.example(rows, out_shape)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = self.criterion(outputs, targets)
        except FrameworkError:
            raise
        except Exception as error:
            raise self._loss_error(error, outputs, targets) from error
        check_scalar(self.criterion, loss)

    def _loss_error(self, error: Exception, outputs: Tensor, targets: Tensor) -> DataError:
        name = type(self.criterion).__name__
        if user_code.user_place(error) is None:
            kind = TARGET_NAMES[self.target]
            shape = tuple(outputs.shape[1:])
            return DataError(
                f"the loss {name} cannot take {kind} with outputs of shape {shape}:"
                f" {user_code.text_of(error)}"
            )
        return DataError(
            f"{user_code.describe(error)}, while computing the loss {name} of outputs of shape"
            f" {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}"
        )


@tasks.register("classification")
class Classification(Supervised):
    """Predicts one class for each sample: outputs are logits (batch, classes).

    Targets are indices (batch,). They may also be class probabilities (batch, classes), as after
    mixing samples; metrics then get the most likely class.

    Args:
        loss: of logits and class indices.
        inputs: the fields of a batch that the model is called with. One name, index in a tuple or
            path such as image.pixels is the only argument of the model. In a list, names are
            keyword arguments. {argument: field} gives fields other names. null: the inputs of
            (inputs, targets), or all fields with tensors but the target.
        target: the field with the targets; null: the targets of (inputs, targets).
        output: the field of the model's outputs that has the logits; null if the model returns one
            tensor.
    """

    target = "class"

    def __init__(
        self,
        loss: Loss = "cross_entropy",
        inputs: Inputs | None = None,
        target: Field | None = None,
        output: Field | None = None,
    ):
        self.criterion = loss()
        self.fields = Fields(inputs, target, output)

    def metric_targets(self, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return targets.argmax(1)
        if self.all_kept or self.mean.ignored is None:
            return targets
        return without_ignored(targets, self.mean.ignored)

    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return probability_shape(outputs, targets)
        return class_shape(outputs, targets).long()

    def item_weights(self, targets: Tensor) -> Tensor | None:
        """Return the weight of each target in the mean of the loss; None if all are equal."""
        if targets.is_floating_point():
            return None
        weight = None
        if self.mean.items in ("weights", "own"):
            weight = class_weights(self.criterion)
        return weights_of(targets, weight, self.mean.ignored)

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        probabilities = outputs.float().softmax(1)
        probability, index = probabilities.max(1)
        return {"class_index": index, "probability": probability, "probabilities": probabilities}

    def check(self, data: Data) -> None:
        super().check(data)
        check_classes(data, self.mean.ignored, self.fields.known_targets)


@tasks.register("multilabel", aliases=["multi_label"])
class Multilabel(Supervised):
    """Predicts any number of labels for each sample: outputs are logits (batch, labels).

    Targets are 0 or 1, of the same shape.

    Args:
        loss: of logits and labels.
        inputs: the fields of a batch that the model is called with. One name, index in a tuple or
            path such as image.pixels is the only argument of the model. In a list, names are
            keyword arguments. {argument: field} gives fields other names. null: the inputs of
            (inputs, targets), or all fields with tensors but the target.
        target: the field with the targets; null: the targets of (inputs, targets).
        output: the field of the model's outputs that has the logits; null if the model returns one
            tensor.
    """

    target = "labels"

    def __init__(
        self,
        loss: Loss = "bce_with_logits",
        inputs: Inputs | None = None,
        target: Field | None = None,
        output: Field | None = None,
    ):
        self.criterion = loss()
        self.fields = Fields(inputs, target, output)

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        return {"labels": (outputs > 0).long(), "probabilities": outputs.float().sigmoid()}


@tasks.register("regression")
class Regression(Supervised):
    """Predicts numbers for each sample: outputs and targets are (batch, values).

    Targets (batch,) are one value.

    Args:
        loss: of outputs and targets.
        inputs: the fields of a batch that the model is called with. One name, index in a tuple or
            path such as image.pixels is the only argument of the model. In a list, names are
            keyword arguments. {argument: field} gives fields other names. null: the inputs of
            (inputs, targets), or all fields with tensors but the target.
        target: the field with the targets; null: the targets of (inputs, targets).
        output: the field of the model's outputs that has the predictions; null if the model returns
            one tensor.
    """

    target = "value"

    def __init__(
        self,
        loss: Loss = "mse",
        inputs: Inputs | None = None,
        target: Field | None = None,
        output: Field | None = None,
    ):
        self.criterion = loss()
        self.fields = Fields(inputs, target, output)

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        values = outputs.flatten(1)
        if values.shape[1] == 1:
            return {"value": values[:, 0]}
        return {f"value_{index}": column for index, column in enumerate(values.unbind(1))}


@tasks.register("model_loss")
class ModelLoss(Task):
    """Minimizes a loss that the model returns with its outputs, as models of Hugging Face do.

    The model is called with fields of the batch, among them its targets.

    Args:
        inputs: the fields of a batch that the model is called with, see task=classification; null:
            all fields with tensors.
        target: the field with the targets, for the metrics.
        loss: the field of the outputs with the loss.
        output: the field of the outputs for metrics and predictions.
        items: the items that the loss is the mean of, so that batches of unequal size are weighted:
            samples; targets: all targets but -100; next: all targets but -100 and the first of a
            sample, as of a language model that shifts its targets.
    """

    def __init__(
        self,
        inputs: Inputs | None = None,
        target: Field = "labels",
        loss: Field = "loss",
        output: Field = "logits",
        items: Literal["samples", "targets", "next"] = "samples",
    ):
        self.fields = Fields(inputs, target, with_target=True)
        self.loss = loss
        self.output = output
        self.items = items

    def step(self, model: nn.Module, batch: Batch) -> Step:
        targets = self.fields.targets(batch)
        outputs = self.fields.call(model, batch)
        loss = field_of(outputs, self.loss, "task.loss")
        if loss is None:
            raise DataError(
                f"the model {type(model).__name__} returns no {self.loss}: expected its targets "
                "among task.inputs"
            )
        check_scalar(f"the loss of {type(model).__name__}", loss)
        return Step(loss, field_of(outputs, self.output, "task.output"), targets)

    def count(self, batch: Batch) -> int | Tensor:
        """Return the number of items that the loss of the model averages over."""
        if self.items == "samples":
            return count_rows(batch)
        targets = self.fields.targets(batch)
        if self.items == "next":
            targets = targets[:, 1:]
        return (targets != IGNORED).sum()

    def model_outputs(self, model: nn.Module, batch: Batch) -> Any:
        """Return the named output; the batch needs no targets."""
        outputs = self.fields.without_missing_target(batch).call(model, batch)
        return field_of(outputs, self.output, "task.output")
