"""Randomness: one seed, from which every stream is derived, so that no stream disturbs another."""

import hashlib
import random

import torch


def derive(seed: int, *names: object) -> int:
    """Return a 63-bit seed for a named stream: derive(seed, "order", epoch). A pure function of its arguments."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator for a named stream."""
    return torch.Generator().manual_seed(derive(seed, *names))


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (on every device)."""
    import numpy  # torch runs without it, and a run without arrays need not pay for it

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def order(seed: int, epoch: int, size: int) -> torch.Tensor:
    """Return the order of an epoch, a permutation of `size` indices: a pure function of (seed, epoch, size)."""
    return torch.randperm(size, generator=generator(seed, "order", epoch))
