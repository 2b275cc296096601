"""What the strategies for several processes have in common: torch.distributed."""

from typing import Any

import torch
from torch import Tensor, distributed

from framework import PositiveFloat, SettingError, Strategy, pairwise_sum, processes, pytree

from .collectives import gathered, sum_over_processes, summed

BUCKET_BYTES = 25 * 2**20  # as torch's DistributedDataParallel


class ProcessGroup(Strategy):
    """Connects the processes of the run through torch.distributed: NCCL for CUDA, else gloo.

    Args:
        timeout_seconds: longest time to wait for the other processes.
    """

    def __init__(self, timeout_seconds: PositiveFloat = 300.0):
        self.timeout_seconds = timeout_seconds

    def start(self, device: torch.device) -> torch.device:
        place = processes.launched()
        if device.type == "mps":
            raise SettingError("device=mps: torch.distributed has no backend for it; use cpu")
        if device.type == "cuda":
            device = own_cuda_device(device, place)
        if place.world_size == 1:
            return device
        if not distributed.is_initialized():
            processes.connect(device, self.timeout_seconds)
        self.rank = place.rank
        self.world_size = place.world_size
        return device

    def close(self) -> None:
        processes.disconnect()

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return tensor
        return summed(tensor)

    def sum_pairwise(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return tensor
        flat = tensor.reshape(-1)
        total = torch.empty_like(flat)
        elements = max(BUCKET_BYTES // tensor.element_size(), 1)
        for part, result in zip(flat.split(elements), total.split(elements), strict=True):
            result.copy_(pairwise_sum(gathered(part)))
        return total.view(tensor.shape)

    def gather(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with processes.communicating():
            distributed.all_gather_object(values, pytree.tree_map(on_cpu, value))
        return values

    def from_main(self, value: Any) -> Any:
        if self.world_size == 1:
            return value
        values = [pytree.tree_map(on_cpu, value) if self.is_main else None]
        with processes.communicating():
            distributed.broadcast_object_list(values)
        return values[0]

    def gather_rows(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return tensor
        counts = self.gather(len(tensor))
        first = sum(counts[: self.rank])
        others = tensor.new_zeros(sum(counts), *tensor.shape[1:])
        before, _, after = others.split([first, len(tensor), sum(counts[self.rank + 1 :])])
        return sum_over_processes(torch.cat([before, tensor, after]))


def own_cuda_device(device: torch.device, place: processes.Launched) -> torch.device:
    """Return the CUDA device of this process: the one with its number on this machine."""
    if place.world_size > 1 and device.index is not None:
        raise SettingError(
            f"device={device}: each process uses the device of its number; use device=cuda"
        )
    index = place.local_rank if device.index is None else device.index
    devices = torch.cuda.device_count()
    if index >= devices:
        raise SettingError(
            f"process {place.rank} needs CUDA device {index}, but this machine has {devices}"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def on_cpu(value: Any) -> Any:
    """Return a tensor on the CPU; any other value as it is."""
    return value.cpu() if isinstance(value, Tensor) else value
