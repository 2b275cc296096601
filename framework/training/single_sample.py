"""Batches of one sample, with which a batch norm cannot train."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from framework.contracts.task import Task
from framework.data.batch_slice import BatchSlice
from framework.data.dataset import Batch, Loader
from framework.errors import DataError
from framework.errors.torch_errors import batch_norm_reason, is_batch_norm
from framework.runtime.batch import select_rows, tensors_of
from framework.runtime.precision import Precision
from framework.runtime.torch_internals.norms import has_statistics


class SingleSample(NamedTuple):
    """The reason why a training batch, or a part of one, has one sample.

    Attributes:
        setting: the name of the setting.
        value: its value.
        which_batch: " in a process" if it is a part of one; " (the last of ...)" if it is not each.
    """

    setting: str
    value: int
    which_batch: str = ""

    def __str__(self) -> str:
        return f"{self.setting}={self.value} makes a batch of one sample{self.which_batch}"


def single_sample(
    batches: Any, micro_batch: int | None, shards: int | None = None, processes: int = 1
) -> SingleSample | None:
    """Return why a training batch, or a part of one, will have one sample; None if none will.

    None also if it is not known.

    Args:
        batches: the loader of the training data.
        micro_batch: the samples that the model processes at once; None for the batch.
        shards: the number of shards of a batch; None for whole batches.
        processes: the number of processes, each of which has a part of a batch without shards.
    """
    samples, size, drop_last = batch_sizes(batches)
    if size is None:
        return None
    last = samples % size if samples is not None and not drop_last else 0
    number = shards or processes
    parts = BatchSlice(0, number, number)
    counts = [*parts.sizes(size), *parts.sizes(last)]
    if micro_batch is not None:
        rests = [count % micro_batch for count in counts if count]
        if micro_batch == 1 or 1 in rests:
            return SingleSample("micro_batch", micro_batch)
    if 1 not in counts:
        return None
    which_batch = " in a process" if shards is None and processes > 1 else ""
    if 1 not in parts.sizes(size):
        which_batch += f" (the last of {samples:,}; drop_last=true leaves it out)"
    if shards is not None:
        return SingleSample("shards", shards, which_batch)
    return SingleSample("batch_size", size, which_batch)


def batch_sizes(batches: Any) -> tuple[int | None, int | None, bool]:
    """Return the samples of an epoch and of a batch, and whether a smaller last one is dropped.

    The samples are None if they are not known.
    """
    if isinstance(batches, Loader):
        samples = len(batches.split)
        if batches.limit is not None:
            samples = min(samples, batches.limit * batches.batch_size)
        return samples, batches.batch_size, batches.drop_last
    loader = batches.batches
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return None, None, False
    try:
        samples = len(loader.sampler)  # type: ignore[arg-type]  # not each Sampler has a length
    except TypeError:
        return None, loader.batch_size, loader.drop_last
    return samples, loader.batch_size, loader.drop_last


def check_single_sample(
    model: nn.Module,
    task: Task,
    batch: Batch,
    precision: Precision,
    reason: SingleSample,
) -> None:
    """Raise DataError if a batch norm of the model cannot train on a batch of one sample.

    Args:
        model: the model in training; its state does not change.
        task: its `step` calls the model.
        batch: a batch on the model's device, of which the first sample is used.
        precision: of the training.
        reason: why there is a batch of one sample, for the message.
    """
    normalizes = any(map(has_statistics, model.modules()))
    if not normalizes or task.phases or not tensors_of(batch):
        return
    # Not imported at the top, since it imports torch's counter of operations.
    from .layer_table import model_undisturbed

    try:
        with model_undisturbed(model, train=None), torch.no_grad(), precision.autocast():
            task.step(model, select_rows(batch, 0, 1))
    except Exception as error:  # other errors are those of this batch, or of this trial
        if is_batch_norm(error):
            raise DataError(f"{reason}: {batch_norm_reason(error)}") from error
