"""Tasks: what a batch means. Each runs the model, makes outputs and targets fit each other, and takes the mean loss."""

import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

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
    tasks,
    user_code,
)
from framework.contracts.alignment import class_shape, probability_shape, same_shape
from framework.contracts.loss import (
    DataDependentLoss,
    Mean,
    check_classes,
    check_first,
    check_scalar,
    class_weights,
    weights_of,
    without_ignored,
)
from framework.contracts.task import check_tensor_output, inputs_and_targets

WORDS = {"class": "classes", "labels": "labels", "value": "values", "none": "nothing"}
TASKS = {"class": "classification", "labels": "multilabel", "value": "regression"}


class Supervised(Task):
    """A task that compares the model's outputs with targets by a loss."""

    criterion: nn.Module
    target: Target
    row_size = 1  # numbers in the targets of a sample, where the data says so

    @cached_property
    def mean(self) -> Mean:
        """What the loss's mean is over."""
        return Mean.of(self.criterion)

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs, targets = inputs_and_targets(batch)
        outputs = model(inputs)
        check_tensor_output(model, outputs)
        targets = self.fit(outputs, targets)
        loss = self.mean.call(self.criterion, outputs, targets, self.all_kept)
        check_scalar(self.criterion, loss)
        return Step(loss, outputs, self.metric_targets(targets))

    def metric_targets(self, targets: Tensor) -> Tensor:
        """Return the targets that metrics see."""
        return targets

    def count(self, batch: Batch) -> int | Tensor:
        """Return the number of items that the loss's mean is over."""
        number = self.mean.count(self.criterion, inputs_and_targets(batch)[1], self.all_kept)
        if self.row_size == 1 or self.mean.items != "targets":
            return number
        samples, rest = divmod(number, self.row_size)
        return number / self.row_size if rest else samples

    def know_targets(self, targets: Sequence[Tensor] | None) -> None:
        self.all_kept = self.mean.none_ignored(targets)

    def check_first(self, step: Step) -> None:
        if not self.mean.certain:
            check_first(self.criterion, step.outputs, step.targets)

    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the targets in the loss's shape and type. Raises DataError when they are not the outputs' targets."""
        return same_shape(outputs, targets if targets.is_floating_point() else targets.float())

    def check(self, data: Data) -> None:
        if data.target != self.target:
            raise DataError(
                f"data {type(data).__name__} has {WORDS[data.target]} as targets; {TASKS[self.target]} needs "
                f"{WORDS[self.target]}: "
                + (f"task={TASKS[data.target]}" if data.target in TASKS else "choose other data")
            )
        if self.target != "class":
            self.row_size = math.prod(data.out_shape)
        if isinstance(self.criterion, DataDependentLoss):
            self.criterion.learn(data)
        self.try_loss(data.out_shape)
        self.check_mean(data.out_shape)

    def check_mean(self, out_shape: Sequence[int]) -> None:
        """Raise DataError when the loss is a sum over the samples."""
        if self.mean.certain:
            return
        outputs, targets = self.example(4, out_shape)
        check_first(self.criterion, outputs + 0.5, targets)  # a loss of zeros may be 0

    def example(self, rows: int, out_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return outputs and targets of a batch, on the device of the loss."""
        buffer = next(self.criterion.buffers(), torch.empty(0))
        outputs = torch.zeros(rows, *out_shape, device=buffer.device)
        targets = torch.zeros_like(outputs)
        if self.target == "class":
            targets = targets[:, 0].long()
        return outputs, targets

    def try_loss(self, out_shape: Sequence[int]) -> None:
        """Raise DataError when the loss refuses outputs and targets of such shapes and types."""
        rows = (
            3 if out_shape[0] == 2 else 2
        )  # other than the classes, or the shapes could fit by accident
        outputs, targets = self.example(rows, out_shape)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = self.criterion(outputs, targets)
        except FrameworkError:
            raise
        except Exception as error:
            name = type(self.criterion).__name__
            if user_code.user_place(error) is None:
                what = f"{WORDS[self.target]} with outputs of shape {tuple(out_shape)}"
                raise DataError(
                    f"the loss {name} cannot take {what}: {user_code.text_of(error)}"
                ) from error
            sizes = tuple(outputs.shape), tuple(targets.shape)
            shapes = f"outputs of shape {sizes[0]} and targets of shape {sizes[1]}"
            said = f"{user_code.describe(error)}, while computing the loss {name} of {shapes}"
            raise DataError(said) from error
        check_scalar(self.criterion, loss)


@tasks.register("classification")
class Classification(Supervised):
    """One class of several for each sample: outputs (batch, classes) logits, targets (batch,) indices.

    Targets may also be class probabilities (batch, classes), as after mixing samples; metrics see the likeliest class.

    Args:
        loss: of logits and class indices.
    """

    target = "class"

    def __init__(self, loss: Loss = "cross_entropy"):
        self.criterion = loss()

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
        """Return by how much each target counts in the loss's mean; None where all count alike."""
        if targets.is_floating_point():
            return None
        weight = None
        if self.mean.items in ("weights", "own"):
            weight = class_weights(self.criterion)
        return weights_of(targets, weight, self.mean.ignored)

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        probabilities = outputs.float().softmax(1)
        probability, index = probabilities.max(1)
        return {"class": index, "probability": probability, "probabilities": probabilities}

    def check(self, data: Data) -> None:
        super().check(data)
        check_classes(data, self.mean.ignored)


@tasks.register("multilabel", aliases=["multi_label"])
class Multilabel(Supervised):
    """Any number of labels for each sample: outputs (batch, labels) logits, targets 0 or 1 of the same shape.

    Args:
        loss: of logits and labels.
    """

    target = "labels"

    def __init__(self, loss: Loss = "bce_with_logits"):
        self.criterion = loss()

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        return {"labels": (outputs > 0).long(), "probabilities": outputs.float().sigmoid()}


@tasks.register("regression")
class Regression(Supervised):
    """Numbers for each sample: outputs and targets (batch, values); targets (batch,) are one value.

    Args:
        loss: of outputs and targets.
    """

    target = "value"

    def __init__(self, loss: Loss = "mse"):
        self.criterion = loss()

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        values = outputs.flatten(1)
        if values.shape[1] == 1:
            return {"value": values[:, 0]}
        return {f"value_{index}": column for index, column in enumerate(values.unbind(1))}
