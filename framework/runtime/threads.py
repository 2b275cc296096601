"""Threads within an operation."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL = 20_000_000  # products of a forward pass


def suitable_threads(model: nn.Module, rows: int, workers: int = 0) -> int:
    """Return how many threads an operation of a model may use: one for a small model, else as many as there are cores.

    rows: what each weight is multiplied with in a step (samples; times positions, for sequences and images). Below some
    20 million products a second thread costs more than it does, and much more where another process wants its core.
    Cores that data workers need are left to them; OMP_NUM_THREADS, if it is set, is obeyed.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    products = rows * sum(
        parameter.numel() for parameter in model.parameters() if parameter.ndim > 1
    )
    return 1 if products < SMALL else max(torch.get_num_threads() - workers, 1)


@contextmanager
def intra_op_threads(number: int) -> Iterator[None]:
    """Let operations use so many threads; afterwards torch is set as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
