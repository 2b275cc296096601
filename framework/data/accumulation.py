"""From the sources of data that `fit` accepts to batches, and from batches to training steps."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
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
from framework.runtime.memory_format import ChannelsLast, choose_memory_format

from .dataset import Batch, Data, ForeignLoader, Loader, Split, TensorSplit, known_length
from .workers import as_batch

Batches = Loader | ForeignLoader
RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
Source = Data | Split | Loader | Iterable[Any]
Item = TypeVar("Item")
"""A batch, or the batches of several trials that train as one."""


def as_batches(
    source: Source,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    device: torch.device,
    channels_last: ChannelsLast = False,
    model: nn.Module | None = None,
) -> Batches:
    """Return a loader of the batches of a source.

    Args:
        source: a split, a loader, or an iterable of batches.
        batch_size: samples per batch, for a split.
        shuffle: whether to shuffle a split.
        seed: the seed of the order of a split.
        device: the device to read for.
        channels_last: whether to convert images (see `Loader`, which has a setting of its own).
        model: the model that reads the batches, for `channels_last=auto`.

    Raises:
        DataError: the source is a `Data`, which has several splits.
    """
    if isinstance(source, Data):
        raise DataError(
            f"{type(source).__name__} has several splits: pass one of them, such as `data.test`"
        )
    if isinstance(source, IterableDataset):  # torch gives it a `__getitem__` that only raises
        source = DataLoader(source, batch_size=batch_size)
    elif is_map_style(source):
        source = Loader(
            source,
            batch_size,
            batch_size,
            channels_last=channels_last,
            shuffle=shuffle,
            seed=seed,
            model=model,
        )
    if isinstance(source, Loader | ForeignLoader):
        return source.to(device)
    memory_format = choose_memory_format(channels_last, model)
    return ForeignLoader(source, memory_format).to(device)  # type: ignore[arg-type]  # an iterable


def is_map_style(source: Any) -> TypeGuard[Split]:
    """Return whether a source consists of samples; a list or tuple consists of batches.

    Raises:
        DataError: a data set of torch without a length.
    """
    if isinstance(source, list | tuple) or not hasattr(source, "__getitem__"):
        return False
    if hasattr(source, "__len__"):
        return True
    if isinstance(source, Dataset):
        raise DataError(
            f"{type(source).__name__} has no `__len__`: expected one, or an IterableDataset"
        )
    return False


def known_targets(
    targets_of: Callable[[Batch], Tensor | None], *loaders: Batches
) -> list[Tensor] | None:
    """Return all targets of loaders; None if not all are in memory.

    Args:
        targets_of: returns the targets of a batch, None if they are not known.
        loaders: of the batches.
    """
    targets: list[Tensor] = []
    for loader in loaders:
        batches = batches_in_memory(loader)
        if batches is None:
            return None
        for batch in batches:
            found = targets_of(batch)
            if found is None:
                return None
            targets.append(found)
    return targets


def batches_in_memory(batches: Batches) -> Sequence[Batch] | None:
    """Return batches with all samples of a loader, or None if they are not known to be in memory.

    They are known for a split, a list of batches and a DataLoader over a TensorDataset.
    """
    if isinstance(batches, Loader):
        split = batches.split
        if batches.tensors is None or not isinstance(split, TensorSplit):
            return None
        return [split.as_batch(batches.tensors)]
    source = batches.batches
    if type(source) in (list, tuple):
        return [as_batch(batch) for batch in source]
    if not isinstance(source, DataLoader) or source.collate_fn is not default_collate:
        return None
    return [source.dataset.tensors] if type(source.dataset) is TensorDataset else None


def count_steps(batches: Batches, accumulate: int, data_name: str = "training") -> int:
    """Return the number of optimizer steps of an epoch; 0 if it is not known in advance.

    Args:
        batches: a loader.
        accumulate: batches per step.
        data_name: "training" or "validation", for the message.

    Raises:
        DataError: the loader has no batch.
    """
    count = known_length(batches)
    if count is None:
        return 0
    if count == 0:
        raise DataError(
            f"the {data_name} data has no batch: "
            "it is empty, or smaller than a batch with drop_last"
        )
    return -(-count // accumulate)


def count_total(steps_per_epoch: int, max_epochs: int | None, max_steps: int | None) -> int:
    """Return the number of optimizer steps of a run by its first limit; 0 if it is not known."""
    limits = [] if max_steps is None else [max_steps]
    if max_epochs is not None and steps_per_epoch:
        limits.append(max_epochs * steps_per_epoch)
    return min(limits, default=0)


def other_order(batches: Batches, in_epoch: bool) -> str | None:
    """Return the reason why a resumed fit reads other batches than an uninterrupted one, or None.

    Only the samplers of torch are known; any other iterable is expected to have a fixed order.

    Args:
        batches: the loader of the resumed fit.
        in_epoch: whether the saved fit stopped inside an epoch.
    """
    if not isinstance(batches, ForeignLoader) or batches.continues:
        return None
    loader = batches.batches
    if not isinstance(loader, DataLoader):
        return None
    samplers = [loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    random = [sampler for sampler in samplers if isinstance(sampler, RANDOM_SAMPLERS)]
    if any(sampler.generator is not None for sampler in random):
        return "the DataLoader shuffles with a generator of its own, whose state is not saved"
    if random and in_epoch:
        return "it stopped inside an epoch, and the DataLoader shuffles the rest in another order"
    return None


def training_epoch(batches: Batches, epoch: int, start: int, accumulate: int) -> Iterator[Batch]:
    """Return an iterator over the batches of an epoch of training (see `epoch` of the loaders)."""
    if isinstance(batches, ForeignLoader):
        return batches.training_epoch(epoch, start, accumulate)
    return batches.epoch(epoch, start)


def keep_as_is(item: Item) -> Item:
    """Return the argument."""
    return item


def step_windows(
    batches: Iterable[Item],
    accumulate: int,
    steps_left: int,
    keep: Callable[[Item], Item] = keep_as_is,
) -> Iterator[tuple[list[Item], bool]]:
    """Yield the batches of each step, and whether the step is the last one of its epoch.

    Args:
        batches: the batches of the epoch; each may be overwritten when the next one is read.
        accumulate: batches per step.
        steps_left: the number of steps, or 0 if it is not known; then a step is yielded only after
            the next one is read.
        keep: makes a batch stay valid after the next one is read (`Loader.keep`).
    """
    previous: list[Item] | None = None
    for number, window in enumerate(windows(batches, accumulate, keep), 1):
        if steps_left:
            yield window, number == steps_left
            continue
        kept = [*window[:-1], keep(window[-1])]  # before a validation may read the same loader
        if previous is not None:
            yield previous, False
        previous = kept
    if previous is not None:
        yield previous, True


def windows(
    batches: Iterable[Item], size: int, keep: Callable[[Item], Item] = keep_as_is
) -> Iterator[list[Item]]:
    """Yield lists of `size` batches; the last list may be shorter.

    `keep` is called for all batches of a list but the last one.
    """
    window: list[Item] = []
    for batch in batches:
        if len(window) + 1 < size:
            window.append(keep(batch))
            continue
        yield [*window, batch]
        window = []
    if window:
        yield window
