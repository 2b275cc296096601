"""Randomness: one seed, from which every stream is derived, so that no stream disturbs another."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def capture() -> dict[str, Any]:
    """Return the state of every global generator in plain types (Python's, NumPy's, torch's, each CUDA device's)."""
    import numpy

    version, internal, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state()
    kind, keys, position, has_gauss, numpy_gauss = numpy_state
    return {
        "python": [version, torch.from_numpy(numpy.array(internal)), gauss],  # as 625 numbers it takes a millisecond
        "numpy": [str(kind), torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(numpy_gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Take back what `capture` gave."""
    import numpy

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run something (a validation) that must not move the generators of training."""
    import numpy

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
