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

from .collectives import gathered, sum_over_processes, summed

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
    values = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    result: Tensor = JointBatchNorm.apply(values, module.weight, module.bias, module)
    return result.to(inputs.dtype)


class JointBatchNorm(torch.autograd.Function):
    """Batch normalization by the statistics of all processes.

    Ioffe and Szegedy, "Batch Normalization" (2015), section 3. The deviations of the processes are
    added as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances" (1979), so that no large squares are subtracted. Forward and backward have one
    collective operation each.
    """

    @staticmethod
    def forward(
        context: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, module: BatchNorm
    ) -> Tensor:
        axes, shape = axes_and_shape(inputs)
        own_mean = inputs.mean(axes) if inputs.numel() else inputs.sum(axes)  # that of no row is 0
        centered = inputs - own_mean.view(shape)
        own_count = inputs.new_full(own_mean.shape, inputs.numel() / max(len(own_mean), 1))
        own = torch.stack([own_mean, centered.square().sum(axes), own_count])
        means, deviations, counts = torch.stack(gathered(own)).unbind(1)

        count = counts.sum(0)
        mean = (means * counts).sum(0) / count
        deviation = (deviations + counts * (means - mean).square()).sum(0)
        update_statistics(module, mean, deviation / (count - 1))

        factor = torch.rsqrt(deviation / count + module.eps)
        context.save_for_backward(inputs, weight, bias, mean, factor, count)
        context.module = module
        scale = factor if weight is None else factor * weight
        shift = (own_mean - mean) * scale
        if bias is not None:
            shift += bias
        return centered.mul_(scale.view(shape)).add_(shift.view(shape))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        inputs, weight, bias, mean, factor, count = context.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, as of a gradient penalty
            return (*differentiable(context, gradient), None)

        axes, shape = axes_and_shape(inputs)
        centered = inputs - mean.view(shape)
        sums = torch.stack([gradient.sum(axes), (gradient * centered).sum(axes)])
        of_bias = None if bias is None else sums[0]
        of_weight = None if weight is None else sums[1] * factor
        of_inputs = None
        if context.needs_input_grad[0]:
            scale = factor if weight is None else factor * weight
            mean_gradient, mean_product = (summed(sums) / count).unbind()
            slope = -scale * factor.square() * mean_product
            of_inputs = centered.mul_(slope.view(shape)).sub_((scale * mean_gradient).view(shape))
            of_inputs.addcmul_(gradient, scale.view(shape))
        return of_inputs, of_weight, of_bias, None


def differentiable(context: Any, gradient: Tensor) -> list[Tensor | None]:
    """Return the gradients of `JointBatchNorm` by operations that have derivatives themselves."""
    inputs, weight, bias, *_ = context.saved_tensors
    axes, shape = axes_and_shape(inputs)
    count = inputs.new_full((1,), inputs.numel() / max(inputs.shape[1], 1))
    sums = sum_over_processes(torch.cat([inputs.sum(axes), count]))
    count = sums[-1].detach()
    centered = inputs - (sums[:-1] / count).view(shape)
    variance = sum_over_processes(centered.square().sum(axes)) / count
    result = centered * torch.rsqrt(variance + context.module.eps).view(shape)
    if weight is not None:
        result = result * weight.view(shape)
    if bias is not None:
        result = result + bias.view(shape)

    arguments = [inputs, weight, bias]
    wanted = [each for each, need in zip(arguments, context.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(result, wanted, gradient, create_graph=True))
    return [next(found) if need else None for need in context.needs_input_grad[:3]]


def axes_and_shape(inputs: Tensor) -> tuple[list[int], list[int]]:
    """Return the axes but that of channels, and the shape of channels to broadcast."""
    axes = [axis for axis in range(inputs.ndim) if axis != 1]
    return axes, [1, -1] + [1] * (inputs.ndim - 2)


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
