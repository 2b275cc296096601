"""Targets of a data set: classes are numbered, values become floats."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from framework import DataError, Shape, Target, short

from .arrays import numbers
from .columns import Texts
from .scaling import check_integers, needs_float64

MAX_INFERRED_CLASSES = 20
"""Integers with more different values than this are inferred to be values, not classes."""


class Targets(NamedTuple):
    """Targets as a tensor (see `Data.target`), their kind, and the names of the classes."""

    tensor: Tensor
    kind: Target
    classes: list[str]

    @property
    def out_shape(self) -> Shape:
        """The shape of one output of a model."""
        return (len(self.classes),) if self.kind == "class" else tuple(self.tensor.shape[1:])


def as_targets(
    values: Any, kind: Target | None = None, classes: Sequence[str] = (), name: str = "the data"
) -> Targets:
    """Return the targets of a data set.

    Args:
        values: texts or numbers, shape (rows,), or numbers of shape (rows, values).
        kind: what they are; None infers it: texts, booleans and at most 20 different integers are
            classes, other numbers are values.
        classes: the names of the labels 0, 1, ...; if empty, the classes are the sorted labels.
        name: the name of the data set, for errors.

    Returns:
        Classes as int64; values as float32, or as float64 where float32 would lose digits.

    Raises:
        DataError: a target is NaN or of another kind, or there are fewer than two classes.
    """
    import numpy

    if isinstance(values, Texts):
        return text_targets(values, name)
    values = numpy.asarray(values)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dtype.kind == "f" and not numpy.isfinite(values).all():
        row = int(numpy.argwhere(~numpy.isfinite(values))[0, 0])
        raise DataError(
            f"{name}: the target of row {row + 1} is {values[row]}; drop the row or fill it in"
        )
    if kind is None:
        kind = "class" if looks_like_classes(values) else "value"
    if kind == "class":
        return class_targets(values, classes, name)
    tensor = numbers(values, f"{name}: the targets")
    if kind == "value":
        if needs_float64(tensor):
            check_integers(tensor, f"{name}: the targets")
            return Targets(tensor.double(), "value", [])
        return Targets(tensor.float(), "value", [])
    tensor = tensor.float()
    if not ((tensor == 0) | (tensor == 1)).all():
        raise DataError(f"{name}: targets of kind labels must be 0 or 1, one column for each label")
    return Targets(tensor, kind, list(classes) or [str(label) for label in range(tensor.shape[1])])


def known_classes(values: Any, classes: Sequence[str], name: str) -> Tensor:
    """Return the indices of targets among the classes of a training, shape (rows,).

    Args:
        values: texts or numbers, shape (rows,).
        classes: the names of the classes.
        name: the place of the targets, for errors.

    Raises:
        DataError: a target is none of the classes.
    """
    import numpy

    if isinstance(values, Texts):
        labels = values.known
        codes = values.codes
    else:
        found, inverse = numpy.unique(numpy.asarray(values), return_inverse=True)
        if found.dtype.kind == "f" and (found == found.round()).all():
            found = found.astype(int)
        labels = [str(label) for label in found.tolist()]
        codes = torch.from_numpy(inverse.reshape(-1))
    used = torch.unique(codes).tolist()
    index_of = {label: index for index, label in enumerate(classes)}
    for code in used:
        if labels[code] not in index_of:
            expected = short(", ".join(classes), 100, quote=False)
            raise DataError(
                f"{name}: {labels[code]!r} is no class of the run; expected one of {expected}"
            )
    return torch.tensor([index_of.get(label, -1) for label in labels])[codes]


def looks_like_classes(values: Any) -> bool:
    """Return whether targets are inferred to be classes."""
    if values.ndim != 1 or values.dtype.kind == "f":
        return False
    return values.dtype.kind not in "iu" or len(set(values.tolist())) <= MAX_INFERRED_CLASSES


def class_targets(labels: Any, classes: Sequence[str], name: str) -> Targets:
    """Return classes that are numbers or texts in a NumPy array."""
    import numpy

    if labels.ndim != 1 or labels.dtype.kind not in "USbiuf":
        raise DataError(
            f"{name}: expected one number or text for each row as its class, "
            f"got {labels.dtype} of shape {labels.shape[1:]}"
        )
    found, indices = numpy.unique(labels, return_inverse=True)
    if len(found) < 2:
        raise one_class("".join(map(str, found)), name)
    if not classes:
        if found.dtype.kind == "f" and (found == found.round()).all():
            found = found.astype(int)
        names = [str(label) for label in found.tolist()]
        return Targets(torch.from_numpy(indices.reshape(-1)), "class", names)
    if found.dtype.kind not in "iu" or found[0] < 0 or found[-1] >= len(classes):
        raise DataError(
            f"{name}: labels range from {found[0]} to {found[-1]}, but classes has "
            f"{len(classes)} names"
        )
    return Targets(torch.from_numpy(labels.astype(numpy.int64)), "class", list(classes))


def text_targets(texts: Texts, name: str) -> Targets:
    """Return classes that are texts, numbered in sorted order; a text of no row is no class."""
    used: list[int] = torch.unique(texts.codes).tolist()
    names = sorted(texts.known[code] for code in used)
    if len(names) < 2:
        raise one_class("".join(names), name)
    index_of = {text: index for index, text in enumerate(names)}
    indices = torch.tensor([index_of.get(text, -1) for text in texts.known])
    return Targets(indices[texts.codes], "class", names)


def one_class(label: str, name: str) -> DataError:
    """Return the error of targets that are all the same class."""
    return DataError(f"{name}: every target is {label!r}; expected at least two classes")
