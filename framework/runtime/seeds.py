"""Randomness: one seed, from which every stream is derived, so that no stream disturbs another."""

import hashlib
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from framework.errors import FrameworkError


class Users:
    """The threads that use the global generators of this process at the moment.

    A fit moves the generators; a measurement restores them at its end. So a fit needs them for itself: while one
    thread fits, no other thread may fit or measure. Several threads may measure at the same time.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.fits: Counter[int] = Counter()  # by thread; a callback may start another fit
        self.measurements: Counter[int] = Counter()

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Use the generators exclusively. Raises FrameworkError if another thread uses them."""
        thread = threading.get_ident()
        self._enter(self.fits, thread, [self.fits, self.measurements])
        try:
            yield
        finally:
            self._leave(self.fits, thread)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Use the generators and restore them. Raises FrameworkError if another thread fits."""
        thread = threading.get_ident()
        self._enter(self.measurements, thread, [self.fits])
        try:
            yield
        finally:
            self._leave(self.measurements, thread)

    def _enter(self, own: Counter[int], thread: int, excluded: list[Counter[int]]) -> None:
        with self.lock:
            for users in excluded:
                if users.keys() - {thread}:
                    does = "fits" if users is self.fits else "evaluates or predicts with"
                    raise FrameworkError(
                        f"another thread of this process {does} a model, and both would use the same random "
                        "generators: wait until it ends, or use another process"
                    )
            own[thread] += 1

    def _leave(self, own: Counter[int], thread: int) -> None:
        with self.lock:
            own[thread] -= 1
            if own[thread] == 0:
                del own[thread]


USERS = Users()  # of the generators, which are of the process as well
fitting, measuring = USERS.fitting, USERS.measuring
os.register_at_fork(after_in_child=USERS.__init__)  # type: ignore[misc]  # the other threads are not in the child


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

    with fitting():
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
        "python": [
            version,
            torch.from_numpy(numpy.array(internal)),
            gauss,
        ],  # as 625 numbers it takes a millisecond
        "numpy": [
            str(kind),
            torch.from_numpy(keys.astype("int64")),
            int(position),
            int(has_gauss),
            float(numpy_gauss),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Take back what `capture` gave."""
    import numpy

    version, internal, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    with fitting():
        random.setstate((version, tuple(internal.tolist()), gauss))
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run something (a validation) that must not move the generators of training."""
    import numpy

    with measuring():
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
