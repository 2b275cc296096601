"""Reading the samples of a split that is not in memory, in this process or in others, the same in all of them."""

import random
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from . import seeds
from .discovery import innermost_line
from .errors import DataError, FrameworkError

Batch = tuple[Tensor, ...]


class Split(Protocol):
    """What a split must have; any map-style torch Dataset does."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class IndexBatches(torch.utils.data.Sampler[list[int]]):
    """An epoch's indices in batches, as lists, which DataLoader wants; made one at a time."""

    def __init__(self, indices: Tensor, batch_size: int):
        self.indices, self.batch_size = indices, batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        return (chunk.tolist() for chunk in self.indices.split(self.batch_size) if len(chunk))


class SeededSamples(torch.utils.data.Dataset):
    """A split whose samples are each read under random generators of their own, in whatever process that is.

    An error in a sample comes back in place of the batch: torch would wrap it in the text of a worker's traceback.
    """

    def __init__(self, split: Split, seed: int):
        self.split, self.seed = split, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> list[Any] | FrameworkError:
        states = None if torch.utils.data.get_worker_info() else random_states()
        try:
            return [self.read(index) for index in indices]
        except FrameworkError as error:
            return error
        finally:
            if states:
                restore(states)

    def read(self, index: int) -> Any:
        seed = seeds.derive(self.seed, index)
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        try:
            return self.split[index]
        except FrameworkError:
            raise
        except Exception as error:
            where = innermost_line(error)
            raise DataError(f"sample {index} cannot be read: {type(error).__name__}: {error}{where}") from error


def random_states() -> tuple[Any, ...]:
    """The states of Python's, torch's and (where it is imported) NumPy's global generators."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), torch.default_generator.get_state(), numpy and numpy.random.get_state()


def restore(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    torch.default_generator.set_state(states[1])
    if states[2] is not None:
        sys.modules["numpy"].random.set_state(states[2])


def collate(samples: list[Any] | FrameworkError) -> Batch | FrameworkError:
    """Stack samples into a batch; an error passes through, so that it arrives as itself."""
    if isinstance(samples, FrameworkError):
        return samples
    try:
        return as_batch(torch.utils.data.default_collate(samples))
    except FrameworkError as error:
        return error
    except (RuntimeError, TypeError, KeyError) as error:
        return DataError(f"samples of a batch do not stack (have they one shape and type?): {error}")


def as_batch(batch: Any) -> Batch:
    """Return a tuple of tensors. Raises DataError for anything else."""
    parts = (batch,) if isinstance(batch, Tensor) else batch
    if not isinstance(parts, tuple | list) or not all(isinstance(part, Tensor) for part in parts):
        held = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(f"a batch must be a tuple of tensors (inputs, targets), not {type(batch).__name__} ({held})")
    return tuple(parts)


def ignore_signals(worker: int) -> None:
    """Leave SIGINT and SIGTERM to the main process: a scheduler sends them to all, and the step must be finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
