"""What the processes of a run agree on: the items of a step, the data, the time and the end.

Functions are collective (see `contracts/strategy.py`) if their docstrings say so.
"""

import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from framework.contracts.state import Stop
from framework.contracts.strategy import Strategy
from framework.data.accumulation import Batches
from framework.data.dataset import Batch
from framework.data.foreign_loader import Checksum, ForeignLoader, known_length
from framework.errors import DataError
from framework.runtime import seeds
from framework.runtime.batch import count_rows
from framework.runtime.shared_time import SHARED_TIME

OTHER_LENGTH = (
    "data: the processes read different numbers of batches. Expected the same batches in all "
    "processes, of which each uses its part of the rows"
)


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


def share_generators(strategy: Strategy, batches: Batches) -> None:
    """Set the global generators, and those of a DataLoader, to those of the main process.

    So a DataLoader that shuffles has the same order in all processes (collective). Those of CUDA
    are not used for the order.
    """
    if strategy.world_size == 1:
        return
    own = batches.generators() if isinstance(batches, ForeignLoader) else []
    states: Any = None
    if strategy.is_main:
        states = seeds.capture() | {"cuda": []}, [generator.get_state() for generator in own]
    of_all, of_loader = strategy.from_main(states)
    seeds.restore(of_all)
    for generator, state in zip(own, of_loader, strict=False):
        generator.set_state(state)


def compared(strategy: Strategy, loader: Batches, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield the batches of an epoch; check that all processes read the same (collective).

    A `Loader` reads the same by its seed. Each process reads whole batches from another iterable
    and uses its own rows of them, so that different batches would repeat and leave out samples.
    The first batches and the lengths are compared; if the length is not known, also whether there
    is a next batch, since a process without one would wait for the others in the next step.

    Args:
        strategy: of the run.
        loader: of the batches.
        batches: those of an epoch.

    Raises:
        DataError: in all processes, if a process has other targets, tensors of other shapes, or
            another number of batches.
    """
    iterator = iter(batches)
    is_whole = strategy.world_size == 1 or loader.slice.is_whole
    if is_whole or not isinstance(loader, ForeignLoader):
        yield from iterator
        return
    batch = next(iterator, None)
    length = known_length(loader)
    facts = strategy.gather((loader.first_batch, length))
    check_first_batch([first for first, _ in facts], strategy.is_main)
    if any(other != length for _, other in facts):
        raise DataError(OTHER_LENGTH)
    while batch is not None:
        yield batch
        batch = next(iterator, None)
        if length is None:
            ended = int(strategy.sum(torch.tensor(batch is None, dtype=torch.int64)))
            if 0 < ended < strategy.world_size:
                raise DataError(OTHER_LENGTH)


def check_first_batch(first: Sequence[Sequence[Checksum]], warns: bool) -> None:
    """Raise DataError if the processes have read different first batches of an epoch.

    Args:
        first: the checksums of the tensors of each process, in the order of the ranks.
        warns: whether to warn of other inputs with the same targets: each process may augment the
            samples with random numbers of its own.
    """
    main = first[0]
    for rank, other in enumerate(first):
        same_shapes = [each.shape for each in other] == [each.shape for each in main]
        if not same_shapes or other[-1:] != main[-1:]:
            raise DataError(
                f"data: process {rank} reads other batches than process 0. Expected the same "
                "batches in all processes, of which each uses its part of the rows: create and "
                "shuffle the data with the same seed, and do not divide it between the processes"
            )
        if other != main and warns:
            warnings.warn(
                f"data: process {rank} reads other inputs than process 0 with the same targets; "
                "for equal inputs, seed the random numbers of the augmentation",
                stacklevel=2,
            )
