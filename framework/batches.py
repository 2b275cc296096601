"""From whatever a person has (a Data, a split, a DataLoader) to batches, and from batches to steps."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from .data import Batch, Data, ForeignLoader, Loader, Split
from .errors import DataError

Batches = Loader | ForeignLoader
RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
Source = Data | Split | Loader | Iterable[Any]


def as_batches(source: Source, batch_size: int, *, shuffle: bool, seed: int, device: torch.device) -> Batches:
    """Return a reader of the source's batches; it reads for the device. Raises DataError for a whole Data."""
    if isinstance(source, Data):
        raise DataError(f"{type(source).__name__} has several splits: pass one of them, such as `data.test`")
    if hasattr(source, "__getitem__") and not isinstance(source, list | tuple):
        source = Loader(source, batch_size, batch_size, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
    ours = isinstance(source, Loader | ForeignLoader)
    return (source if ours else ForeignLoader(source)).to(device)  # type: ignore[arg-type, union-attr]


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


def other_order(batches: Batches, in_epoch: bool) -> str | None:
    """Return why a resumed fit reads other batches than an uninterrupted one, or None.

    Only the samplers of torch are known; any other iterable is taken to have a fixed order.

    Args:
        in_epoch: the saved fit stopped inside an epoch.
    """
    loader = batches.batches if isinstance(batches, ForeignLoader) else None
    if not isinstance(loader, DataLoader):
        return None
    samplers = [loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    random = [each for each in samplers if isinstance(each, RANDOM_SAMPLERS)]
    if any(each.generator is not None for each in random):
        return "the DataLoader shuffles with a generator of its own, whose state is not saved"
    if random and in_epoch:
        return "it stopped inside an epoch, and the DataLoader shuffles the rest in another order"
    return None


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
