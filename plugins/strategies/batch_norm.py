"""Batch normalization over the samples of all processes, on any device.

`torch.nn.SyncBatchNorm` does the same on CUDA only. Here the sums over the batch are exchanged as
part of the computation, so that autograd finds the gradient. The result is that of one process with
the whole batch, up to rounding, and the running statistics are the same in all processes.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from framework.runtime.processes import lost_processes


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(context: object, tensor: Tensor) -> Tensor:
        return summed(tensor)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return summed(gradient)


def summed(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    total = tensor.clone(memory_format=torch.contiguous_format)
    with lost_processes():
        distributed.all_reduce(total)
    return total


def batch_norms(model: nn.Module) -> Iterator[_BatchNorm]:
    """Yield the modules of a model that normalize by statistics of the batch."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            yield module


def synchronize(module: _BatchNorm) -> None:
    """Let a module normalize by the statistics of all processes in training."""
    module.forward = partial(normalized, module)  # type: ignore[method-assign]


def undo(module: _BatchNorm) -> None:
    """Restore the method of the class of a module."""
    module.__dict__.pop("forward", None)


def normalized(module: _BatchNorm, inputs: Tensor) -> Tensor:
    """Return the result of a module for inputs (samples, channels, ...)."""
    by_batch = module.training or module.running_mean is None
    if not by_batch:
        result: Tensor = type(module).forward(module, inputs)
        return result
    module._check_input_dim(inputs)
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    shape = [1, -1] + [1] * (inputs.ndim - 2)
    values = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    channels = values.shape[1]

    count = values.new_full((1,), values.numel() / max(channels, 1))
    sums = SumOverProcesses.apply(torch.cat([values.sum(axes), count]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centered = values - mean.view(shape)
    variance = SumOverProcesses.apply(centered.square().sum(axes)) / count
    if module.training and module.track_running_stats:
        update_statistics(module, mean.detach(), variance.detach() * (count / (count - 1)))
    result = centered * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        result = result * module.weight.view(shape) + module.bias.view(shape)
    return result.to(inputs.dtype)


@torch.no_grad()
def update_statistics(module: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics, as torch.nn.functional.batch_norm does.

    Args:
        mean: of the batch, shape (channels,).
        variance: of the batch, unbiased, shape (channels,).
    """
    if module.running_mean is None or module.running_var is None:
        return
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    factor = module.momentum
    if factor is None:  # the mean over all batches
        factor = 1.0 / float(module.num_batches_tracked)
    module.running_mean.lerp_(mean.to(module.running_mean), factor)
    module.running_var.lerp_(variance.to(module.running_var), factor)
