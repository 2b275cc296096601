"""The preparation of arrays and images: scaling."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from framework import Preparation, RawInput

FAR = 10
"""Numbers at more deviations from 0 are taken as float64, so that rounding costs at most 1e-6."""


class Standardize(Preparation):
    """(raw - mean) / std, see `readers/scaling.standardize`.

    Args:
        facts: "mean", "std" and "float64".
        in_shape: shape of an input.
        pixels: whether the raw inputs are pixels from 0 to 255.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, facts: Mapping[str, Any], in_shape: Sequence[int], pixels: bool = False):
        super().__init__()
        mean = torch.as_tensor(facts.get("mean", 0.0), dtype=torch.float64)
        std = torch.as_tensor(facts.get("std", 1.0), dtype=torch.float64)
        is_far = bool((mean.abs() > FAR * std).any())
        self.dtype = torch.float64 if facts.get("float64") or is_far else torch.float32
        self.register_buffer("mean", mean.to(self.dtype))
        self.register_buffer("std", std.to(self.dtype))
        self.pixels = pixels
        raw_dtype = torch.uint8 if pixels else self.dtype
        text = "pixels from 0 to 255" if pixels else "numbers as in the data, not scaled"
        self.raw = {"inputs": RawInput(raw_dtype, tuple(in_shape), text)}
        self.example = array_example(raw_dtype, in_shape)

    def forward(self, inputs: Tensor) -> Tensor:
        return ((inputs.to(self.dtype) - self.mean) / self.std).float()

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        raw = inputs.double() * self.std.double() + self.mean.double()
        return (raw.round().to(torch.uint8) if self.pixels else raw.to(self.dtype),)


def array_example(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """Return statements that read a .npy file of raw inputs."""
    sizes = ", ".join(str(size) for size in (-1, *shape))
    name = str(dtype).removeprefix("torch.")
    return f'raw = {{"inputs": np.load(file).astype("{name}").reshape({sizes})}}  # a .npy file'


class Enlarge(Standardize):
    """Images of 8x8 pixels, scaled to another size and standardized, see `data=digits`.

    Args:
        facts: as for `Standardize`.
        in_shape: (1, size, size).
    """

    def __init__(self, facts: Mapping[str, Any], in_shape: Sequence[int]):
        super().__init__(facts, in_shape)
        self.size = in_shape[-1]
        text = "images of 8x8 pixels from 0 to 16"
        self.raw = {"inputs": RawInput(self.dtype, (1, 8, 8), text)}
        self.example = array_example(self.dtype, (1, 8, 8))

    def forward(self, inputs: Tensor) -> Tensor:
        size = (self.size, self.size)
        return super().forward(F.interpolate(inputs, size, mode="bilinear", align_corners=False))

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Solve for the 8x8 pixels: the interpolation is linear in each axis."""
        unit = torch.eye(8, dtype=torch.float64)[None]
        along = F.interpolate(unit, self.size, mode="linear", align_corners=False)[0]
        inverse = torch.linalg.pinv(along)  # (size, 8)
        pixels = super().recover(inputs)[0].double()
        return ((inverse.T @ pixels @ inverse).to(self.dtype),)
