"""Batch normalization over the samples of all processes, on any device.

`torch.nn.SyncBatchNorm` does the same on CUDA only. Here the sums over the batch are exchanged as
part of the computation, so that autograd finds the gradient. The result is that of one process with
the whole batch, up to rounding, and the running statistics are the same in all processes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from framework import SettingError
from framework.contracts.strategy import BatchStatistics, RowBatchNorm

from .collectives import sum_over_processes

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""The modules that share `nn.BatchNorm1d.forward`; SyncBatchNorm does the same by itself."""


class Replacement(NamedTuple):
    """A function in place of a method of a module."""

    module: nn.Module
    method: str
    function: Callable[..., Any]

    def apply(self) -> None:
        """Replace the method."""
        self.module.__dict__[self.method] = self.function

    def undo(self) -> None:
        """Restore the method of the class."""
        if self.module.__dict__.get(self.method) is self.function:
            del self.module.__dict__[self.method]


def replacements(model: nn.Module) -> Iterator[Replacement]:
    """Yield what makes the modules of a model normalize by the statistics of all processes.

    Raises:
        SettingError: a module cannot be changed in this way.
    """
    for name, module in model.named_modules():
        if isinstance(module, BatchStatistics):
            yield Replacement(module, "sum_over_batch", sum_over_processes)
        elif isinstance(module, BATCH_NORMS):
            check_batch_norm(name, module)
            method = "normalize" if isinstance(module, RowBatchNorm) else "forward"
            yield Replacement(module, method, partial(normalized, module))


def check_batch_norm(name: str, module: BatchNorm) -> None:
    """Raise SettingError for a batch norm whose result would depend on the number of processes."""
    if not module.track_running_stats:
        raise SettingError(
            f"the layer {name} has track_running_stats=False, so that evaluation "
            "would depend on the number of processes: use running statistics, or another norm"
        )
    kind = type(module)
    if kind.forward is not nn.BatchNorm1d.forward and not isinstance(module, RowBatchNorm):
        raise SettingError(
            f"the layer {name} ({kind.__name__}) has a `forward` of its own, which "
            "cannot use the samples of all processes: use a batch norm of torch"
        )


def normalized(module: BatchNorm, inputs: Tensor) -> Tensor:
    """Return the result of a module for inputs (samples, channels, ...)."""
    if not module.training or not distributed.is_initialized():
        return nn.BatchNorm1d.forward(module, inputs)  # type: ignore[arg-type]  # the same for all
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    shape = [1, -1] + [1] * (inputs.ndim - 2)
    values = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    channels = values.shape[1]

    count = values.new_full((1,), values.numel() / max(channels, 1))
    sums = sum_over_processes(torch.cat([values.sum(axes), count]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    centered = values - mean.view(shape)
    variance = sum_over_processes(centered.square().sum(axes)) / count
    update_statistics(module, mean.detach(), variance.detach() * (count / (count - 1)))
    result = centered * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        result = result * module.weight.view(shape) + module.bias.view(shape)
    return result.to(inputs.dtype)


@torch.no_grad()
def update_statistics(module: BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics, as torch.nn.functional.batch_norm does.

    Args:
        mean: of the batch, shape (channels,).
        variance: of the batch, unbiased, shape (channels,).
    """
    if module.running_mean is None or module.running_var is None:
        return
    factor = module.momentum
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if factor is None:  # the mean over all batches
            factor = 1.0 / float(module.num_batches_tracked)
    module.running_mean.lerp_(mean.to(module.running_mean), factor or 0.0)
    module.running_var.lerp_(variance.to(module.running_var), factor or 0.0)
