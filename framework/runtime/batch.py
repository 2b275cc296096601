"""The type of a batch."""

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]
"""Tensors of equal length, such as (inputs, targets)."""


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on a device; the batch itself if it is on the device already."""
    if all(tensor.device == device for tensor in batch):
        return batch
    asynchronous = device.type == "cuda"  # other devices may read the memory too late
    return tuple(tensor.to(device, non_blocking=asynchronous) for tensor in batch)
