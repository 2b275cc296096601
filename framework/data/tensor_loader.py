"""torch's DataLoader over tensors in memory, read with one gather per batch.

For each batch, a DataLoader takes every sample from its data set and stacks them. With tensors in
memory, `index_select` makes the same batch in one call for each tensor. Gain: see the row
"ours, DataLoader, AdamW()" of `scripts/bench api`.

The DataLoader's own sampler chooses the indices, so the batches and their order are the same, bit
for bit, and all random generators are left in the same state. The tensors of the data set and the
indices of a Subset are looked up when an epoch starts.
"""

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from framework.runtime.torch_internals.loader_indices import batch_and_index_iterators


class TensorSource(NamedTuple):
    """The tensors of a data set, and the rows of them that are its samples.

    Attributes:
        tensors: their first axis is the row.
        rows: shape (samples,), the row of each sample; None if sample i is row i.
        names: those of the tensors if samples are dicts.
    """

    tensors: tuple[Tensor, ...]
    rows: Tensor | None
    names: tuple[str, ...] = ()


def tensor_source(loader: Any) -> TensorSource | None:
    """Return the tensors that a loader reads; None if it must be read batch by batch.

    That is the case unless gathered batches are those of `iter(loader)`: for a DataLoader without
    workers, pinned memory and a `collate_fn` of its own, over a data set of tensors.
    """
    if type(loader) is not DataLoader or loader.batch_sampler is None:
        return None
    if loader.num_workers or loader.pin_memory or loader.collate_fn is not default_collate:
        return None
    return source_of(loader.dataset)


def gathered_batches(loader: DataLoader[Any], source: TensorSource) -> Iterator[Any]:
    """Return an iterator over the batches of an epoch.

    Args:
        loader: the DataLoader, whose sampler chooses the samples.
        source: its `tensor_source`.
    """
    batches, index_lists = batch_and_index_iterators(loader)
    if index_lists is None:
        return batches
    return (gather_batch(source, indices, loader.dataset) for indices in index_lists)


def gather_batch(source: TensorSource, indices: Any, dataset: Dataset[Any]) -> Any:
    """Return the batch of some samples.

    Args:
        source: the tensors of the data set.
        indices: the item of a batch sampler: usually a list of ints.
        dataset: reads indices that are not a list of ints from 0 to the number of samples.
    """
    if not isinstance(indices, Tensor | Sequence):
        indices = list(indices)  # an iterator can be read only once
    if not isinstance(indices, Tensor) and not all(map(is_index, indices)):
        return read_samples(dataset, indices)
    try:
        rows = torch.as_tensor(indices)
        if rows.dtype != torch.int64 or rows.ndim != 1:
            return read_samples(dataset, indices)
        if source.rows is not None:
            rows = source.rows.index_select(0, rows)
        columns = [tensor.index_select(0, rows) for tensor in source.tensors]
        return dict(zip(source.names, columns, strict=True)) if source.names else columns
    except (TypeError, ValueError, IndexError, RuntimeError):
        return read_samples(dataset, indices)


def is_index(index: Any) -> bool:
    """Return whether an index is an int of Python or NumPy; a tensor may have an axis."""
    return type(index) is int or (isinstance(index, Integral) and not isinstance(index, bool))


def read_samples(dataset: Dataset[Any], indices: Any) -> Any:
    """Return the batch of some samples as a DataLoader makes it, from one sample at a time."""
    return default_collate([dataset[index] for index in indices])


def source_of(dataset: Any) -> TensorSource | None:
    """Return the tensors of a data set, or None if it does not simply index tensors.

    It does so if it is a TensorDataset, a StackDataset of tensors or a Subset of these (as
    `torch.utils.data.random_split` makes), and no subclass changes how a sample is read.
    """
    if reads_like(dataset, Subset):
        return source_of_subset(dataset)
    if reads_like(dataset, TensorDataset):
        tensors = dataset.tensors
    elif reads_like(dataset, StackDataset):
        tensors = dataset.datasets
    else:
        return None
    names: tuple[str, ...] = ()
    if isinstance(tensors, dict):
        names = tuple(tensors)
        tensors = tuple(tensors.values())
    if not isinstance(tensors, tuple) or not tensors or not all(map(is_indexable, tensors)):
        return None
    return TensorSource(tensors, None, names)


def source_of_subset(subset: Any) -> TensorSource | None:
    """Return the tensors of a Subset, or None if an index is negative or too large."""
    source = source_of(subset.dataset)
    rows = index_tensor(subset.indices)
    if source is None or rows is None:
        return None
    if source.rows is None:
        return source._replace(rows=rows)
    if len(rows) and int(rows.max()) >= len(source.rows):
        return None
    return source._replace(rows=source.rows[rows])


def reads_like(dataset: Any, base: type[Any]) -> bool:
    """Return whether a data set is of a class, and reads its samples with the methods of it."""
    if not isinstance(dataset, base):
        return False
    methods = ("__getitem__", "__getitems__", "__len__")
    kind = type(dataset)
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in methods)


def index_tensor(indices: Sequence[int]) -> Tensor | None:
    """Return the indices of a Subset as a tensor; None if they are not plain, from 0 on."""
    try:
        rows = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError):
        return None
    if rows.dtype != torch.int64 or rows.ndim != 1 or (len(rows) and int(rows.min()) < 0):
        return None
    return rows.cpu()


def is_indexable(tensor: Any) -> bool:
    """Return whether `index_select` of a tensor equals stacking its rows."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.ndim == 0:
        return False
    return tensor.device.type == "cpu" and not tensor.requires_grad and not tensor.is_quantized
