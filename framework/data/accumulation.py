"""From whatever a person has (a Data, a split, a DataLoader) to batches, and from batches to steps."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from framework.errors import DataError

from .dataset import Batch, Data, ForeignLoader, Loader, Split, as_batch, known_length

Batches = Loader | ForeignLoader
RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
Source = Data | Split | Loader | Iterable[Any]
Keep = Callable[[Batch], Batch]


def as_batches(
    source: Source, batch_size: int, *, shuffle: bool, seed: int, device: torch.device
) -> Batches:
    """Return a reader of the source's batches; it reads for the device. Raises DataError for a whole Data."""
    if isinstance(source, Data):
        raise DataError(
            f"{type(source).__name__} has several splits: pass one of them, such as `data.test`"
        )
    if isinstance(source, IterableDataset):  # torch gives it a `__getitem__` that only raises
        source = DataLoader(source, batch_size=batch_size)
    elif is_map_style(source):
        source = Loader(source, batch_size, batch_size, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
    ours = isinstance(source, Loader | ForeignLoader)
    return (source if ours else ForeignLoader(source)).to(device)  # type: ignore[arg-type, union-attr]


def is_map_style(source: Any) -> bool:
    """Return whether a source is read sample by sample; a list or tuple is one of batches.

    Raises DataError for a data set of torch's without a length.
    """
    if isinstance(source, list | tuple) or not hasattr(source, "__getitem__"):
        return False
    if hasattr(source, "__len__"):
        return True
    if isinstance(source, Dataset):
        name = type(source).__name__
        raise DataError(f"{name} has no `__len__`: expected one, or an IterableDataset")
    return False


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


def count_steps(batches: Batches, accumulate: int, what: str = "training") -> int:
    """Return the optimizer steps of an epoch; 0 when they cannot be counted beforehand. Raises DataError for none."""
    count = known_length(batches)
    if count is None:
        return 0
    if count == 0:
        causes = "it is empty, or smaller than a batch with drop_last"
        raise DataError(f"the {what} data has no batch: {causes}")
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


def as_it_is(batch: Batch) -> Batch:
    return batch


def steps(
    batches: Iterable[Batch], accumulate: int, steps_left: int, keep: Keep = as_it_is
) -> Iterator[tuple[list[Batch], bool]]:
    """Yield the micro-batches of each step, and whether the step is the last of its epoch.

    Args:
        batches: the batches of the epoch; each may be overwritten when the next one is read.
        accumulate: batches of a step.
        steps_left: how many steps there will be, or 0 when that is not known; then a step is held
            back until the next is there.
        keep: makes a batch last until after the next one is read (`Loader.keep`).
    """
    held: list[Batch] | None = None
    for number, window in enumerate(windows(batches, accumulate, keep), 1):
        if steps_left:
            yield window, number == steps_left
            continue
        kept = [*window[:-1], keep(window[-1])]  # before a validation may read the same loader
        if held is not None:
            yield held, False
        held = kept
    if held is not None:
        yield held, True


def windows(batches: Iterable[Batch], size: int, keep: Keep = as_it_is) -> Iterator[list[Batch]]:
    """Yield lists of `size` batches; the last may be shorter. All but its last batch are kept."""
    window: list[Batch] = []
    for batch in batches:
        if len(window) + 1 < size:
            window.append(keep(batch))
            continue
        yield [*window, batch]
        window = []
    if window:
        yield window
