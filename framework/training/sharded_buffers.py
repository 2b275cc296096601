"""The buffers of a model in a step with virtual shards, such as the statistics of batch norms."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from framework.contracts.strategy import Strategy
from framework.runtime.pairwise import PairwiseSum
from framework.runtime.torch_internals.norms import has_statistics
from framework.runtime.torch_internals.tensor_version import version_of


@dataclass(eq=False)
class Buffer:
    """A buffer of a module.

    Attributes:
        module: the module.
        name: the name of the buffer in it.
        present: the tensor when it had the value `start`; the module may replace it.
        version: of that tensor.
        start: a copy of its value when the step began.
        of_shards: the value after each shard that has changed it, by the number of the shard.
    """

    module: nn.Module
    name: str
    present: Tensor
    version: object
    start: Tensor
    of_shards: dict[int, Tensor] = field(default_factory=dict)

    @property
    def is_mean(self) -> bool:
        """Whether the values of the shards are averaged; else that of the first one counts."""
        return self.start.is_floating_point() or self.start.is_complex()

    def is_unchanged(self) -> bool:
        """Return whether the buffer still has the value `start`.

        A norm with running statistics updates them without a change of their versions.
        """
        if has_statistics(self.module) and self.module.training:
            return False
        tensor = getattr(self.module, self.name)
        return tensor is self.present and version_of(tensor) == self.version

    def term(self, shard: int, has_rows: bool) -> Tensor:
        """Return what a shard adds to the sum over all shards, shape (elements,)."""
        value = self.of_shards.get(shard, self.start)
        if self.is_mean:
            value = value - self.start if has_rows else torch.zeros_like(value)
        else:
            value = value.long() if shard == 0 else torch.zeros_like(value, dtype=torch.int64)
        return value.reshape(-1)

    def set(self, value: Tensor) -> None:
        """Change the value."""
        self.present = getattr(self.module, self.name)
        self.present.copy_(value)
        self.version = version_of(self.present)


class ShardedBuffers:
    """Lets each shard begin with the buffers of the beginning of a step, and averages the results.

    The mean is over the shards with rows, in fixed order. Of a buffer of integers or booleans, such
    as `num_batches_tracked`, the value of the first shard counts.

    Args:
        model: the model.
        first: the number of the first shard of this process.
    """

    def __init__(self, model: nn.Module, first: int):
        self.model = model
        self.first = first
        self.buffers: dict[tuple[nn.Module, str], Buffer] = {}
        self.rows: list[bool] = []  # whether each shard of this process has rows

    @torch.no_grad()
    def begin(self) -> None:
        """Begin a step: copy the buffers that have changed since the last one."""
        known = self.buffers
        self.buffers = {}
        self.rows = []
        for module, name, tensor in own_buffers(self.model):
            buffer = known.get((module, name))
            if buffer is None or not buffer.is_unchanged():
                buffer = Buffer(module, name, tensor, version_of(tensor), tensor.clone())
            buffer.of_shards = {}
            self.buffers[module, name] = buffer

    @torch.no_grad()
    def end_shard(self, has_rows: bool) -> None:
        """Keep the changes of a shard, and undo them for the next one."""
        number = self.first + len(self.rows)
        self.rows.append(has_rows)
        if not has_rows:
            return
        for buffer in self.buffers.values():
            if not buffer.is_unchanged():
                buffer.of_shards[number] = getattr(buffer.module, buffer.name).clone()
                buffer.set(buffer.start)

    @torch.no_grad()
    def average(self, strategy: Strategy) -> None:
        """Set each changed buffer to the mean of its values after all shards (collective)."""
        buffers = list(self.buffers.values())
        if not buffers:
            return
        changes = [bool(buffer.of_shards) for buffer in buffers]
        counts = strategy.sum(torch.tensor([sum(self.rows), *changes])).tolist()
        shards_with_rows, *changes = counts
        changed = [buffer for buffer, count in zip(buffers, changes, strict=True) if count]
        if not changed:
            return
        groups = groups_of(changed)
        sums = PairwiseSum()
        for number, has_rows in enumerate(self.rows, self.first):
            terms = [[buffer.term(number, has_rows) for buffer in group] for group in groups]
            sums.add([torch.cat(term) for term in terms])
        for group, own_sum in zip(groups, sums.total(), strict=True):
            total = strategy.sum_pairwise(own_sum)
            sizes = [buffer.start.numel() for buffer in group]
            for buffer, part in zip(group, torch.split(total, sizes), strict=True):
                value = part.view(buffer.start.shape)
                buffer.set(buffer.start + value / shards_with_rows if buffer.is_mean else value)


def groups_of(buffers: Sequence[Buffer]) -> list[list[Buffer]]:
    """Return the buffers in groups whose terms have one dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Buffer]] = {}
    for buffer in buffers:
        dtype = buffer.start.dtype if buffer.is_mean else torch.int64
        groups.setdefault((dtype, buffer.start.device), []).append(buffer)
    return list(groups.values())


def own_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield each buffer with the module that has it; a shared one once."""
    seen: set[Tensor] = set()
    for module in model.modules():
        for name, tensor in module.named_buffers(recurse=False):
            if not is_lazy(tensor) and tensor not in seen:
                seen.add(tensor)
                yield module, name, tensor
