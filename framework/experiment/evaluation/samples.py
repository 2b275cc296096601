"""Outputs, targets and loss of each sample of a split, for a trained run or within a fit."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from framework.contracts.fields import first_tensor
from framework.contracts.loss_properties import known_function
from framework.contracts.strategy import Strategy
from framework.contracts.task import Step, Task
from framework.data.accumulation import Batches
from framework.data.batch_slice import with_stand_ins
from framework.data.dataset import Loader
from framework.errors import DataError
from framework.runtime.batch import Batch, count_rows, move_batch, select_rows
from framework.runtime.dtensors import has_dtensors
from framework.runtime.memory import MicroBatches
from framework.runtime.precision import Precision

UNKNOWN = -1  # the number of a sample that cannot be told


class Measured(Protocol):
    """What a measurement needs of an `Evaluator`, or of the `Context` of a callback."""

    model: nn.Module
    task: Task
    device: torch.device
    precision: Precision
    strategy: Strategy
    micro_batches: MicroBatches


@dataclass
class Rows:
    """The result of the model for some samples, on the device.

    Attributes:
        numbers: of the samples in their split, from 0; -1 if unknown. On the CPU.
        batch: the samples.
        step: the result of the task.
    """

    numbers: Tensor
    batch: Batch
    step: Step

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def inputs(self) -> Tensor | None:
        """The inputs, shape (samples, ...); None if a batch is not (inputs, targets)."""
        if isinstance(self.batch, Mapping):
            return None
        try:
            return first_tensor(self.batch)
        except DataError:
            return None

    @property
    def outputs(self) -> Tensor | None:
        """The outputs, shape (samples, ...); None if they have another form."""
        return self._rows_of(self.step.outputs)

    @property
    def targets(self) -> Tensor | None:
        """The targets in the form that metrics take; None if they are not rows of samples."""
        return self._rows_of(self.step.targets)

    def _rows_of(self, value: Any) -> Tensor | None:
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(self):
            return value.detach()
        return None


def read_rows(measured: Measured, batches: Batches) -> Iterator[Rows]:
    """Yield the results for the samples that this process reads, in evaluation mode.

    With a sharded model all processes must read to the end.
    """
    model = measured.model
    strategy = measured.strategy
    all_run = has_dtensors(model)
    with measured.precision.inference(model):
        read = 0
        pairs = with_stand_ins(batches.epoch(), all_run)
        for number, (batch, counts) in enumerate(pairs):
            if not batch:  # other processes have its rows
                continue
            rows = count_rows(batch)
            numbers = sample_numbers(batches, number, rows, read)
            if counts:
                read += rows
            for part in measured.micro_batches.split(move_batch(batch, measured.device)):
                step = strategy.forward(measured.task.step, model, part).detach()
                size = count_rows(part)
                if counts:
                    yield Rows(numbers[:size], part, step)
                numbers = numbers[size:]


def sample_numbers(batches: Batches, number: int, rows: int, read: int) -> Tensor:
    """Return the numbers of the samples of a batch.

    Args:
        batches: the loader.
        number: of the batch.
        rows: the number of samples in it.
        read: the number of samples before it that this process has read.
    """
    if not isinstance(batches, Loader):
        if not batches.slice.is_whole:
            return torch.full((rows,), UNKNOWN)
        return torch.arange(read, read + rows)
    numbers = torch.tensor(batches.indices(0, number, 1))
    if len(numbers) != rows:  # samples that cannot be read were skipped
        return torch.full((rows,), UNKNOWN)
    return numbers


def row_losses(measured: Measured, rows: Rows) -> Tensor:
    """Return the loss of each sample alone, in float64 on the CPU.

    It is what the task gives for a batch of this one sample. Weights of classes, which cancel in
    the mean over one sample, do not change it. The loss of a sample without a counted target (an
    ignored class) is -inf.

    Raises:
        DataError: the loss of a sample depends on the other samples.
    """
    task = measured.task
    if not task.splits_batches:
        raise DataError(
            f"{type(task).__name__} compares the samples of a batch with each other: a sample has "
            "no loss of its own"
        )
    losses = unreduced_losses(task, rows)
    if losses is None:
        losses = criterion_losses(task, rows)
    if losses is not None:
        return losses
    if has_dtensors(measured.model):
        raise DataError(
            f"{type(task).__name__}: the loss of single samples needs a forward pass for each, "
            "which a sharded model does not support"
        )
    found = []
    for row in range(len(rows)):
        sample = select_rows(rows.batch, row, row + 1)
        loss = measured.strategy.forward(task.step, measured.model, sample).loss.detach()
        counts = float(task.count(sample)) > 0  # class weights make a fraction of it
        found.append(in_float64(loss) if counts else torch.tensor(-torch.inf).double())
    return torch.stack(found)


def unreduced_losses(task: Task, rows: Rows) -> Tensor | None:
    """Return the losses of samples from the outputs, in float64 on the CPU.

    None if they need a call for each sample.

    The loss must be a mean of torch without weights. Their mean is compared with the loss of the
    batch: a task may do more than to call its criterion.
    """
    criterion = task.criterion
    outputs = rows.outputs
    targets = rows.targets
    if criterion is None or outputs is None or targets is None:
        return None
    function, is_changed = known_function(criterion)
    if function is None or is_changed or getattr(criterion, "reduction", "") != "mean":
        return None
    if getattr(criterion, "weight", None) is not None:
        return None
    if not targets.is_floating_point() and bool((targets < 0).any()):
        return None  # ignored targets
    unreduced = copy.copy(criterion)
    unreduced.reduction = "none"  # type: ignore[assignment]  # modules have attributes of any type
    losses = unreduced(outputs, targets)
    if len(losses) != len(rows):
        return None
    losses = in_float64(losses.reshape(len(rows), -1).mean(1))
    return losses if is_loss_of_batch(losses.mean(), rows) else None


def criterion_losses(task: Task, rows: Rows) -> Tensor | None:
    """Return the losses of samples from the outputs, in float64 on the CPU.

    The criterion, which is called for each sample, must be a loss of torch or a subclass of one,
    such as with class weights. None if the loss of the batch is not the mean of these losses.
    """
    criterion = task.criterion
    outputs = rows.outputs
    targets = rows.targets
    if criterion is None or outputs is None or targets is None:
        return None
    if known_function(criterion)[0] is None:
        return None
    losses = []
    counts = []
    for row in range(len(rows)):
        loss = criterion(outputs[row : row + 1], targets[row : row + 1])
        losses.append(in_float64(loss.detach()).sum())
        counts.append(float(task.count(select_rows(rows.batch, row, row + 1))))
    found = torch.stack(losses)
    weights = torch.tensor(counts, dtype=torch.float64)
    is_counted = weights > 0
    mean = (found * weights)[is_counted].sum() / weights.sum()
    if not is_loss_of_batch(mean, rows):
        return None
    return torch.where(is_counted, found, -torch.inf)


def is_loss_of_batch(mean: Tensor, rows: Rows) -> bool:
    """Return whether a mean of the losses of samples is the loss of the task for all of them."""
    of_batch = in_float64(rows.step.loss)
    return bool(torch.isclose(mean, of_batch, rtol=1e-3, atol=1e-6, equal_nan=True))


def in_float64(losses: Tensor) -> Tensor:
    """Return losses in float64 on the CPU; a device such as mps has no float64."""
    return losses.cpu().double()
