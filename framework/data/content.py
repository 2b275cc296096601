"""The content of a data set as a digest: equal digests are equal samples in the same order, wherever the files lie."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from .dataset import Data, splits_of

CHUNK_BYTES = 2**25
READ_BYTES = 2**20
MOST_FILE_BYTES = (
    2**30
)  # of the files of a split; reading more would delay the start by many seconds
READERS = 8  # threads: a network disk answers several at once
OWN = {TensorDataset: ("tensors",), Subset: ("indices", "dataset"), ConcatDataset: ("datasets",)}
"""torch's data sets, and the attributes that hold what their samples are made of."""


def digests_of(data: Data) -> dict[str, str | None]:
    """Return a digest of the content of each split; None for one whose content is not known.

    They are computed once for a data set, which all trials of a sweep may share.
    """
    known = vars(data).get("_digests")
    if known is None:
        known = {name: digest_of(split) for name, split in splits_of(data).items()}
        data._digests = known  # type: ignore[attr-defined]
    return known


def digest_of(split: Any) -> str | None:
    """Return a digest of all that the samples of a split are made of, in their order; None if it is not known."""
    try:
        with ThreadPoolExecutor(READERS) as pool:
            digest = hashlib.sha256()
            for piece in pieces(parts_of(split), pool):
                digest.update(piece)
            return f"sha256:{digest.hexdigest()}"
    except (UnknownContent, OSError):
        return None


class UnknownContent(Exception):
    """A split does not tell what its samples are made of, or that is too much to be read."""


def parts_of(split: Any) -> Any:
    """Return what the samples of a split are made of (its `content()`, or attributes of torch's own data sets)."""
    names = OWN.get(type(split), ())
    if len(names) == 1:
        return getattr(split, names[0])
    if names:
        return [getattr(split, name) for name in names]
    for kind in type(split).__mro__:
        if "content" in vars(kind):
            return split.content()
        if {"__getitem__", "__getitems__", "gather"} & vars(kind).keys():
            break  # it reads samples in its own way, of which an inherited `content` does not know
    raise UnknownContent(type(split).__name__)


def pieces(value: Any, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Yield bytes that differ for different values."""
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {list(value.shape)} ".encode()
        yield from pool.map(hash_of_chunk, chunks(value))
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        text = repr(value).encode()
        yield b"%s %d " % (type(value).__name__.encode(), len(text)) + text
    elif (
        isinstance(value, list | tuple | range)
        and value
        and all(isinstance(each, Path) for each in value)
    ):
        yield f"files {len(value)} ".encode()
        yield from hashes_of_files(value, pool)
    elif isinstance(value, Path):
        yield from pieces([value], pool)
    elif isinstance(value, Mapping):
        yield from pieces([list(pair) for pair in value.items()], pool)
    elif isinstance(value, list | tuple | range):
        yield f"list {len(value)} ".encode()
        for each in value:
            yield from pieces(each, pool)
    else:
        yield from pieces(parts_of(value), pool)


def chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in pieces."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UnknownContent(f"a tensor of layout {tensor.layout}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    for piece in flat.split(max(CHUNK_BYTES // max(flat.element_size(), 1), 1)):
        yield memoryview(piece.view(torch.uint8).numpy())


def hash_of_chunk(chunk: memoryview) -> bytes:
    return hashlib.sha256(chunk).digest()


def hashes_of_files(files: Iterable[Any], pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Yield a digest of the content of each file. Raises UnknownContent if they are too large."""
    names = [os.fspath(file) for file in files]
    if sum(pool.map(os.path.getsize, names, chunksize=256)) > MOST_FILE_BYTES:
        raise UnknownContent(f"more than {MOST_FILE_BYTES:,} bytes of files")
    groups = [names[start : start + 64] for start in range(0, len(names), 64)]
    for group in pool.map(hashes_of_group, groups):
        yield from group


def hashes_of_group(names: list[str]) -> list[bytes]:
    found = []
    for name in names:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnknownContent(f"{name} is not a regular file")
            found.append(hash_of_file(descriptor))
        finally:
            os.close(descriptor)
    return found


def hash_of_file(descriptor: int) -> bytes:
    digest = hashlib.sha256()
    while data := os.read(descriptor, READ_BYTES):
        digest.update(data)
        if len(data) < READ_BYTES:
            break  # a short read of a regular file is its end
    return digest.digest()
