"""Virtual shards: each batch is cut into the same parts on any number of processes.

Each process computes some neighboring shards one by one, and all sums over them have a fixed order
(see `PairwiseSum`). So the results are the same, bit for bit, on any number of processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from framework.contracts.metric import Measures, Metric
from framework.contracts.strategy import Strategy
from framework.data.batch_slice import NO_ROWS, BatchSlice
from framework.data.dataset import Batch
from framework.runtime.batch import count_rows, map_tensors, split_rows


def slice_of(strategy: Strategy, shards: int | None) -> BatchSlice:
    """Return the rows that this process reads of a batch.

    Args:
        strategy: of the run.
        shards: the number of virtual shards; None for one part for each process.
    """
    parts = shards or strategy.world_size
    own = parts // strategy.world_size
    return BatchSlice(strategy.rank * own, (strategy.rank + 1) * own, parts)


def cut(batch: Batch, parts: int) -> list[Batch]:
    """Return the shards of this process; `NO_ROWS` for one without rows.

    Each is in memory of its own, as the rounding of an operation may depend on alignment.

    Args:
        batch: the rows of this process, perhaps none.
        parts: the number of shards of this process. Cut equally, its rows give the same shards as
            the whole batch, as larger shards come first in both.
    """
    if not batch:
        return [NO_ROWS] * parts
    sizes = BatchSlice(0, parts, parts).sizes(count_rows(batch))
    shards = split_rows(batch, sizes)
    copies = []
    for size, shard in zip(sizes, shards, strict=True):
        copies.append(map_tensors(Tensor.clone, shard) if size else NO_ROWS)
    return copies


class ShardedMeasures(Measures):
    """Sums of the loss and metrics for each shard; `read` adds them in the order of the shards.

    Args:
        metrics: the metrics.
        device: the device of the sums.
        max_buffered: the maximum number of batches in the buffer of each shard.
        strategy: of the run.
        shards: the number of shards of this process.

    Attributes:
        shard: the shard of this process that the next batches belong to.
    """

    def __init__(
        self,
        metrics: Sequence[Metric],
        device: torch.device,
        max_buffered: int,
        strategy: Strategy,
        shards: int,
    ):
        super().__init__(metrics, device, max_buffered, strategy)
        self.of_shards = [Measures(metrics, device, max_buffered) for _ in range(shards)]
        self.shard = 0

    def add(
        self,
        loss: Tensor,
        outputs: Tensor | None,
        targets: Tensor | None,
        count: int | Tensor,
        values: Mapping[str, Tensor] = {},
    ) -> None:
        """Add a batch to the sums of the present shard."""
        self.of_shards[self.shard].add(loss, outputs, targets, count, values)

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """Yield the shards of a batch that have rows; what is added meanwhile belongs to them."""
        for number, shard in enumerate(cut(batch, len(self.of_shards))):
            self.shard = number
            if shard:
                yield shard

    @property
    def empty(self) -> bool:
        """Whether no batch was added since the last reading; it reads the device."""
        return all(measures.empty for measures in self.of_shards)

    def _collect(self) -> None:
        """Set the sums to those over all shards, added in order (collective)."""
        for state in self._of_all([measures.take() for measures in self.of_shards]):
            self.add_state(state)

    def all_states(self) -> list[dict[str, Any]]:
        """Return the state of each shard of all processes, in order (collective)."""
        return self._of_all([measures.state_dict() for measures in self.of_shards])

    def restore_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Restore a result of `all_states`.

        With another number of states, as of a run with other shards, the first shard gets them all.
        """
        own = len(self.of_shards)
        if len(states) == own * self.strategy.world_size:
            first = self.strategy.rank * own
            for measures, state in zip(self.of_shards, states[first : first + own], strict=True):
                measures.load_state_dict(state)
        elif self.strategy.is_main:
            for state in states:
                self.of_shards[0].add_state(state)

    def _of_all(self, own: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the states of the shards of all processes (collective)."""
        states: list[dict[str, Any]] = []
        for those in self.strategy.gather(own):
            states += those
        return states
