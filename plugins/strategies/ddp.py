"""Data parallel training: each process has the whole model, and a part of each batch."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from framework import PositiveFloat, SettingError, strategies
from framework.runtime.processes import lost_processes

from .batch_norm import batch_norms, synchronize, undo
from .process_group import BUCKET_BYTES, ProcessGroup


@strategies.register("ddp")
class DDP(ProcessGroup):
    """Each process has the whole model; the gradients are summed after each backward pass.

    The sum does not depend on which methods of the model the task calls, as that of torch's
    DistributedDataParallel does: tasks with phases, such as GANs, are trained correctly. Batch
    normalization uses the samples of all processes.

    Args:
        timeout_seconds: longest time to wait for the other processes.
    """

    def __init__(self, timeout_seconds: PositiveFloat = 300.0):
        super().__init__(timeout_seconds)

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, *, joint_batch_norm: bool = True
    ) -> None:
        if self.world_size == 1:
            return
        check_same_model(self, model)
        with torch.no_grad(), lost_processes():
            for tensor in [*model.parameters(), *model.buffers()]:
                distributed.broadcast(tensor.detach(), src=0)
        norms = list(batch_norms(model)) if joint_batch_norm else []
        for module in norms:
            synchronize(module)
        self.forward_is_collective = bool(norms)

    def finish(self, model: nn.Module) -> None:
        for module in batch_norms(model):
            undo(module)

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        if self.world_size == 1:
            return loss
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:
                gradients.append(torch.zeros_like(parameter))
            else:
                check_dense(parameter.grad)
                gradients.append(parameter.grad)
        used = [parameter.grad is not None for parameter in parameters]
        facts = torch.tensor([0.0, *map(float, used)], device=loss.device)
        facts[0] = loss.detach()
        with torch.no_grad(), lost_processes():
            distributed.all_reduce(facts)
            for bucket in buckets_of(gradients):
                sum_in_place(bucket)
        if not all(used):  # only then: it waits for the device
            self._give_gradients(parameters, gradients, facts[1:].tolist())
        return facts[0]

    def _give_gradients(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        uses: Sequence[float],
    ) -> None:
        """Give a parameter without a gradient the sum of those of the other processes, if any."""
        for parameter, gradient, count in zip(parameters, gradients, uses, strict=True):
            if parameter.grad is None and count > 0:
                parameter.grad = gradient


def check_same_model(strategy: ProcessGroup, model: nn.Module) -> None:
    """Raise SettingError if the processes have models of different parameters."""
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    for rank, other in enumerate(strategy.gather(shapes)):
        for mine, theirs in zip(shapes, other, strict=False):
            if mine != theirs:
                raise SettingError(
                    f"the model of process {rank} differs from that of process {strategy.rank}: "
                    f"{theirs[0]} of shape {theirs[1]} in place of {mine[0]} of shape {mine[1]}"
                )
        if len(other) != len(shapes):
            raise SettingError(
                f"the model of process {rank} has {len(other)} parameters and buffers, that of "
                f"process {strategy.rank} has {len(shapes)}"
            )


def check_dense(gradient: Tensor) -> None:
    """Raise SettingError for a sparse gradient."""
    if gradient.layout != torch.strided:
        raise SettingError(
            "strategy=ddp: expected dense gradients, got a sparse one (as of an embedding with "
            "sparse=True)"
        )


def buckets_of(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the gradients in lists of one dtype and device, of limited size."""
    buckets: list[list[Tensor]] = []
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    newest: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for gradient in gradients:
        key = (gradient.dtype, gradient.device)
        if key not in newest or sizes[key] + gradient.nbytes > BUCKET_BYTES:
            newest[key] = []
            sizes[key] = 0
            buckets.append(newest[key])
        newest[key].append(gradient)
        sizes[key] += gradient.nbytes
    return buckets


def sum_in_place(bucket: Sequence[Tensor]) -> None:
    """Sum tensors of one dtype over all processes, in one collective operation."""
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    distributed.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))
