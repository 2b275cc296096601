"""From whatever a person has (a Data, a split, a DataLoader) to batches, and from batches to steps."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from .data import Batch, Data, ForeignLoader, Loader, Split, as_batch
from .errors import DataError

Batches = Loader | ForeignLoader
Source = Data | Split | Loader | Iterable[Any]


def as_batches(source: Source, batch_size: int, *, shuffle: bool, seed: int, device: torch.device) -> Batches:
    """Return a reader of the source's batches; it reads for the device. Raises DataError for a whole Data."""
    if isinstance(source, Data):
        raise DataError(f"{type(source).__name__} has several splits: pass one of them, such as `data.test`")
    if hasattr(source, "__getitem__") and not isinstance(source, list | tuple):
        source = Loader(source, batch_size, batch_size, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
    ours = isinstance(source, Loader | ForeignLoader)
    return (source if ours else ForeignLoader(source)).to(device)  # type: ignore[arg-type, union-attr]


def known_targets(*several: Batches) -> list[Tensor] | None:
    """Return all targets of batches (inputs, targets), or None where these are not in memory."""
    found: list[Tensor] = []
    for batches in several:
        held = batches_in_memory(batches)
        if held is None or any(len(batch) != 2 for batch in held):
            return None
        found += [batch[1] for batch in held]
    return found


def batches_in_memory(batches: Batches) -> Sequence[Batch] | None:
    """Return tensors that hold all that is read.

    That is known of a split, a list of batches and a DataLoader over a TensorDataset.
    """
    if isinstance(batches, Loader):
        return None if batches.tensors is None else [tuple(batches.tensors)]
    source = batches.batches
    if type(source) in (list, tuple):
        return [as_batch(batch) for batch in source]
    if not isinstance(source, DataLoader) or source.collate_fn is not default_collate:
        return None
    return [source.dataset.tensors] if type(source.dataset) is TensorDataset else None


def count_steps(batches: Batches, accumulate: int) -> int:
    """Return the optimizer steps of an epoch; 0 when they cannot be counted beforehand. Raises DataError for none."""
    try:
        count = len(batches)
    except TypeError:
        return 0
    if count == 0:
        raise DataError("the training data has no batch: it is empty, or smaller than a batch with drop_last")
    return -(-count // accumulate)


def count_total(steps_per_epoch: int, max_epochs: int | None, max_steps: int | None) -> int:
    """Return the optimizer steps of a whole run, whichever limit comes first; 0 when that is not known."""
    limits = [] if max_steps is None else [max_steps]
    if max_epochs is not None and steps_per_epoch:
        limits.append(max_epochs * steps_per_epoch)
    return min(limits, default=0)


def steps(batches: Iterable[Batch], accumulate: int, steps_left: int) -> Iterator[tuple[list[Batch], bool]]:
    """Yield the micro-batches of each step, and whether the step is the last of its epoch.

    steps_left: how many there will be, or 0 when that is not known; then a step is held back until the next is there.
    """
    held: list[Batch] | None = None
    for number, window in enumerate(windows(batches, accumulate), 1):
        if steps_left:
            yield window, number == steps_left
            continue
        if held is not None:
            yield held, False
        held = window
    if held is not None:
        yield held, True


def windows(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Yield lists of `size` batches; the last may be shorter."""
    window: list[Batch] = []
    for batch in batches:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window
