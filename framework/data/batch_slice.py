"""The rows that one process reads of each batch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from framework.errors import DataError
from framework.runtime.batch import Batch, count_rows, map_tensors, select_rows

NO_ROWS: Batch = ()
"""In place of a batch of which a process has no row, since it has fewer rows than processes."""


class BatchSlice(NamedTuple):
    """Some neighboring parts of a batch that is cut into equal parts.

    The first parts have one row more if the rows cannot be divided equally, as with
    `torch.tensor_split`. So no row is read twice, and none is padded.

    Attributes:
        first: number of the first part.
        last: number after the last part.
        parts: the number of parts of the whole batch.
    """

    first: int = 0
    last: int = 1
    parts: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether the slice is the whole batch."""
        return self.last - self.first == self.parts

    def bounds(self, rows: int) -> tuple[int, int]:
        """Return the first row, and the row after the last one, for a batch of some rows."""
        size, larger = divmod(rows, self.parts)
        first = self.first * size + min(self.first, larger)
        last = self.last * size + min(self.last, larger)
        return first, last

    def rows(self, size: int) -> int:
        """Return the number of rows of the slice of a batch of some size."""
        first, last = self.bounds(size)
        return last - first

    def sizes(self, rows: int) -> list[int]:
        """Return the number of rows of each part in the slice."""
        size, larger = divmod(rows, self.parts)
        return [size + (part < larger) for part in range(self.first, self.last)]

    def of_batches(self, indices: Tensor, batch_size: int) -> Tensor:
        """Return the part of each of several batches, one after the other.

        Args:
            indices: shape (samples,), those of the batches; the last one may be smaller.
            batch_size: of the other batches.
        """
        if self.is_whole:
            return indices
        full = len(indices) // batch_size * batch_size
        first, last = self.bounds(batch_size)
        own = indices[:full].view(-1, batch_size)[:, first:last].reshape(-1)
        first, last = self.bounds(len(indices) - full)
        return torch.cat([own, indices[full + first : full + last]])

    def of_batch(self, batch: Batch) -> Batch:
        """Return the rows of a batch; `NO_ROWS` if there are none."""
        if self.is_whole:
            return batch
        first, last = self.bounds(count_rows(batch))
        if first == last:
            return NO_ROWS
        return select_rows(batch, first, last)


WHOLE = BatchSlice()


def filled(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """Yield batches, and `NO_ROWS` for each that is missing at the end."""
    for batch in batches:
        yield batch
        count -= 1
    for _ in range(count):
        yield NO_ROWS


def with_stand_ins(batches: Iterable[Batch], needed: bool) -> Iterator[tuple[Batch, bool]]:
    """Yield the batches of a process, and whether their rows count.

    Args:
        batches: those of an epoch, with `NO_ROWS` for a batch that only other processes have.
        needed: whether each process must run the model as often as the others, as with a sharded
            model. If so, an earlier sample stands in for a batch without rows.

    Raises:
        DataError: there is no earlier sample.
    """
    sample = NO_ROWS
    for batch in batches:
        if batch:
            if needed and not sample:
                sample = map_tensors(Tensor.clone, select_rows(batch, 0, 1))
            yield batch, True
        else:
            if needed and not sample:
                raise DataError(
                    "the first batch has fewer samples than processes, which have parts of the "
                    "model: use larger batches"
                )
            yield sample, False


class Sliced(Protocol):
    """A loader of which a process reads a part of each batch."""

    slice: BatchSlice


@contextmanager
def whole_batches(loader: Sliced) -> Iterator[None]:
    """Let a process read whole batches in a block, as for a callback that needs all samples."""
    own = loader.slice
    loader.slice = WHOLE
    try:
        yield
    finally:
        loader.slice = own
