"""What the processes of a run agree on: the items of a step, the time, and the end of the run.

Functions are collective (see `contracts/strategy.py`) if their docstrings say so.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from framework.contracts.state import Stop
from framework.contracts.strategy import Strategy
from framework.data.dataset import Batch
from framework.errors import DataError
from framework.runtime import seeds
from framework.runtime.batch import count_rows
from framework.runtime.shared_time import SHARED_TIME


class StepTotals(NamedTuple):
    """Sums over the batches of a step, in all processes.

    Attributes:
        samples: the number of samples.
        items: the number of items that the mean loss is over.
    """

    samples: int
    items: float | Tensor


def step_totals(
    strategy: Strategy,
    batches: Sequence[Batch],
    counts: Sequence[int | Tensor],
    device: torch.device,
    needed: int = 0,
) -> StepTotals:
    """Return the sums of a step, and let all processes read the same time (collective).

    Args:
        strategy: of the run.
        batches: those of the step that have rows in this process.
        counts: the number of items in each of them.
        device: of the batches; on an accelerator its numbers are not read.
        needed: the number of batches that each process must have rows of.

    Raises:
        DataError: in all processes, if one has no row of a batch that it needs.
    """
    samples = sum([count_rows(batch) for batch in batches])
    main_time = time.monotonic() if strategy.is_main else 0.0
    items = torch.as_tensor(sum(counts), dtype=torch.float64)
    missing = max(needed - len(batches), 0)
    sums = torch.tensor([samples, main_time, missing, 0.0], dtype=torch.float64)
    if device.type == "cpu":
        sums[3] = items
        sums = strategy.sum(sums)
        total: float | Tensor = float(sums[3])
    else:
        sums = strategy.sum(sums)
        total = strategy.sum(items.to(device))
    SHARED_TIME.agreed = float(sums[1])
    if sums[2] > 0:
        raise DataError(
            f"a training batch has fewer samples than there are processes ({strategy.world_size}), "
            "but a batch norm or the task needs samples in each of them: leave out small batches"
        )
    return StepTotals(int(sums[0]), total)


@contextmanager
def same_time(strategy: Strategy) -> Iterator[None]:
    """Let all processes read the time of the main process in a block (collective)."""
    before = SHARED_TIME.agreed  # of a fit whose callback starts this one
    if strategy.world_size > 1:
        SHARED_TIME.agreed = strategy.from_main(time.monotonic())
    try:
        yield
    finally:
        SHARED_TIME.agreed = before


def agreed_stop(strategy: Strategy, request: Stop | None) -> Stop | None:
    """Return the reason to end the run that all processes use (collective).

    It is the first reason of a signal, otherwise the first reason.

    Args:
        strategy: of the run.
        request: the reason of this process, or None.
    """
    requests = int(strategy.sum(torch.tensor(request is not None, dtype=torch.int64)))
    if requests == 0:
        return None
    requested: list[Stop | None] = strategy.gather(request)
    reasons = [reason for reason in requested if reason is not None]
    of_signals = [reason for reason in reasons if reason.signal is not None]
    return [*of_signals, *reasons][0]


@contextmanager
def own_random_numbers(
    strategy: Strategy, seed: int, step: int, part: object = ""
) -> Iterator[None]:
    """Draw the random numbers of (seed, step, part, rank) in a block.

    So the processes have different dropout masks. Outside of such blocks, as in callbacks, all of
    them draw the same random numbers.
    """
    if strategy.world_size == 1:
        yield
        return
    with seeds.stream(seeds.derive(seed, "step", step, part, strategy.rank)):
        yield


def share_generators(strategy: Strategy) -> None:
    """Set the global generators to those of the main process (collective).

    So a DataLoader that shuffles by them has the same order in all processes. Those of CUDA are not
    used for the order.
    """
    if strategy.world_size == 1:
        return
    state = None
    if strategy.is_main:
        state = seeds.capture() | {"cuda": []}
    seeds.restore(strategy.from_main(state))
