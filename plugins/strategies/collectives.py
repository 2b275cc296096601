"""Collective operations of torch.distributed, as the strategies use them."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from framework import processes


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(context: object, tensor: Tensor) -> Tensor:
        return summed(tensor)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        # The function itself, so that a gradient penalty finds the second derivative.
        return sum_over_processes(gradient)


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, with gradients; the tensor if there is one."""
    if not distributed.is_initialized():  # a copy of the model outside of the run
        return tensor
    result: Tensor = SumOverProcesses.apply(tensor)
    return result


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, without gradients."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    with processes.communicating():
        distributed.all_reduce(total)
    return total


def gathered(tensor: Tensor) -> list[Tensor]:
    """Return a tensor of each process, in the order of their ranks, without gradients."""
    parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    with processes.communicating():
        distributed.all_gather(parts, tensor)
    return parts


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Set tensors of any dtype and memory format on one device to those of the main process."""
    # New flat tensors of bytes: not every backend sends bool, complex or strided tensors.
    flat = [
        tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
        for tensor in tensors
    ]
    if not flat:
        return
    together = torch.cat([each.view(torch.uint8) for each in flat])
    with processes.communicating():
        distributed.broadcast(together, src=0)
    with torch.no_grad():
        parts = together.split([each.nbytes for each in flat])
        for tensor, each, part in zip(tensors, flat, parts, strict=True):
            each.view(torch.uint8).copy_(part)
            tensor.copy_(each.view(tensor.shape))
