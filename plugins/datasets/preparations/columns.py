"""The preparation of columns that a batch has by name, see data=arrow with batch=dict."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framework import Axis, RawInput, UnchangedInputs

from .arrays import Standardize
from .texts import SHORTEST


class Columns(UnchangedInputs):
    """Integers as they are, and (raw - mean) / std of other numbers.

    Lists of unequal length have an axis of any size; columns of the same lengths have the same one.

    Args:
        columns: for each column "shape", "integer", "lengths_of", "mean", "std" and "float64".
    """

    def __init__(self, columns: Mapping[str, Mapping[str, Any]]):
        self.columns = columns
        axes: dict[str, int | Axis] = {}
        scales: list[nn.Module] = []
        raw = {}
        for name, facts in columns.items():
            shape = facts["shape"]
            if "lengths_of" in facts:
                axis = axes.setdefault(facts["lengths_of"], length_axis(len(axes), shape[0]))
                text = f"integers, at most {shape[0]}, with 0 for padding at the end"
                raw[name] = RawInput(torch.int64, (axis,), text)
                scales.append(nn.Identity())
            elif facts.get("integer"):
                raw[name] = RawInput(torch.int64, tuple(shape), "integers as in the data")
                scales.append(nn.Identity())
            else:
                scale = Standardize(facts, shape)
                raw[name] = scale.raw["inputs"]
                scales.append(scale)
        super().__init__(raw)
        self.scales = nn.ModuleList(scales)

    def select(self, fields: Sequence[str]) -> "Columns":
        return Columns({name: self.columns[name] for name in fields if name in self.columns})

    def forward(self, *raw: Tensor) -> Tensor | dict[str, Tensor]:
        scaled = [scale(each) for scale, each in zip(self.scales, raw, strict=True)]
        return super().forward(*scaled)

    def recover(self, inputs: Any) -> tuple[Tensor, ...]:
        prepared = super().recover(inputs)
        raw = []
        for each, scale, tensor in zip(self.raw.values(), self.scales, prepared, strict=True):
            if isinstance(scale, Standardize):
                raw += scale.recover(tensor)
            elif each.shape and isinstance(each.shape[0], Axis):
                missing = max(0, each.shape[0].smallest - tensor.shape[1])
                raw.append(F.pad(tensor, (0, missing)))
            else:
                raw.append(tensor)
        return tuple(raw)


def length_axis(number: int, largest: int) -> int | Axis:
    """Return the axis of lists of unequal length.

    Args:
        number: of lists of other lengths before.
        largest: the length of the longest list.
    """
    name = f"length_{number + 1}" if number else "length"
    return Axis(name, SHORTEST, largest) if largest > SHORTEST else largest
