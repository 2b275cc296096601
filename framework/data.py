"""Data sets and how batches are read from them.

A batch is a tuple (inputs, targets) of tensors. A `Data` has splits; a split is a `TensorSplit` (in memory) or any
map-style `torch.utils.data.Dataset` that yields (input, target). `ArrayData` makes a Data of two arrays.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import seeds
from .arrays import (
    Target as Target,
    Targets,
    as_batch_of,
    as_targets,
    moments,
    numbers,
    read_array,
    split_rows,
    standardise,
)
from .errors import DataError, FrameworkError
from .kinds import Shape
from .schema import NonNegativeInt, PositiveInt
from .workers import (
    Batch as Batch,
    IndexBatches,
    SeededSamples,
    Split as Split,
    as_batch,
    collate,
    ignore_signals,
)

Pair = tuple[Tensor, Tensor]


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

        Here: `.npy`, or of `.npz` the array facts["array"], `x`, `inputs` or else the first; brought to
        facts["in_shape"] and standardised with facts["mean"] and facts["std"], as far as these are there.
        Raises DataError when it cannot be read.
        """
        inputs = read_array(path, facts.get("array"))
        if "in_shape" in facts:
            inputs = as_batch_of(inputs, facts["in_shape"], path)
        return standardise(inputs, facts)


class ArrayData(Data):
    """A data set in memory, of an array of inputs and an array of targets.

    Attributes:
        mean, std: what turns a raw input into an input of the model, (raw - mean) / std: numbers or nested lists.
    """

    mean: Any
    std: Any

    def __init__(
        self,
        inputs: Any,
        targets: Any,
        *,
        val: tuple[Any, Any] | None = None,
        test: tuple[Any, Any] | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
        per: Literal["feature", "all"] = "feature",
        unit: float = 1.0,
        target: Target | None = None,
        classes: Sequence[str] = (),
        name: str = "the data",
    ):
        """Draw the splits, number the classes and standardise the inputs by the moments of the training split.

        Args:
            inputs: numbers, shape (rows, *in_shape).
            targets: a number or a text a row, or numbers of shape (rows, values); `as_targets` says what is made of it.
            val: official validation inputs and targets; `val_fraction` is not used then.
            test: official test inputs and targets; `test_fraction` is not used then.
            val_fraction: share of the rows drawn for validation, in the proportions of the classes.
            test_fraction: share of the rows drawn for the test.
            split_seed: seed of the drawing.
            normalize: standardise the inputs; otherwise they are divided by `unit`.
            per: one mean and deviation for each feature (in pictures: for each channel), or one for all.
            unit: the raw value that stands for 1: 255 in pictures.
            target: the kind of target; None infers it.
            classes: names of the classes 0, 1, ...; none: the sorted labels themselves.
            name: what to call the data in an error.

        Raises DataError for lengths that differ, values that are no finite numbers and fewer than two classes.
        """
        given = {"train": (inputs, targets), "val": val, "test": test}
        parts, known = read_parts({part: pair for part, pair in given.items() if pair}, target, classes, name)
        x, y = parts["train"]
        strata = y if known.kind == "class" else torch.zeros(len(x))
        rows = split_rows(strata, 0.0 if val else val_fraction, 0.0 if test else test_fraction, split_seed)
        parts |= {part: (x[chosen], y[chosen]) for part, chosen in rows.items()}

        self.in_shape, self.out_shape = tuple(x.shape[1:]), known.out_shape
        self.target, self.classes = known.kind, known.classes
        self.mean, self.std = moments(parts["train"][0], per) if normalize else (0.0, float(unit))
        for part, (x, y) in parts.items():
            setattr(self, part, TensorSplit(standardise(x, self.facts()), y))

    def facts(self) -> dict[str, Any]:
        return {
            "in_shape": list(self.in_shape),
            "mean": self.mean,
            "std": self.std,
            "target": self.target,
            "classes": list(self.classes),
        }


def read_parts(
    given: Mapping[str, tuple[Any, Any]], target: Target | None, classes: Sequence[str], name: str
) -> tuple[dict[str, Pair], Targets]:
    """Return raw inputs and targets of each part as tensors; the classes are those of all parts together."""
    import numpy

    inputs = {part: numbers(x, f"{name}: the {part} inputs") for part, (x, _) in given.items()}
    for part, (_, y) in given.items():
        if len(y) != len(inputs[part]):
            raise DataError(f"{name}: {len(inputs[part])} {part} inputs, but {len(y)} targets")
        if inputs[part].shape[1:] != inputs["train"].shape[1:]:
            raise DataError(
                f"{name}: {part} inputs have shape {tuple(inputs[part].shape[1:])}, "
                f"those for training {tuple(inputs['train'].shape[1:])}"
            )
    known = as_targets(numpy.concatenate([numpy.asarray(y) for _, y in given.values()]), target, classes, name)
    pieces = known.tensor.split([len(x) for x in inputs.values()])
    return {part: (inputs[part], piece) for part, piece in zip(given, pieces, strict=True)}, known


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
    torch's DataLoader; what is random in reading a sample is then a function of (seed, epoch, sample), so that the
    batches are the same with any number of workers, and after a restart.
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
        in_memory = isinstance(split, torch.utils.data.TensorDataset)
        self.split: Split = TensorSplit(*split.tensors) if in_memory else split  # type: ignore[attr-defined]
        self.workers = workers
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
        indices = indices[start * self.batch_size : len(self) * self.batch_size]
        if isinstance(self.split, TensorSplit):
            return self._gather(self.split.tensors, indices)
        return self._load(epoch, indices)

    def _gather(self, tensors: Sequence[Tensor], indices: Tensor) -> Iterator[Batch]:
        indices = indices.to(tensors[0].device)  # once an epoch, not once a batch
        for position in range(0, len(indices), self.batch_size):
            chunk = indices[position : position + self.batch_size]
            yield tuple(tensor.index_select(0, chunk) for tensor in tensors)

    def _load(self, epoch: int, indices: Tensor) -> Iterator[Batch]:
        chunks = IndexBatches(indices, self.batch_size)
        batches = torch.utils.data.DataLoader(
            SeededSamples(self.split, seeds.derive(self.seed, "sample", epoch)),
            batch_sampler=chunks,
            num_workers=min(self.workers, len(chunks)),
            collate_fn=collate,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # DataLoader would draw from the global one, which the model uses
            pin_memory=torch.cuda.is_available(),
        )
        try:
            for batch in batches:
                if isinstance(batch, FrameworkError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(f"a process that loads data has died, perhaps for want of memory: {error}") from error


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
        return islice(map(as_batch, self.batches), start, None)
