"""Read the tensors of a checkpoint whose parts are in the files of several processes."""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple, Self

import torch
from safetensors import safe_open
from torch import Tensor

from framework.errors import CheckpointError, short
from framework.runtime.dtensors import with_tensors

SHARDED = "sharded"  # key of the training state: path and shape of each sharded tensor
OFFSETS = "DCP_SHARDING_INFO"  # key of the metadata of a file


class StoredPart(NamedTuple):
    """A part of a tensor: the file that has it, and the position of its first element."""

    file: Any
    offsets: tuple[int, ...]


class PartFiles:
    """Open safetensors files with parts of tensors, in a `with` block.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Iterable[Any]):
        self.paths = list(paths)
        self.stack = ExitStack()
        self.parts: dict[str, list[StoredPart]] = {}

    def __enter__(self) -> Self:
        try:
            for path in self.paths:
                self._read_offsets(self.stack.enter_context(safe_open(path, "pt", device="cpu")))
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.parts = {}
        self.stack.close()

    def _read_offsets(self, file: Any) -> None:
        described = json.loads((file.metadata() or {})[OFFSETS])
        for name in file.keys():  # noqa: SIM118  # `file` itself cannot be iterated
            offsets = tuple(map(int, described[name]["saved_offsets"]))
            self.parts.setdefault(name, []).append(StoredPart(file, offsets))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a whole tensor.

        Raises:
            CheckpointError: parts are missing, or lie outside of the shape.
        """
        parts = [(part.offsets, part.file.get_tensor(name)) for part in self.parts.get(name, ())]
        # Before memory is allocated for a shape that a damaged file may claim.
        stored = sum(part.numel() for _, part in parts)
        if not parts or stored != math.prod(shape):
            raise CheckpointError(
                f"{short(name)} of shape {short(list(shape))} is stored with {stored} elements"
            )
        full = torch.empty(shape, dtype=parts[0][1].dtype)
        for offsets, part in parts:
            ends = [offset + size for offset, size in zip(offsets, part.shape, strict=True)]
            place = full[tuple(map(slice, offsets, ends))]
            if place.shape != part.shape or part.dtype != full.dtype:
                raise CheckpointError(f"a part of {short(name)} does not fit its tensor")
            place.copy_(part)
        return full


def stored_name(index: int, path: Iterable[Any]) -> str:
    """Return the name of a sharded tensor of the training state in the files of parts.

    Args:
        index: different for each tensor.
        path: of the tensor in the state.
    """
    return f"{index}.{'.'.join(map(str, path))}"


def described(tensors: Mapping[tuple[Any, ...], Tensor]) -> list[dict[str, Any]]:
    """Return path and shape of sharded tensors, in the order of their indices."""
    return [{"path": list(path), "shape": list(each.shape)} for path, each in tensors.items()]


def joined(training: dict[str, Any], files: PartFiles) -> dict[str, Any]:
    """Return a training state with its sharded tensors, which are read from the files of parts.

    Raises:
        CheckpointError: as `PartFiles.tensor` does.
    """
    sharded = training.pop(SHARDED, None)
    if not sharded:
        return training
    tensors = {}
    for index, entry in enumerate(sharded):
        path = tuple(entry["path"])
        tensors[path] = files.tensor(stored_name(index, path), tuple(entry["shape"]))
    return dict(with_tensors(training, tensors))
