"""Iterables of batches that are not a `Loader`, such as a DataLoader or a list of batches."""

import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, IterableDataset

from framework.errors import DataError, short
from framework.runtime import seeds
from framework.runtime.batch import Batch, map_tensors, tensors_of
from framework.runtime.copy_stream import CopyStream
from framework.runtime.memory_format import MemoryFormat

from .batch_slice import BatchSlice
from .source_states import SourceStates, stateful_source
from .tensor_loader import gathered_batches, tensor_source
from .workers import as_batch

READ_AGAIN = "pass a list of batches or a DataLoader, which can be read again"
READS_FROM = ("loader", "dataloader", "batch_sampler", "sampler", "dataset")
"""Attributes of loaders and samplers with the objects that they read from."""


class Checksum(NamedTuple):
    """The shape and a checksum of a tensor, to compare it between processes."""

    shape: tuple[int, ...]
    crc: int


class ForeignLoader:
    """Reads an iterable of batches without changing it.

    A DataLoader over tensors is read with one gather per batch (see `tensor_loader.py`). The state
    of an iterable with `state_dict` and `load_state_dict` is saved with that of a fit (see
    `source_states.py`).

    The iterable may write each batch into the memory of the previous one. So a batch is valid only
    until the next one is read; use `keep` to keep it for longer.

    Args:
        batches: the iterable.
        memory_format: the format that images are converted to.

    Attributes:
        slice: the rows that this process uses of each batch. Each process reads whole batches.
        first_batch: checksums of the first whole batch of the last epoch that was read; empty
            without a slice.

    Raises:
        DataError: `batches` is not iterable.
    """

    max_buffered = 1
    split: None = None  # not known
    batch_size: None = None  # not known
    skipped = 0

    def __init__(
        self,
        batches: Iterable[Any],
        memory_format: MemoryFormat = MemoryFormat(False, ""),  # noqa: B008  # it is immutable
    ):
        if not hasattr(batches, "__iter__"):
            raise DataError(
                "data: expected a Data, a split, a data set with a length or an iterable of "
                f"batches, got {short(batches)}"
            )
        self.batches = batches
        self.memory_format = memory_format
        self.slice = BatchSlice()
        self.first_batch: list[Checksum] = []
        self.reuses_memory = not makes_new_tensors(batches)
        self.copies: CopyStream | None = None
        self.started = False
        self.states: SourceStates | None = None
        source = stateful_source(batches)
        if source is not None:
            self.states = SourceStates(source)

    def to(self, device: torch.device) -> "ForeignLoader":
        """Prepare to read for a device, and return this loader.

        On CUDA the batches are copied to the device. If they come from a DataLoader, each copy runs
        while the model computes with the previous batch.
        """
        if device.type == "cuda":
            self.copies = CopyStream(device, reused=self.reuses_memory)
        return self

    def __len__(self) -> int:
        """Return the number of batches of an epoch.

        Raises:
            TypeError: it is not known.
        """
        if isinstance(self.batches, DataLoader):
            is_iterable = isinstance(self.batches.dataset, IterableDataset)
            if is_iterable and self.batches.num_workers > 1:
                raise TypeError("the length does not count the smaller last batch of each worker")
        return len(self.batches)  # type: ignore[arg-type]  # the TypeError is part of the contract

    @property
    def description(self) -> str:
        """A short text on how batches are read."""
        name = type(self.batches).__name__
        if tensor_source(self.batches) is not None:
            return f"{name}, in memory, one gather per batch{self.memory_format.description}"
        return f"{name}, read batch by batch{self.memory_format.description}"

    @property
    def single_pass(self) -> bool:
        """Whether the batches can be read only once, as those of a generator.

        An iterator class of the user may start again, so it does not count.
        """
        built_in = type(self.batches).__module__ in ("builtins", "itertools")
        return built_in and isinstance(self.batches, Iterator)

    def epoch(self, epoch: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Return an iterator over the batches of an epoch, for a measurement.

        Afterwards the generators of the loader are as before, so that the measurement does not
        change the order of the training that reads the same loader.

        Args:
            epoch: the epoch of training, counted from 0; `set_epoch` of the loader, its samplers
                and its data set is called. None: it is not called, since the measurement may
                interrupt a training that reads the same loader.
            start: number of batches to skip.

        Raises:
            DataError: a measurement on data that was read before and can be read only once.
        """
        if epoch is not None:
            set_epoch(self.batches, epoch)
        elif self.started and self.single_pass:
            kind = type(self.batches).__name__
            raise DataError(f"the data is a {kind}, which can be read only once; {READ_AGAIN}")
        self.started = True
        return self._prepare(self._measured(start))

    def training_epoch(self, epoch: int, start: int, accumulate: int = 1) -> Iterator[Batch]:
        """Return an iterator over the batches of an epoch of training, which advances generators.

        It records the states of a source that has one.

        If a state was loaded, the source continues from it, and no batch is read to skip it.

        Args:
            epoch: the epoch, counted from 0.
            start: number of batches to skip.
            accumulate: batches per step.
        """
        set_epoch(self.batches, epoch)
        self.started = True
        if self.states is None:
            return self._prepare(self._iterate(start))
        length = known_length(self)
        return self._prepare(self.states.record(epoch, start, self._iterate, length, accumulate))

    def source_state(self, epoch: int, start: int) -> Any:
        """Return the state of the source before batch number `start` of an epoch; None: unknown."""
        return None if self.states is None else self.states.at(epoch, start)

    def load_source_state(self, state: Any) -> None:
        """Continue from a result of `source_state`, unless it is None."""
        if self.states is not None:
            self.states.load(state)

    @property
    def continues(self) -> bool:
        """Whether the next batch is read from a state that was loaded."""
        return self.states is not None and self.states.loaded is not None

    def _prepare(self, iterator: Iterator[Any]) -> Iterator[Batch]:
        """Return an iterator over batches, copied and converted as needed."""
        batches = map(as_batch, iterator)
        if not self.slice.is_whole:
            batches = map(self.slice.of_batch, self._with_checksums(batches))
        if self.copies is None:
            return map(self.memory_format.convert, batches)
        reads = ((batch, None) for batch in batches)
        ahead = isinstance(self.batches, DataLoader)
        copied = self.copies.ahead(reads) if ahead else self.copies.in_turn(reads)
        return (self.memory_format.convert(batch) for batch, _ in copied)

    def _with_checksums(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches, and set `first_batch`."""
        self.first_batch = []
        for batch in batches:
            self.first_batch = [checksum(tensor) for tensor in tensors_of(batch)]
            yield batch
            break
        yield from batches

    def generators(self) -> list[torch.Generator]:
        """Return the generators of the loader, its samplers and its data set."""
        found: list[torch.Generator] = []
        for part in read_objects(self.batches):
            generator = getattr(part, "generator", None)
            is_new = all(generator is not other for other in found)
            if isinstance(generator, torch.Generator) and is_new:
                found.append(generator)
        return found

    def _measured(self, start: int) -> Iterator[Any]:
        """Yield the batches from number `start`, and restore the generators of the loader."""
        states = [(generator, generator.get_state()) for generator in self.generators()]
        try:
            yield from self._iterate(start)
        finally:
            for generator, state in states:
                generator.set_state(state)

    def _iterate(self, start: int) -> Iterator[Any]:
        """Return an iterator that begins with batch number `start`.

        Skipping does not advance the random generators: a resumed fit has restored them already.
        """
        if start == 0:
            return self._all_batches()
        with seeds.undisturbed():
            batches = self._all_batches()
            for _ in islice(batches, start):
                pass
        return batches

    def _all_batches(self) -> Iterator[Any]:
        source = tensor_source(self.batches)
        if source is None:
            return iter(self.batches)
        return gathered_batches(self.batches, source)  # type: ignore[arg-type]  # a DataLoader

    def keep(self, batch: Batch) -> Batch:
        """Return a batch that stays valid after the next one is read: a copy if necessary."""
        if not self.reuses_memory or self.copies is not None:
            return batch
        return copy_batch(batch)


def copy_batch(batch: Batch) -> Batch:
    """Return a batch in new memory."""
    return map_tensors(torch.Tensor.clone, batch)


def makes_new_tensors(batches: Any) -> bool:
    """Return whether each batch is known to have its own memory.

    This is known of a list, and of torch's DataLoader with its default `collate_fn`.
    """
    if isinstance(batches, list | tuple):
        return True
    if type(batches) is not DataLoader or batches.batch_sampler is None:
        return False
    return batches.collate_fn is torch.utils.data.default_collate


def known_length(source: Any) -> int | None:
    """Return the length of a split or loader; None if it has none."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


def checksum(tensor: Tensor) -> Checksum:
    """Return the shape and a checksum of a tensor; of one that is not dense only the shape."""
    shape = tuple(tensor.shape)
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return Checksum(shape, 0)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    numbers: Any = flat.view(torch.uint8).numpy()
    return Checksum(shape, zlib.crc32(numbers))


def set_epoch(source: Any, epoch: int) -> None:
    """Call `set_epoch` of a loader and of its samplers, batch samplers and data sets, once each."""
    for part in read_objects(source):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def read_objects(source: Any) -> Iterator[Any]:
    """Yield a loader, its samplers, batch samplers and data sets, once each."""
    waiting = [source]
    seen: list[Any] = []
    while waiting:
        part = waiting.pop(0)
        if part is None or isinstance(part, type) or any(part is other for other in seen):
            continue
        seen.append(part)
        yield part
        waiting += [getattr(part, name, None) for name in READS_FROM]
        if isinstance(part, ConcatDataset | ChainDataset):
            waiting += part.datasets
