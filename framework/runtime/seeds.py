"""Random numbers: every stream has a seed derived from the seed of the run and the stream's name.

So no stream disturbs another one.
"""

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


class GeneratorUsers:
    """The threads that use the global generators of this process at the moment.

    A fit advances the generators; a measurement restores them at its end. So a fit needs exclusive
    use: while one thread fits, no other thread may fit or measure. Several threads may measure at
    the same time.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Assume that no thread uses the generators, as in a child process after a fork."""
        self.lock = threading.Lock()
        self.fits: Counter[int] = Counter()  # by thread: a callback may start another fit
        self.measurements: Counter[int] = Counter()

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Use the generators exclusively.

        Raises:
            FrameworkError: another thread uses them.
        """
        thread = threading.get_ident()
        self._enter(self.fits, thread, [self.fits, self.measurements])
        try:
            yield
        finally:
            self._leave(self.fits, thread)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Use the generators in a block that restores them.

        Raises:
            FrameworkError: another thread fits.
        """
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
                        f"another thread of this process {does} a model, and both would use the "
                        "same random generators: wait until it ends, or use another process"
                    )
            own[thread] += 1

    def _leave(self, own: Counter[int], thread: int) -> None:
        with self.lock:
            own[thread] -= 1
            if own[thread] == 0:
                del own[thread]


USERS = GeneratorUsers()  # a global, as the generators are
fitting = USERS.fitting
measuring = USERS.measuring
os.register_at_fork(after_in_child=USERS.forget)  # it does not have the other threads


def derive(seed: int, *names: object) -> int:
    """Return the seed of a named stream, such as `derive(seed, "order", epoch)`.

    It is a pure function of the arguments, with 63 bits.
    """
    text = "/".join(map(str, (seed, *names)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator for a named stream."""
    return torch.Generator().manual_seed(derive(seed, *names))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (on every device)."""
    import numpy  # torch runs without it, and a run without arrays need not import it

    with fitting():
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)


def order(seed: int, epoch: int, size: int) -> torch.Tensor:
    """Return the order of an epoch: a permutation of `size` indices.

    It is a pure function of the arguments.
    """
    return torch.randperm(size, generator=generator(seed, "order", epoch))


def capture() -> dict[str, Any]:
    """Return the states of all global generators: Python, NumPy, torch, and each CUDA device.

    All values are plain types or tensors, as checkpoints contain them.
    """
    import numpy

    version, internal, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state()
    kind, keys, position, has_gauss, numpy_gauss = numpy_state
    return {
        "python": [version, torch.from_numpy(numpy.array(internal)), gauss],
        "numpy": [
            str(kind),
            torch.from_numpy(keys.astype("int64")),
            int(position),
            int(has_gauss),
            float(numpy_gauss),
        ],
        "torch": torch.get_rng_state(),
        "cuda": cuda_states(),
    }


def restore(state: dict[str, Any]) -> None:
    """Restore the states that `capture` returned."""
    import numpy

    version, internal, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    with fitting():
        random.setstate((version, tuple(internal.tolist()), gauss))
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([cuda_state.cpu() for cuda_state in state["cuda"]])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore all global generators after a block, such as a validation during training."""
    import numpy

    with measuring():
        python_state = random.getstate()
        numpy_state = numpy.random.get_state()
        torch_state = torch.get_rng_state()
        cuda = cuda_states()
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)
            torch.set_rng_state(torch_state)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)


@contextmanager
def stream(seed: int) -> Iterator[None]:
    """Draw the random numbers of a seed in a block, and restore all global generators after it."""
    with undisturbed():
        seed_everything(seed)
        yield


def cuda_states() -> list[torch.Tensor]:
    """Return the state of each CUDA device; empty while no device is used."""
    if not torch.cuda.is_initialized():
        return []
    return torch.cuda.get_rng_state_all()
