"""The type of a batch."""

from torch import Tensor

Batch = tuple[Tensor, ...]
"""Tensors of equal length, such as (inputs, targets)."""
