"""Probabilities and true classes of samples, of tasks with classes or labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from framework.contracts.loss_properties import known_function
from framework.contracts.task import Task
from framework.errors import DataError

from .samples import Measured, read_rows

NO_CLASSES = (
    "expected a task with classes or labels, whose outputs and targets are those of samples"
)


@dataclass
class Decision:
    """Probabilities and true classes of samples.

    Attributes:
        probabilities: shape (samples, classes), or (samples, labels) with several labels for each
            sample, or (samples, 1) for one label.
        targets: the class of each sample, shape (samples,), negative if it is ignored; or 0 and 1
            for each label, shape (samples, labels).
    """

    probabilities: Tensor
    targets: Tensor

    @property
    def is_multilabel(self) -> bool:
        """Whether a sample has any number of labels."""
        return self.targets.ndim == 2


def decide(task: Task, outputs: Tensor, targets: Tensor) -> Decision | None:
    """Return the probabilities of a task with classes or labels; None for other tasks.

    The task gives them (`Task.predict`). For one that does not, outputs (samples, classes) with
    class indices are logits, and so is one output for each target of 0 or 1, if the criterion takes
    logits.
    """
    if outputs.ndim == 2 and targets.ndim == 1 and not targets.is_floating_point():
        if outputs.shape[1] < 2:
            return None
        probabilities = given_probabilities(task, outputs)
        if probabilities is None:
            probabilities = outputs.float().softmax(1)
        return Decision(probabilities.double(), targets.long())
    if outputs.shape != targets.shape or outputs.ndim > 2 or not targets.is_floating_point():
        return None
    if not bool(((targets == 0) | (targets == 1)).all()):
        return None
    outputs = outputs.reshape(len(outputs), -1)
    targets = targets.reshape(len(targets), -1)
    probabilities = given_probabilities(task, outputs)
    if probabilities is None:
        loss = task.criterion or getattr(task, "loss", None)
        if loss is None or known_function(loss)[0] is not F.binary_cross_entropy_with_logits:
            return None
        probabilities = outputs.float().sigmoid()
    return Decision(probabilities.double(), targets.long())


def given_probabilities(task: Task, outputs: Tensor) -> Tensor | None:
    """Return the probabilities that a task computes from outputs; None if it computes none."""
    columns = task.predict(outputs)
    found = columns.get("probabilities") if isinstance(columns, Mapping) else None
    if isinstance(found, Tensor) and found.shape == outputs.shape:
        return found.detach().cpu()
    return None


def read_decisions(measured: Measured, batches: Any) -> Decision:
    """Return the probabilities and true classes of all samples, of all processes (collective).

    Samples whose class is ignored are left out.

    Raises:
        DataError: the task has neither classes nor labels.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for rows in read_rows(measured, batches):
        outputs = rows.outputs
        targets = rows.targets
        decision = None
        if outputs is not None and targets is not None:
            decision = decide(measured.task, outputs.cpu(), targets.cpu())
        if decision is None:
            raise DataError(f"{NO_CLASSES}; got {type(measured.task).__name__}")
        # a copy: a loader may write the next batch into the same memory
        parts.append((decision.probabilities.clone(), decision.targets.clone()))
    gathered = [each for own in measured.strategy.gather(parts) for each in own]
    if not gathered:
        raise DataError("the evaluation data has no batch: it is empty or was already read")
    probabilities = torch.cat([part[0] for part in gathered])
    targets = torch.cat([part[1] for part in gathered])
    if targets.ndim == 2:
        return Decision(probabilities, targets)
    known = targets >= 0
    if not known.any():
        raise DataError("the evaluation data has no sample with a class: all are ignored")
    return Decision(probabilities[known], targets[known])
