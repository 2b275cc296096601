"""The number of threads that an operation of torch uses on the CPU (intra-op parallelism)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL_MODEL_PRODUCTS = 20_000_000


def suitable_threads(model: nn.Module, rows: int, workers: int = 0) -> int:
    """Return the number of threads for the operations of a model.

    Below about 20 million products in a forward pass, a second thread costs more time than it
    saves, and much more where another process needs its core: a small model gets one thread. A
    large model gets all threads of torch but those that data workers need. The environment variable
    OMP_NUM_THREADS overrides this.

    Args:
        model: the model to train.
        rows: how often a step uses each weight: samples, times positions of sequences and images.
        workers: number of data workers.
    """
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return threads
    weights = 0
    for parameter in model.parameters():
        if parameter.ndim > 1:
            weights += parameter.numel()
    if rows * weights < SMALL_MODEL_PRODUCTS:
        return 1
    return max(threads - workers, 1)


@contextmanager
def intra_op_threads(number: int) -> Iterator[None]:
    """Let each operation use `number` threads; restore the earlier number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
