"""Base class of data sets of an array of inputs and an array of targets, in memory."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework import (
    Data,
    DataError,
    InputFile,
    InputRows,
    Preparation,
    Shape,
    Target,
    TensorSplit,
)

from .preparations.arrays import Standardize
from .readers.arrays import batch_chunks, numbers, read_batch
from .readers.scaling import (
    AutoScaling,
    Per,
    check_digits,
    check_integers,
    fit_scale,
    moments,
    needs_float64,
    scaled,
    standard_facts,
    standardize,
)
from .readers.splits import split_parts
from .readers.targets import Targets, as_targets

Pair = tuple[Tensor, Tensor]
"""Inputs and targets."""


class ArrayData(Data):
    """A data set of an array of inputs and an array of targets.

    Attributes:
        mean, std: numbers or nested lists; the model takes (raw input - mean) / std.
        float64: whether this is computed in float64 (see `needs_float64`).
    """

    mean: Any
    std: Any
    float64: bool
    input_suffixes = (".npy", ".npz")

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
        per: Per = "feature",
        unit: float = 1.0,
        target: Target | None = None,
        classes: Sequence[str] = (),
        scale_target: AutoScaling = "auto",
        name: str = "the data",
    ):
        """Draw the splits, number the classes, and standardize the inputs by the training split.

        Args:
            inputs: numbers, shape (rows, *in_shape).
            targets: texts or numbers, shape (rows,), or numbers of shape (rows, values); see
                `as_targets`.
            val: official validation inputs and targets; `val_fraction` is not used then.
            test: official test inputs and targets; `test_fraction` is not used then.
            val_fraction: share of the rows for validation, with the same share of each class.
            test_fraction: share of the rows for the test.
            split_seed: seed of the draw.
            normalize: standardize the inputs; otherwise they are divided by `unit`.
            per: one mean and deviation for each feature (of images: for each channel), or one for
                all numbers.
            unit: the raw value that becomes 1 without normalize: 255 for pixels.
            target: the kind of the targets; None infers it.
            classes: the names of the classes 0, 1, ...; if empty, the sorted labels.
            scale_target: how values are scaled for training (see `fit_scale`).
            name: the name of the data, for errors.

        Raises:
            DataError: lengths differ, values are not finite numbers, or there is only one class.
        """
        pairs = {"train": (inputs, targets)}
        if val is not None:
            pairs["val"] = val
        if test is not None:
            pairs["test"] = test
        parts, known = read_parts(pairs, target, classes, name)
        x, y = parts["train"]
        strata = y if known.kind == "class" else torch.zeros(len(x))
        sizes = {part: len(pair[0]) for part, pair in parts.items()}
        rows = split_parts(strata, sizes, val_fraction, test_fraction, split_seed)
        self.in_shape = tuple(x.shape[1:])
        self.out_shape = known.out_shape
        self.target = known.kind
        self.classes = known.classes
        if known.kind == "class":
            self.strata = known.tensor
        scaling = scale_target if known.kind == "value" else None
        self.fit(list(parts.values()), per if normalize else None, unit, scaling, name, rows)

    def fit(
        self,
        parts: Sequence[Pair],
        per: Per | None,
        unit: float,
        scaling: AutoScaling | None,
        name: str,
        rows: Mapping[str, Tensor],
    ) -> None:
        """Fit the scaling to the training rows, and set the splits.

        Args:
            parts: raw inputs and targets, whose rows are numbered through all parts.
            per: see `moments`; None divides the inputs by `unit` instead.
            unit: the raw value that becomes 1 then.
            scaling: how targets that are values are scaled; None for other targets.
            name: the name of the data, for errors.
            rows: the row numbers of each split.
        """
        self.rows = rows
        self.refit = partial(self.fit, parts, per, unit, scaling, name)
        x, y = take_rows(parts, rows["train"])
        self.float64 = False
        if per is None:
            check_digits(x, f"{name}: the inputs", "data.normalize=true")
            self.mean = 0.0
            self.std = float(unit)
        else:
            check_integers(x, f"{name}: the inputs")
            self.float64 = needs_float64(x, per)
            self.mean, self.std = moments(x, per, self.float64)
        if scaling is not None:
            self.scale = fit_scale(y, torch.arange(len(y)), scaling, name)
        for part, chosen in rows.items():
            x, y = take_rows(parts, chosen)
            if scaling is not None:
                y = scaled(y, self.scale)
            setattr(self, part, TensorSplit(standardize(x, self.facts()), y))

    @classmethod
    def preparation(cls, facts: dict[str, Any], in_shape: Shape) -> Preparation | None:
        return Standardize(facts, in_shape)

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        return read_batch(path, facts)

    @classmethod
    def read_chunks(cls, file: InputFile, facts: dict[str, Any]) -> Iterator[InputRows]:
        if file.stream is not None or file.ids:
            yield from super().read_chunks(file, facts)
            return
        for inputs, before in batch_chunks(file.path, file.rows, facts):
            yield InputRows(inputs, first=before + 1)

    def facts(self) -> dict[str, Any]:
        facts = standard_facts(self)
        if self.float64:
            facts["float64"] = True
        return facts


def take_rows(parts: Sequence[Pair], rows: Tensor) -> Pair:
    """Return inputs and targets of some rows, which are numbered through all parts."""
    start = 0
    for inputs, targets in parts:
        if len(rows) and start <= rows.min() and rows.max() < start + len(inputs):
            return inputs[rows - start], targets[rows - start]
        start += len(inputs)
    inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return inputs[rows], targets[rows]


def read_parts(
    pairs: Mapping[str, tuple[Any, Any]], target: Target | None, classes: Sequence[str], name: str
) -> tuple[dict[str, Pair], Targets]:
    """Return raw inputs and targets of each part as tensors; all parts have the same classes."""
    import numpy

    inputs = {part: numbers(x, f"{name}: the {part} inputs") for part, (x, _) in pairs.items()}
    for part, (_, y) in pairs.items():
        if len(y) != len(inputs[part]):
            raise DataError(f"{name}: {len(inputs[part])} {part} inputs, but {len(y)} targets")
        if inputs[part].shape[1:] != inputs["train"].shape[1:]:
            raise DataError(
                f"{name}: {part} inputs have shape {tuple(inputs[part].shape[1:])}, "
                f"those for training {tuple(inputs['train'].shape[1:])}"
            )
    targets = numpy.concatenate([numpy.asarray(y) for _, y in pairs.values()])
    known = as_targets(targets, target, classes, name)
    pieces = torch.split(known.tensor, [len(x) for x in inputs.values()])
    parts = {}
    for part, piece in zip(pairs, pieces, strict=True):
        parts[part] = (inputs[part], piece)
    return parts, known
