"""The training step with virtual shards (`trainer.shards`).

The gradients of each shard are computed on their own, and added in fixed order: see `shards.py`.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from framework.contracts.task import Phase
from framework.contracts.transform import transformed_all
from framework.data.batch_slice import BatchSlice
from framework.data.dataset import Batch
from framework.errors import SettingError
from framework.runtime import seeds
from framework.runtime.batch import count_rows, move_batch
from framework.runtime.pairwise import PairwiseSum
from framework.runtime.shared_time import SHARED_TIME

from .agreement import StepTotals
from .sharded_buffers import ShardedBuffers
from .shards import ShardedMeasures, cut
from .step import StepContext, TrainingStep
from .step_checks import count_of


@dataclass(kw_only=True, eq=False)
class ShardedStep(TrainingStep):
    """A training step whose result does not depend on the number of processes.

    Attributes:
        measures: receive the loss, outputs and targets of each shard.
        slice: the shards of this process.
        shards: the batches of the step for each shard of this process, without those of no rows.
        stream: the seed of the run, and the step, from which random numbers are derived.
        buffers: those of the model.
        sums: the sums of the gradients of the shards, as one tensor for each dtype and device.
        used: whether each parameter of the optimizer has a gradient in one of the shards.
    """

    measures: ShardedMeasures
    slice: BatchSlice
    shards: list[list[Batch]] = field(default_factory=list, init=False)
    stream: tuple[int, int] = field(default=(0, 0), init=False)
    buffers: ShardedBuffers = field(init=False)
    sums: Sequence[Tensor] = field(default=(), init=False)
    used: list[bool] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.buffers = ShardedBuffers(self.model, self.slice.first)

    def __call__(self, trainer: StepContext, window: Sequence[Batch]) -> None:
        """Train on the batches of a step; random numbers depend on (seed, step, shard)."""
        super().__call__(trainer, window)
        self.draw("after step")

    def own_random_numbers(
        self, trainer: StepContext, part: object
    ) -> AbstractContextManager[None]:
        """Return a context manager that does nothing: `draw` is called for each shard."""
        return nullcontext()

    def draw(self, name: str, *details: object) -> None:
        """Draw other random numbers from now on: those of (seed, step, name, details)."""
        seed, step = self.stream
        seeds.seed_everything(seeds.derive(seed, name, step, *details))

    def read(self, trainer: StepContext, window: Sequence[Batch]) -> list[Batch]:
        """Return the shards of the batches of a step, which are transformed one by one."""
        self.stream = (trainer.seed, trainer.state.step)
        own = self.slice.last - self.slice.first
        self.shards = [[] for _ in range(own)]
        for batch in window:
            parts = cut(move_batch(batch, self.device), own)
            for shard, part in zip(self.shards, parts, strict=True):
                if part:
                    shard.append(part)
        if trainer.transforms:
            for number, shard in enumerate(self.shards):
                if shard:
                    self.draw("transforms", self.slice.first + number)
                    self.shards[number] = transformed_all(
                        shard, trainer.transforms, self.task.fields
                    )
        self.totals = self.sum_counts()
        return [batch for shard in self.shards for batch in shard]

    def sum_counts(self) -> StepTotals:
        """Return the sums of the step, and let all processes read the same time (collective)."""
        on_cpu = self.device.type == "cpu"
        sums = PairwiseSum()
        for number, shard in enumerate(self.shards):
            samples = sum([count_rows(batch) for batch in shard])
            items = torch.as_tensor(sum([count_of(self.task, batch) for batch in shard]))
            first = self.slice.first + number == 0
            facts = torch.zeros(3, dtype=torch.float64)
            facts[0] = samples
            facts[1] = time.monotonic() if first else 0.0
            if on_cpu:
                facts[2] = items
                sums.add([facts])
            else:
                sums.add([facts, items.to(self.device, self.measures.dtype)])
        facts, *counts = [self.strategy.sum_pairwise(total) for total in sums.total()]
        if self.strategy.world_size > 1:
            SHARED_TIME.agreed = float(facts[1])
        return StepTotals(int(facts[0]), float(facts[2]) if on_cpu else counts[0])

    def backward(self, batches: Sequence[Batch], phase: Phase | None) -> tuple[Tensor, bool]:
        """Compute the sums of the loss and the gradients over the shards of this process."""
        name = "" if phase is None else phase.name
        self.parameters.refresh()
        self.used = [False] * len(self.parameters.optimized)
        self.buffers.begin()
        sums = PairwiseSum()
        for number, shard in enumerate(self.shards):
            self.measures.shard = number
            self.draw("shard", self.slice.first + number, name)
            loss, _ = super().backward(shard, phase)
            sums.add([loss.to(torch.float32), *self.taken_gradients()])
            self.buffers.end_shard(has_rows=bool(shard))
        self.draw("update", name)
        total, *self.sums = sums.total()
        return total, False

    def taken_gradients(self) -> list[Tensor]:
        """Return the gradients as one tensor for each dtype and device, and delete them."""
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for number, parameter in enumerate(self.parameters.optimized):
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            else:
                self.used[number] = True
            if gradient.layout != torch.strided:
                raise SettingError(
                    f"shards={self.slice.parts}: expected dense gradients, got a sparse one (as "
                    "of an embedding with sparse=True)"
                )
            parameter.grad = None
            group = groups.setdefault((parameter.dtype, parameter.device), [])
            group.append(gradient.detach().reshape(-1))
        return [torch.cat(group) for group in groups.values()]

    @torch.no_grad()
    def sum_gradients(self, loss: Tensor) -> Tensor:
        """Sum the gradients, losses and buffers of all processes; return the loss (collective)."""
        facts = torch.tensor([0.0, *self.used], dtype=torch.float32, device=loss.device)
        facts[0] = loss
        facts = self.strategy.sum_pairwise(facts)
        used = self.used
        if not all(used):  # only then: it waits for the device
            used = [count > 0 for count in facts[1:].tolist()]
        self.give_gradients([self.strategy.sum_pairwise(total) for total in self.sums], used)
        self.sums = ()
        self.buffers.average(self.strategy)
        return facts[0]

    def give_gradients(self, sums: Sequence[Tensor], used: Sequence[bool]) -> None:
        """Give the parameters their gradients, the parts of `sums` (see `taken_gradients`)."""
        numbers: dict[tuple[torch.dtype, torch.device], int] = {}
        ends = [0] * len(sums)
        for parameter, has_gradient in zip(self.parameters.optimized, used, strict=True):
            group = numbers.setdefault((parameter.dtype, parameter.device), len(numbers))
            start = ends[group]
            ends[group] += parameter.numel()
            if has_gradient:
                gradient = torch.empty_like(parameter)  # with its strides, for fused kernels
                parameter.grad = gradient.copy_(sums[group][start : ends[group]].view_as(parameter))
