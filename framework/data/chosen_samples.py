"""Some samples of a split or of other data: evenly spaced ones, or the first ones."""

import torch

from framework.errors import DataError
from framework.runtime import seeds
from framework.runtime.batch import Batch, count_rows, join_rows, move_batch, select_rows

from .accumulation import Batches
from .batch_slice import whole_batches
from .dataset import Loader
from .foreign_loader import copy_batch


def read_spread_samples(batches: Batches, count: int, device: torch.device) -> Batch:
    """Return evenly spaced samples of a split as one batch; of other data the first samples.

    All processes return the same samples.

    Args:
        batches: the data.
        count: the largest number of samples.
        device: of the batch, whose memory no loader uses again.

    Raises:
        DataError: a sample cannot be read.
    """
    if not isinstance(batches, Loader):
        return read_first_samples(batches, count, device)
    last = len(batches.split) - 1
    count = min(count, last + 1)
    numbers = torch.linspace(0, last, count, dtype=torch.float64).round().long()
    return move_batch(batches.samples(numbers), device)


def read_first_samples(batches: Batches, count: int, device: torch.device) -> Batch:
    """Return the first samples as one batch; see `read_spread_samples`."""
    if isinstance(batches, Loader):
        count = min(count, len(batches.split))
        return move_batch(batches.samples(torch.arange(count)), device)
    parts: list[Batch] = []
    missing = count
    with seeds.undisturbed(), whole_batches(batches):
        for batch in batches.epoch():
            part = copy_batch(select_rows(batch, 0, missing))  # a loader may reuse its memory
            parts.append(move_batch(part, device))
            missing -= count_rows(part)
            if missing <= 0:
                break
    if not parts:
        raise DataError("the data has no sample")
    return parts[0] if len(parts) == 1 else join_rows(parts)
