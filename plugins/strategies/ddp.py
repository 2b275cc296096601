"""Data parallel training: each process has the whole model, and a part of each batch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from framework import PositiveFloat, SettingError, check_initialized, processes, strategies
from framework.contracts.strategy import Estimate, Memory

from .batch_norm import Replacement, replacements
from .buffers import ChangingBuffers
from .collectives import broadcast
from .process_group import BUCKET_BYTES, ProcessGroup

FROZEN_WITH_GRADIENT = (
    "strategy=ddp: a parameter has a gradient but requires_grad=False, so that its gradients in "
    "several processes are not summed: freeze it before the backward pass, or use task phases"
)


@strategies.register("ddp")
class DDP(ProcessGroup):
    """Each process has the whole model; the gradients are summed after each backward pass.

    The sum does not depend on which methods of the model the task calls, as that of torch's
    DistributedDataParallel does: tasks with phases, such as GANs, are trained correctly. Batch
    normalization uses the samples of all processes.

    Args:
        sync_batch_norm: whether batch norms use the samples of all processes. If not, each process
            normalizes by its own samples, which is faster, but the gradients depend on the number
            of processes; the running statistics are those of the main process.
        timeout_seconds: longest time to wait for the other processes.
    """

    def __init__(self, sync_batch_norm: bool = True, timeout_seconds: PositiveFloat = 300.0):
        super().__init__(timeout_seconds)
        self.sync_batch_norm = sync_batch_norm
        self.replaced: list[Replacement] = []
        self.buffers: ChangingBuffers | None = None

    def estimate(
        self,
        model: nn.Module,
        memory: Memory,
        processes: int,
        *,
        passes: float = 1.0,
        pairwise: bool = False,
    ) -> Estimate:
        parameters = [each for each in model.parameters() if each.requires_grad]
        buckets = [sum(each.nbytes for each in bucket) for bucket in buckets_of(parameters)]
        if not pairwise:
            sent = 2 * (processes - 1) / processes * memory.gradients
            return Estimate(replace(memory, communication=max(buckets, default=0)), round(sent))
        parts = processes * min(BUCKET_BYTES, memory.gradients)  # of `sum_pairwise`
        needed = replace(memory, communication=memory.gradients + parts)
        return Estimate(needed, (processes - 1) * memory.gradients)

    def prepare(self, model: nn.Module, optimizer: Optimizer, *, in_shards: bool = False) -> None:
        if self.world_size == 1:
            return
        check_initialized(model, "strategy=ddp")
        self.share_weights(model, optimizer)
        if not in_shards:
            self.share_statistics(model)
        of_torch = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        self.forward_is_collective = of_torch or bool(self.replaced)

    def share_weights(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Give all processes the parameters and buffers of the main one (collective)."""
        tensors = shared_tensors(model, optimizer)
        check_same_model(self, tensors)
        for tensor in tensors.values():
            broadcast([tensor])

    def share_statistics(self, model: nn.Module) -> None:
        """Let batch norms use the samples of all processes, and find the buffers to share."""
        if self.sync_batch_norm:
            self.replaced = list(replacements(model))
        for replacement in self.replaced:
            replacement.apply()
        self.buffers = ChangingBuffers(model, but={each.module for each in self.replaced})

    def finish(self, model: nn.Module) -> None:
        for replacement in self.replaced:
            replacement.undo()
        self.replaced = []
        self.buffers = None

    def share_buffers(self) -> None:
        if self.buffers is not None:
            self.buffers.share()

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        if self.world_size == 1:
            return loss
        trained = []
        for parameter in parameters:
            if parameter.requires_grad:
                trained.append(parameter)
            elif parameter.grad is not None:
                raise SettingError(FROZEN_WITH_GRADIENT)
        used = [parameter.grad is not None for parameter in trained]
        # Not that of the loss: a process without rows has no loss, so the exchanges would differ.
        dtype = torch.float32
        for parameter in trained:
            dtype = torch.promote_types(dtype, parameter.dtype)
        facts = torch.tensor([0.0, *map(float, used)], dtype=dtype, device=loss.device)
        facts[0] = loss.detach()
        gradients = []
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            check_dense(parameter.grad)
            gradients.append(parameter.grad)
        with torch.no_grad(), processes.communicating():
            for bucket in buckets_of([facts, *gradients]):
                sum_in_place(bucket)
        if not all(used):  # only then: it waits for the device
            for parameter, count in zip(trained, facts[1:].tolist(), strict=True):
                if count == 0:
                    parameter.grad = None
        return facts[0].to(loss.dtype)


def shared_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model, and other parameters of its optimizer."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors.update(model.named_buffers())
    known = set(tensors.values())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in known:
                tensors[f"parameter {len(tensors)} of the optimizer"] = parameter
    return tensors


def check_same_model(strategy: ProcessGroup, tensors: Mapping[str, Tensor]) -> None:
    """Raise SettingError if the processes have models of different parameters (collective)."""
    facts = [(name, f"{tuple(each.shape)}, {each.dtype}") for name, each in tensors.items()]
    for rank, other in enumerate(strategy.gather(facts)):
        for mine, theirs in zip(facts, other, strict=False):
            if mine != theirs:
                raise SettingError(
                    f"the model of process {rank} differs from that of process {strategy.rank}: "
                    f"{theirs[0]} of shape {theirs[1]} in place of {mine[0]} of shape {mine[1]}"
                )
        if len(other) != len(facts):
            raise SettingError(
                f"the model of process {rank} has {len(other)} parameters and buffers, that of "
                f"process {strategy.rank} has {len(facts)}"
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
