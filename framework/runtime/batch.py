"""Batches: tensors, alone or nested in tuples, lists, dicts, named tuples and dataclasses.

The usual batch is a tuple of tensors, such as (inputs, targets). It takes a short path in each
function, and any other batch the path of `runtime/torch_internals/pytree.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from framework.errors import DataError

from .torch_internals.pytree import named_branches, tree_leaves, tree_map

Batch = Any
"""Tensors of equal length, such as (inputs, targets) or {"input_ids": ..., "labels": ...}.

It may be nested, and contain other values: lists with a text or a number for each row belong to the
rows, and anything else to the whole batch. The type is `Any`, since with a union of these forms
each task would have to narrow its batch before `inputs, targets = batch`.
"""


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on a device; the batch itself if it is on the device already."""
    if all(tensor.device == device for tensor in tensors_of(batch)):
        return batch
    asynchronous = device.type == "cuda"  # other devices may read the memory too late
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=asynchronous), batch)


def is_flat(batch: Batch) -> bool:
    """Return whether a batch is a tuple of tensors."""
    if type(batch) is not tuple:
        return False
    for part in batch:  # noqa: SIM110  # `all` with a generator takes twice the time
        if not isinstance(part, Tensor):
            return False
    return True


def tensors_of(batch: Batch) -> Sequence[Tensor]:
    """Return the tensors of a batch from left to right."""
    if is_flat(batch):
        flat: tuple[Tensor, ...] = batch
        return flat
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """Return a batch with the results of a function in place of its tensors."""
    if is_flat(batch):
        return tuple([function(tensor) for tensor in batch])
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def count_rows(batch: Batch) -> int:
    """Return the number of rows (samples) of a batch: the length of its first tensor.

    Tensors without an axis have no rows.

    Raises:
        DataError: no tensor of the batch has an axis.
    """
    if type(batch) is tuple and batch and isinstance(batch[0], Tensor) and batch[0].ndim:
        return len(batch[0])
    for tensor in tensors_of(batch):
        if tensor.ndim:
            return len(tensor)
    raise DataError(f"a batch has no tensor with rows: {describe_fields(batch)}")


def select_rows(batch: Batch, first: int, last: int) -> Batch:
    """Return the rows of a batch from `first` to before `last`; tensors are views.

    Raises:
        DataError: the parts of the batch have different numbers of rows.
    """
    if is_flat(batch):
        return tuple([tensor[first:last] for tensor in batch])
    return map_rows(lambda rows: rows[first:last], batch)


def split_rows(batch: Batch, sizes: int | Sequence[int]) -> list[Batch]:
    """Return the parts of a batch, in order; tensors are views.

    Args:
        batch: the batch.
        sizes: the rows of each part, or of all parts but the last one.

    Raises:
        DataError: the parts of the batch have different numbers of rows.
    """
    if is_flat(batch):
        columns = [torch.split(tensor, sizes) for tensor in batch]  # type: ignore[arg-type]
        return list(zip(*columns, strict=True))
    rows = count_rows(batch)
    if isinstance(sizes, int):
        sizes = [min(sizes, rows - first) for first in range(0, rows, sizes)]
    parts = []
    first = 0
    for size in sizes:
        parts.append(select_rows(batch, first, first + size))
        first += size
    return parts


def map_rows(function: Callable[[Any], Any], batch: Batch) -> Batch:
    """Return a batch with the results of a function in place of what has an item for each row.

    That is each tensor with an axis, each list of as many items that are no tensors, and each tuple
    of as many texts.

    Raises:
        DataError: the tensors have different numbers of rows.
    """
    rows = count_rows(batch)

    def is_column(part: Any) -> bool:
        if isinstance(part, list):
            return len(part) == rows and not any(isinstance(item, Tensor) for item in part)
        is_tuple = isinstance(part, tuple) and len(part) == rows
        return is_tuple and all(isinstance(item, str | bytes) for item in part)

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if leaf.ndim == 0:
                return leaf
            if len(leaf) != rows:
                raise DataError(
                    "a batch cannot be split into samples, as its tensors have different "
                    f"lengths: {describe_fields(batch)}"
                )
            return function(leaf)
        return function(leaf) if is_column(leaf) else leaf

    return tree_map(of_leaf, batch, is_column)


def join_rows(batches: Sequence[Batch]) -> Batch:
    """Return batches of one structure, or outputs of a model, joined along their rows.

    Raises:
        DataError: a tensor has no axis of rows, or another value is not the same in all batches.
    """
    if all(isinstance(batch, Tensor) for batch in batches):
        return torch.cat(list(batches))
    columns = iter(zip(*map(tree_leaves, batches), strict=True))

    def joined(leaf: Any) -> Any:
        column = next(columns)
        if isinstance(leaf, Tensor) and leaf.ndim:
            return torch.cat(column)
        is_constant = leaf is None or isinstance(leaf, str | int | float)
        if is_constant and all(other == leaf for other in column):
            return leaf
        raise DataError(
            f"cannot be joined along the samples: {describe_fields(batches[0])}; expected tensors "
            "of shape (samples, ...)"
        )

    return tree_map(joined, batches[0])


def named_parts(value: Any) -> dict[str | int, Any] | None:
    """Return the parts of a batch or output by name or index; None for a value without parts."""
    branches = named_branches(value)
    if branches is not None:
        return branches
    if not isinstance(value, tuple | list):
        return None
    names = getattr(value, "_fields", range(len(value)))  # those of a named tuple
    return dict(zip(names, value, strict=True))


def describe_fields(value: Any) -> str:
    """Return the names and shapes of the parts of a batch or output: "ids (32, 8), labels (32,)".

    At most eight are named.
    """
    described = [f"{name} {kind}".strip() for name, kind in described_parts(value, "")]
    more = ", ..." if len(described) > 8 else ""
    return ", ".join(described[:8]) + more


def described_parts(value: Any, name: str) -> list[tuple[str, str]]:
    """Return the path and the description of each part, see `describe_fields`."""
    if isinstance(value, Tensor):
        return [(name, str(tuple(value.shape)))]
    parts = named_parts(value)
    if not parts or (isinstance(value, list | tuple) and not tensors_of(value)):
        return [(name, type(value).__name__ if value is not None else "None")]
    found = []
    for key, part in parts.items():
        path = f"{name}.{key}" if name else str(key)
        found += described_parts(part, path)
    return found
