"""Encode columns of numbers and texts as inputs of a model.

How a column is encoded is fitted to the training rows (`fit_column`) and kept in the run
folder as plain JSON types:

- of numbers: {"name", "fill", "mean", "std"}, or {"name", "fill", "knots"} for quantiles;
- of texts: {"name", "texts"}, and "index" if they become one index;
- of a part of dates: as of numbers, with "source", the name of the column, and "part";
- "missing" if empty cells have an input, or a category, of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from framework import DataError, paths

from .columns import Column, Texts
from .dates import look_like_dates
from .scaling import mean_and_std

Categories = Literal["one_hot", "index"]
MAX_KNOTS = 256  # quantiles of a column
MIN_SHARE = 1e-7  # of the values beyond the smallest and the largest one: no score is infinite


class Encoding(NamedTuple):
    """How columns become inputs (see the settings of `data=table`)."""

    normalize: bool = True
    quantile: bool = False
    categories: Categories = "one_hot"
    mark_missing: bool = True
    max_categories: int = 100


def fit_column(label: str, column: Column, encoding: Encoding, name: str) -> dict[str, Any]:
    """Return how a column becomes inputs, fitted to its training rows.

    Args:
        label: the name of the column.
        column: its training rows.
        encoding: the settings.
        name: the name of the data set, for errors.

    Raises:
        DataError: the column is empty, or has more categories than `encoding.max_categories`.
    """
    if isinstance(column, Texts):
        fitted = fit_texts(label, column, encoding, name)
        is_empty = column.codes < 0
    else:
        fitted = fit_numbers(label, column, encoding, name)
        is_empty = column.isnan()
    if encoding.mark_missing and is_empty.any():
        fitted["missing"] = True
    return fitted


def fit_texts(label: str, column: Texts, encoding: Encoding, name: str) -> dict[str, Any]:
    """Return how a column of texts becomes inputs; see `fit_column`."""
    codes: list[int] = torch.unique(column.codes).tolist()
    texts = sorted(column.known[code] for code in codes if code >= 0)
    if not texts:
        raise empty_column(label, name)
    if len(texts) > encoding.max_categories:
        dates = ""
        if look_like_dates(texts):
            dates = f"use the parts of its dates: {paths.override('dates', [label])}; or "
        raise DataError(
            f"{name}: column {label!r} has {len(texts)} different texts, more than "
            f"max_categories={encoding.max_categories}; {dates}raise it, or leave the column out: "
            f"{paths.override('ignore', [label])}"
        )
    fitted: dict[str, Any] = {"name": label, "texts": texts}
    if encoding.categories == "index":
        fitted["index"] = True
    return fitted


def fit_numbers(label: str, values: Tensor, encoding: Encoding, name: str) -> dict[str, Any]:
    """Return how a column of numbers becomes inputs; see `fit_column`."""
    is_empty = values.isnan()
    known = values[~is_empty] if is_empty.any() else values
    if not len(known):
        raise empty_column(label, name)
    mean, std = (moment.item() for moment in mean_and_std(known, [0]))
    if encoding.quantile:
        knots = quantiles(known, min(MAX_KNOTS, len(known))).tolist()
        return {"name": label, "fill": mean, "knots": knots}
    if encoding.normalize:
        return {"name": label, "fill": mean, "mean": mean, "std": std}
    return {"name": label, "fill": mean, "mean": 0.0, "std": 1.0}


def quantiles(values: Tensor, count: int) -> Tensor:
    """Return `count` quantiles at even shares from 0 to 1, interpolated linearly.

    torch.quantile accepts at most 2^24 values.
    """
    position = torch.linspace(0, len(values) - 1, count, dtype=torch.float64)
    ordered = values.sort().values
    below = position.long()
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)


def empty_column(label: str, name: str) -> DataError:
    """Return the error of a column without a training value."""
    return DataError(
        f"{name}: column {label!r} is empty in the training split; "
        f"leave it out: {paths.override('ignore', [label])}"
    )


def encode(table: Mapping[str, Column], fitted: Sequence[dict[str, Any]]) -> Tensor:
    """Return the inputs, shape (rows, inputs), float32 and contiguous."""
    return torch.cat([encode_column(table[column["name"]], column) for column in fitted], dim=1)


def encode_column(cells: Column, fitted: dict[str, Any]) -> Tensor:
    """Return the inputs of a column, shape (rows, inputs)."""
    if isinstance(cells, Texts):
        return encode_texts(cells, fitted)
    return encode_numbers(cells, fitted)


def encode_texts(cells: Texts, fitted: dict[str, Any]) -> Tensor:
    """Return one input of 0 or 1 for each known text, or the index of the text; 0 is unknown."""
    categories = len(fitted["texts"])
    empty_index = 0
    if fitted.get("missing"):
        categories += 1
        empty_index = categories
    index_of = {text: index for index, text in enumerate(fitted["texts"], 1)}
    indices = [index_of.get(text, 0) for text in cells.known]
    indices.append(empty_index)  # of the code -1
    index = torch.tensor(indices)[cells.codes][:, None]
    if fitted.get("index"):
        return index.float()
    return (index == torch.arange(1, categories + 1)).float()


def encode_numbers(values: Tensor, fitted: dict[str, Any]) -> Tensor:
    """Return the scaled numbers, and if "missing" a second input that is 1 for empty cells."""
    is_empty = values.isnan()
    values = values.nan_to_num(fitted["fill"])
    if "knots" in fitted:
        scaled = normal_scores(values, fitted["knots"])
    else:
        scaled = (values - fitted["mean"]) / fitted["std"]
    if not fitted.get("missing"):
        return scaled.float()[:, None]
    return torch.stack([scaled.float(), is_empty.float()], dim=1)


def normal_scores(values: Tensor, knots: Sequence[float]) -> Tensor:
    """Return the normal score of each value: Φ⁻¹ of the share of the training values below it.

    The share is linear between the quantiles `knots`; a value that equals several of them has the
    middle of their shares, as in scikit-learn's QuantileTransformer.
    """
    import numpy

    quantile = numpy.asarray(knots)
    share = numpy.linspace(0, 1, len(quantile))
    first = numpy.interp(values.numpy(), quantile, share)
    last = -numpy.interp(-values.numpy(), -quantile[::-1], -share[::-1])
    scores = torch.from_numpy((first + last) / 2).clamp(MIN_SHARE, 1 - MIN_SHARE)
    return torch.special.ndtri(scores)  # type: ignore[no-any-return]


def category_counts(fitted: Sequence[dict[str, Any]]) -> list[int]:
    """Return for each input 0 for a number, or the number of its categories; see `Data.columns`."""
    counts = []
    for column in fitted:
        missing = int(column.get("missing", False))
        if "texts" not in column:
            counts += [0] * (1 + missing)
        elif column.get("index"):
            counts.append(1 + len(column["texts"]) + missing)
        else:
            counts += [0] * (len(column["texts"]) + missing)
    return counts
