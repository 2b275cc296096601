"""The preparation of tables: numbers and categories, see `readers/encoding.py`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from framework import Preparation, RawInput
from framework_plugins.datasets.readers.columns import MISSING

from .quantiles import normal_quantile, share_below


class Columns(Preparation):
    """Cells of a table as inputs, see `readers/encoding.py`.

    The raw inputs are the numbers, NaN for an empty cell, and the categories as indices: 1 for the
    first text of a column, 0 for an unknown one, -1 for an empty cell.

    Args:
        columns: how each column becomes inputs, see `fit_column`.
    """

    imports = ("csv",)

    def __init__(self, columns: Sequence[dict[str, Any]]):
        super().__init__()
        self.columns = columns
        numbers = [column["name"] for column in columns if "texts" not in column]
        categories = {each["name"]: each["texts"] for each in columns if "texts" in each}
        self.raw = {}
        lines = ["with open(file, newline='', encoding='utf-8') as table:"]
        lines.append("    rows = list(csv.DictReader(table))  # a .csv file with the columns")
        lines.append('empty = about["empty"]')
        fields = []
        if numbers:
            text = f"columns {', '.join(numbers)}; NaN for an empty cell"
            self.raw["numbers"] = RawInput(torch.float64, (len(numbers),), text)
            lines.append("numbers = [")
            lines.append("    [np.nan if row[name].strip().lower() in empty else float(row[name])")
            lines.append('     for name in about["numbers"]] for row in rows]')
            fields.append('"numbers": np.array(numbers)')
        if categories:
            text = f"columns {', '.join(categories)} as indices of their texts, counted from 1"
            self.raw["categories"] = RawInput(torch.int64, (len(categories),), text)
            lines.append("def index(text, known):  # from 1; 0: unknown; -1: empty")
            lines.append("    if text in known:")
            lines.append("        return known.index(text) + 1")
            lines.append("    return -1 if text.strip().lower() in empty else 0")
            lines.append("categories = [")
            lines.append("    [index(row[name], known)")
            lines.append('     for name, known in about["categories"].items()] for row in rows]')
            fields.append('"categories": np.array(categories)')
        lines.append(f"raw = {{{', '.join(fields)}}}")
        self.example = "\n".join(lines)
        empty = sorted(MISSING)
        self.metadata = {"numbers": numbers, "categories": categories, "empty": empty}
        for index, column in enumerate(columns):
            if "knots" in column:
                knots = torch.tensor(column["knots"], dtype=torch.float64)
                self.register_buffer(f"knots{index}", knots)

    def forward(self, *raw: Tensor) -> Tensor:
        tensors = dict(zip(self.raw, raw, strict=True))
        inputs: list[Tensor] = []
        number = 0
        category = 0
        for index, column in enumerate(self.columns):
            if "texts" in column:
                inputs.append(encode_indices(tensors["categories"][:, category], column))
                category += 1
                continue
            inputs.append(encode_numbers(tensors["numbers"][:, number], column, self.knots(index)))
            number += 1
        return torch.cat(inputs, dim=1)

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        numbers: list[Tensor] = []
        categories: list[Tensor] = []
        start = 0
        for index, column in enumerate(self.columns):
            size = width(column)
            cells = inputs[:, start : start + size]
            start += size
            if "texts" in column:
                categories.append(decode_indices(cells, column))
            else:
                numbers.append(decode_numbers(cells.double(), column, self.knots(index)))
        groups = [torch.stack(group, dim=1) for group in (numbers, categories) if group]
        return tuple(groups)

    def cells(self, inputs: Tensor) -> dict[str, list[Any]]:
        """Return the cells of each column; None for an empty cell or a text unknown in training.

        Args:
            inputs: shape (rows, inputs).
        """
        decoded = dict(zip(self.raw, self.recover(inputs.cpu()), strict=True))
        texts = iter(decoded["categories"].unbind(1) if "categories" in decoded else ())
        numbers = iter(decoded["numbers"].unbind(1) if "numbers" in decoded else ())
        cells: dict[str, list[Any]] = {}
        for column in self.columns:
            name = column["name"]
            if "texts" in column:
                known = column["texts"]
                indices = next(texts).tolist()
                cells[name] = [known[index - 1] if index > 0 else None for index in indices]
            else:
                values = next(numbers).tolist()
                cells[name] = [None if math.isnan(value) else value for value in values]
        return cells

    def knots(self, index: int) -> Tensor | None:
        """Return the quantiles that scale a column; None for a column that has none."""
        return dict(self.named_buffers()).get(f"knots{index}")


def width(column: Mapping[str, Any]) -> int:
    """Return the number of inputs that a column becomes."""
    if "texts" not in column:
        return 1 + bool(column.get("missing"))
    return 1 if column.get("index") else len(column["texts"]) + bool(column.get("missing"))


def encode_indices(index: Tensor, column: Mapping[str, Any]) -> Tensor:
    """Return the inputs of a column of texts; see `encoding.encode_texts`."""
    categories = len(column["texts"]) + bool(column.get("missing"))
    empty = categories if column.get("missing") else 0
    index = torch.where(index < 0, empty, index)[:, None]
    if column.get("index"):
        return index.float()
    return (index == torch.arange(1, categories + 1)).float()


def decode_indices(cells: Tensor, column: Mapping[str, Any]) -> Tensor:
    """Return the indices that become the inputs of a column of texts."""
    if column.get("index"):
        index = cells[:, 0].round().long()
    else:
        index = torch.where(cells.any(1), cells.argmax(1) + 1, 0)
    is_empty = index > len(column["texts"])
    return index.masked_fill(is_empty, -1)


def encode_numbers(values: Tensor, column: Mapping[str, Any], knots: Tensor | None) -> Tensor:
    """Return the inputs of a column of numbers; see `encoding.encode_numbers`."""
    is_empty = values.isnan()
    known = torch.where(is_empty, float(column["fill"]), values)
    if knots is None:
        scaled = (known - column["mean"]) / column["std"]
    else:
        scaled = normal_quantile(share_below(known, knots))
    inputs = [scaled.float()]
    if column.get("missing"):
        inputs.append(is_empty.float())
    return torch.stack(inputs, dim=1)


def decode_numbers(cells: Tensor, column: Mapping[str, Any], knots: Tensor | None) -> Tensor:
    """Return the numbers that become the inputs of a column."""
    if knots is None:
        values = cells[:, 0] * column["std"] + column["mean"]
    else:
        place = torch.special.ndtr(cells[:, 0]) * (len(knots) - 1)
        below = place.long().clamp(0, len(knots) - 2)
        values = torch.lerp(knots[below], knots[below + 1], place - below)
    if column.get("missing"):
        values = values.masked_fill(cells[:, 1] > 0, math.nan)
    return values
