"""Data sets and how batches are read from them.

A batch is a tuple (inputs, targets) of tensors. A `Data` has splits; a split is a `TensorSplit` (in memory) or any
map-style `torch.utils.data.Dataset` that yields (input, target).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from . import seeds
from .errors import DataError
from .kinds import Shape
from .schema import NonNegativeInt, PositiveInt

Batch = tuple[Tensor, ...]
Target = Literal["class", "labels", "value", "none"]


class Split(Protocol):
    """What a split must have; any map-style torch Dataset does."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class TensorSplit:
    """A split in memory: tensors with a common first axis, indexed together (an int, a slice or index tensor)."""

    def __init__(self, *tensors: Tensor):
        sizes = {len(tensor) for tensor in tensors}
        if len(sizes) != 1:
            raise DataError(f"the tensors of a split must have one length, not {[len(t) for t in tensors]}")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: Any) -> Batch:
        return tuple(tensor[index] for tensor in self.tensors)

    def to(self, device: torch.device) -> "TensorSplit":
        return TensorSplit(*(tensor.to(device) for tensor in self.tensors))


class Data:
    """A data set. A plugin's `__init__` reads it and sets these attributes.

    Attributes:
        train, val, test: splits; val and test may be None.
        in_shape: shape of one input, without the batch axis.
        out_shape: (classes,) for classes, (labels,) for labels, (values,) for values.
        target: "class" (int64 index, shape ()), "labels" (0/1 floats, shape (labels,)), "value" (floats, (values,)).
        classes: the names of classes or labels, in the order of the outputs; empty for values.

    Raises DataError when the data is missing, empty or malformed, with the file and what would be right.
    """

    train: Split
    val: Split | None = None
    test: Split | None = None
    in_shape: Shape
    out_shape: Shape
    target: Target = "class"
    classes: Sequence[str] = ()

    def facts(self) -> dict[str, Any]:
        """Return what `read_inputs` needs beyond the file (plain JSON types), kept in the run folder for `predict`."""
        return {}

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read a user's file as a batch of inputs, prepared as in training, shape (rows, *in_shape).

        Here: `.npy`, or the first array of `.npz`, standardised with facts["mean"] and facts["std"] if there.
        Raises DataError when it cannot be read.
        """
        return standardise(read_array(path), facts)


def read_array(path: Path) -> Tensor:
    """Read a numeric array from `.npy`, or from `.npz` its array `x`/`inputs` or else its first one."""
    import numpy

    if path.suffix not in (".npy", ".npz"):
        raise DataError(f"{path}: this data set reads .npy and .npz files, not {path.suffix or 'a file without suffix'}")
    try:
        loaded = numpy.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an array: {error}") from error
    if isinstance(loaded, numpy.ndarray):
        return torch.as_tensor(loaded)
    names = [name for name in ("x", "inputs") if name in loaded.files] or loaded.files
    if not names:
        raise DataError(f"{path} holds no array")
    return torch.as_tensor(loaded[names[0]])


def standardise(inputs: Tensor, facts: dict[str, Any]) -> Tensor:
    """Return (inputs - mean) / std as float32, with the facts' "mean" and "std" (numbers or nested lists)."""
    if "mean" not in facts:
        return inputs.float()
    mean, std = (torch.as_tensor(facts[name], dtype=torch.float32) for name in ("mean", "std"))
    return (inputs.float() - mean) / std


def check_data(data: Data) -> None:
    """Raise DataError when a split is empty."""
    for name in ("train", "val", "test"):
        split = getattr(data, name, None)
        if split is not None and len(split) == 0:
            raise DataError(f"the {name} split of {type(data).__name__} is empty")
    if getattr(data, "train", None) is None:
        raise DataError(f"{type(data).__name__} has no train split")


class Loader:
    """Reads the batches of a split. The order is a pure function of (seed, epoch): nothing is kept between epochs.

    In memory, a batch is one indexed read of each tensor, on the device where they are. Anything else goes through
    torch's DataLoader.
    """

    def __init__(
        self,
        split: Split,
        batch_size: PositiveInt = 32,
        eval_batch_size: PositiveInt = 256,
        workers: NonNegativeInt = 0,
        drop_last: bool = False,
        *,
        shuffle: bool = False,
        seed: int = 0,
    ):
        """Prepare to read `split`.

        Args:
            batch_size: training samples a batch.
            eval_batch_size: samples a batch in validation, test and prediction.
            workers: processes that load samples ahead (0: none; data in memory needs none).
            drop_last: leave out the last training batch of an epoch when it is smaller.
        """
        self.split, self.workers = split, workers
        self.batch_size = batch_size if shuffle else eval_batch_size
        self.shuffle, self.seed = shuffle, seed
        self.drop_last = drop_last and shuffle
        if self.drop_last and len(split) < self.batch_size:
            raise DataError(f"drop_last leaves no batch: {len(split)} samples, batch_size {self.batch_size}")

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch number `start` on."""
        size = len(self.split)
        indices = seeds.order(self.seed, epoch, size) if self.shuffle else torch.arange(size)
        chunks = indices.split(self.batch_size)[start : len(self)]
        if isinstance(self.split, TensorSplit):
            return self._gather(chunks)
        return self._load(chunks)

    def _gather(self, chunks: Sequence[Tensor]) -> Iterator[Batch]:
        tensors = self.split.tensors  # type: ignore[attr-defined]
        device = tensors[0].device
        for chunk in chunks:
            chunk = chunk.to(device)
            yield tuple(tensor.index_select(0, chunk) for tensor in tensors)

    def _load(self, chunks: Sequence[Tensor]) -> Iterator[Batch]:
        batches = torch.utils.data.DataLoader(
            self.split,  # type: ignore[arg-type]
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=min(self.workers, len(chunks)),
            pin_memory=torch.cuda.is_available(),
        )
        return (tuple(batch) for batch in batches)


class ForeignLoader:
    """A person's own iterable of batches (a plain DataLoader), read as it is."""

    def __init__(self, batches: Iterable[Any]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch; calls `set_epoch` on the sampler when it has one."""
        sampler = getattr(self.batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)  # type: ignore[union-attr]
        return islice((tuple(batch) for batch in self.batches), start, None)
