"""Digests of the content of data sets.

Equal digests stand for equal samples in the same order, at any path.
"""

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
MOST_FILE_BYTES = 2**30  # of a split; reading more would delay the start by many seconds
READERS = 8  # threads: a network disk serves several at once
FILES_PER_TASK = 64
CONTENT_ATTRIBUTES = {
    TensorDataset: ("tensors",),
    Subset: ("indices", "dataset"),
    ConcatDataset: ("datasets",),
}
"""The attributes of torch's data sets that determine their samples."""


def digests_of(data: Data) -> dict[str, str | None]:
    """Return the digest of each split; None for a split with unknown content.

    They are computed once for a data set, which the trials of a sweep may share.
    """
    digests: dict[str, str | None] | None = vars(data).get("_digests")
    if digests is None:
        digests = {name: digest_of(split) for name, split in splits_of(data).items()}
        vars(data)["_digests"] = digests
    return digests


def digest_of(split: Any) -> str | None:
    """Return the digest of the content of a split in its order; None if it is not known."""
    try:
        with ThreadPoolExecutor(READERS) as pool:
            digest = hashlib.sha256()
            for piece in pieces(parts_of(split), pool):
                digest.update(piece)
            return f"sha256:{digest.hexdigest()}"
    except (UnknownContent, OSError):
        return None


class UnknownContent(Exception):
    """The content of a split is not known, or too large to read."""


def parts_of(split: Any) -> Any:
    """Return the content of a split: its `content()`, or attributes of a data set of torch."""
    names = CONTENT_ATTRIBUTES.get(type(split), ())
    if len(names) == 1:
        return getattr(split, names[0])
    if names:
        return [getattr(split, name) for name in names]
    for kind in type(split).__mro__:
        if "content" in vars(kind):
            return split.content()
        if {"__getitem__", "__getitems__", "gather"} & vars(kind).keys():
            break  # an inherited `content` does not describe these samples
    raise UnknownContent(type(split).__name__)


def pieces(value: Any, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Yield bytes that differ for different values."""
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {list(value.shape)} ".encode()
        yield from pool.map(hash_of_chunk, byte_chunks(value))
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        text = repr(value).encode()
        yield b"%s %d " % (type(value).__name__.encode(), len(text)) + text
    elif is_list_of_paths(value):
        yield f"files {len(value)} ".encode()
        yield from hashes_of_files(value, pool)
    elif isinstance(value, Path):
        yield from pieces([value], pool)
    elif isinstance(value, Mapping):
        yield from pieces([list(pair) for pair in value.items()], pool)
    elif isinstance(value, list | tuple | range):
        yield f"list {len(value)} ".encode()
        for item in value:
            yield from pieces(item, pool)
    else:
        yield from pieces(parts_of(value), pool)


def is_list_of_paths(value: Any) -> bool:
    """Return whether a value is a list or tuple of paths that is not empty."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(item, Path) for item in value)


def byte_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in chunks of about CHUNK_BYTES."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise UnknownContent(f"a tensor of layout {tensor.layout}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    for chunk in torch.split(flat, max(CHUNK_BYTES // max(flat.element_size(), 1), 1)):
        numbers: Any = chunk.view(torch.uint8).numpy()
        yield memoryview(numbers)


def hash_of_chunk(chunk: memoryview) -> bytes:
    """Return the hash of some bytes."""
    return hashlib.sha256(chunk).digest()


def hashes_of_files(files: Iterable[Any], pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """Yield the hash of each file.

    Raises:
        UnknownContent: the files are too large.
    """
    names = [os.fspath(file) for file in files]
    if sum(pool.map(os.path.getsize, names, chunksize=256)) > MOST_FILE_BYTES:
        raise UnknownContent(f"more than {MOST_FILE_BYTES:,} bytes of files")
    starts = range(0, len(names), FILES_PER_TASK)
    groups = [names[start : start + FILES_PER_TASK] for start in starts]
    for hashes in pool.map(hashes_of_group, groups):
        yield from hashes


def hashes_of_group(names: list[str]) -> list[bytes]:
    """Return the hash of each file.

    Raises:
        UnknownContent: one of them is not a regular file.
    """
    hashes = []
    for name in names:
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnknownContent(f"{name} is not a regular file")
            hashes.append(hash_of_file(descriptor))
        finally:
            os.close(descriptor)
    return hashes


def hash_of_file(descriptor: int) -> bytes:
    """Return the hash of an open file."""
    digest = hashlib.sha256()
    while data := os.read(descriptor, READ_BYTES):
        digest.update(data)
        if len(data) < READ_BYTES:
            break  # a short read of a regular file is its end
    return digest.digest()
