"""Tasks: what a batch means. Each runs the model, makes outputs and targets fit each other, and takes the mean loss."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from framework import Data, Loss, Step, Task, TensorSplit, tasks
from framework.data import Batch, Target
from framework.errors import DataError, FrameworkError
from framework.user_code import describe, text_of, user_place

WORDS = {"class": "classes", "labels": "labels", "value": "values", "none": "nothing"}
TASKS = {"class": "classification", "labels": "multilabel", "value": "regression"}


class Supervised(Task):
    """A task that compares the model's outputs with targets by a loss."""

    criterion: nn.Module
    target: Target

    def step(self, model: nn.Module, batch: Batch) -> Step:
        inputs, targets = batch
        outputs = model(inputs)
        targets = self.fit(outputs, targets)
        return Step(self.criterion(outputs, targets), outputs, targets)

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
        if hasattr(self.criterion, "learn"):
            self.criterion.learn(data)
        self.try_loss(data.out_shape)

    def try_loss(self, out_shape: Sequence[int]) -> None:
        """Raise DataError when the loss refuses outputs and targets of such shapes and types."""
        rows = 3 if out_shape[0] == 2 else 2  # other than the classes, or the shapes could fit by accident
        buffer = next(self.criterion.buffers(), torch.empty(0))
        outputs = torch.zeros(rows, *out_shape, device=buffer.device)
        targets = torch.zeros_like(outputs)
        if self.target == "class":
            targets = targets[:, 0].long()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = self.criterion(outputs, targets)
        except FrameworkError:
            raise
        except Exception as error:
            name = type(self.criterion).__name__
            if user_place(error) is None:
                what = f"{WORDS[self.target]} with outputs of shape {tuple(out_shape)}"
                raise DataError(f"the loss {name} cannot take {what}: {text_of(error)}") from error
            sizes = tuple(outputs.shape), tuple(targets.shape)
            shapes = f"outputs of shape {sizes[0]} and targets of shape {sizes[1]}"
            said = f"{describe(error)}, while computing the loss {name} of {shapes}"
            raise DataError(said) from error
        if not isinstance(loss, Tensor):
            raise DataError(f"the loss {type(self.criterion).__name__} returns {loss!r}, not the mean as a tensor")
        if loss.ndim:
            raise DataError(
                f"the loss {type(self.criterion).__name__} returns shape {tuple(loss.shape)}, not the mean as a scalar"
            )


def same_shape(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return targets in the outputs' shape where they differ by axes of length 1 only, so that nothing is broadcast."""
    if targets.shape == outputs.shape:
        return targets
    if [n for n in targets.shape if n != 1] != [n for n in outputs.shape if n != 1]:
        raise DataError(f"targets have shape {tuple(targets.shape)}, but the model's outputs {tuple(outputs.shape)}")
    return targets.reshape(outputs.shape)


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

    def step(self, model: nn.Module, batch: Batch) -> Step:
        step = super().step(model, batch)
        return step._replace(targets=step.targets.argmax(1)) if step.targets.is_floating_point() else step

    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim < 2:
            raise DataError(f"the model's outputs have shape {tuple(outputs.shape)}, not (batch, classes)")
        if targets.is_floating_point():
            return same_shape(outputs, targets)
        return same_shape(outputs[:, 0], targets).long()

    def count(self, batch: Batch) -> int | Tensor:
        """Return what the loss's mean divides by: the targets, without the ignored, by the weights of their classes."""
        targets = batch[1]
        if targets.is_floating_point():
            return len(targets)
        if not isinstance(self.criterion, nn.CrossEntropyLoss | nn.NLLLoss):
            return targets.numel()
        return counted(targets, self.criterion.weight, self.criterion.ignore_index)

    def predict(self, outputs: Tensor) -> dict[str, Any]:
        probabilities = outputs.float().softmax(1)
        probability, index = probabilities.max(1)
        return {"class": index, "probability": probability, "probabilities": probabilities}

    def check(self, data: Data) -> None:
        super().check(data)
        for name in ("train", "val", "test"):
            split = getattr(data, name, None)
            if isinstance(split, TensorSplit) and not split.tensors[1].is_floating_point():
                self.check_range(f"the {name} split of {type(data).__name__}", split.tensors[1], data.out_shape[0])

    def check_range(self, where: str, targets: Tensor, classes: int) -> None:
        """Raise DataError for an index that is no class: on a GPU it would kill the run without a word."""
        ignored = getattr(self.criterion, "ignore_index", None)
        counting = targets if ignored is None else targets[targets != ignored]
        if not len(counting):
            return
        low, high = counting.aminmax()
        if low < 0 or high >= classes:
            wrong = int(low if low < 0 else high)
            raise DataError(f"{where} has a target {wrong}; with {classes} classes they go from 0 to {classes - 1}")


def counted(targets: Tensor, weight: Tensor | None, ignored: int | None) -> int | Tensor:
    """Return the number of targets that are not ignored, or the sum of the weights of their classes."""
    if weight is None:
        return targets.numel() if ignored is None else (targets != ignored).sum()
    if ignored is None:
        return weight[targets].sum()
    kept = targets != ignored
    return (weight[torch.where(kept, targets, 0)] * kept).sum()


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
