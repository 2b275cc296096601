"""Reads the samples of a split that is not in memory, in this process or in workers."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from framework.errors import DataError, FrameworkError, short
from framework.errors.user_code import describe, reason_of
from framework.runtime import seeds
from framework.runtime.batch import Batch, is_flat, named_parts, tensors_of
from framework.runtime.torch_internals.data_workers import (
    defer_deaths,
    mark_shut_down,
    shut_down,
)
from framework.runtime.torch_internals.pytree import named_branches, tree_leaves, with_branches
from framework.system.signals import ENDING, end_with_parent

from .sample_order import BatchIndices, sequential

MEMORY = "loader.read=memory"
SHARED_MEMORY = Path("/dev/shm")  # contains the batches of workers
NOT_READING = -1  # in place of an index
CACHE_BATCH = 64  # samples that are read at once into memory


class Split(Protocol):
    """The methods of a split; any map-style torch Dataset has them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> Any: ...


class Read(NamedTuple):
    """The result of reading one batch.

    Attributes:
        batch: a list of samples, and after `collate` a batch; or an error in its place.
        skipped: the errors of the samples that were skipped.
    """

    batch: Any
    skipped: list[str]


class IndexBatches(torch.utils.data.Sampler[list[int]]):
    """The indices of an epoch as one list per batch, as DataLoader needs them.

    Args:
        batches: the indices of each batch.
        start: number of batches to skip.
    """

    def __init__(self, batches: BatchIndices, start: int = 0):
        self.batches = batches
        self.start = start

    def __len__(self) -> int:
        return max(len(self.batches) - self.start, 0)

    def __iter__(self) -> Iterator[list[int]]:
        for indices in self.batches.read(self.start):
            yield indices.tolist()


class SeededSamples(torch.utils.data.Dataset[Any]):
    """A split whose samples are each read with their own state of the global random generators.

    So a sample is the same in each process. An error is returned in place of the batch, since torch
    would wrap it in the text of a worker's traceback.

    A split with `__getitems__` (from a list of indices to a list of samples) reads a whole batch in
    one call. The result is used only if the global generators of Python, NumPy and torch have not
    moved. Otherwise this batch and the rest of the epoch are read sample by sample. So is a batch
    with an error, to name the sample.

    Args:
        split: a map-style data set.
        seed: the seed of the epoch.
        skip: whether to skip a sample that cannot be read.
        workers: number of workers.

    Attributes:
        reading_sample: for each worker, the index of the sample that it is reading, or NOT_READING.
        reading_batch: for each worker, the first index of the batch that it is reading in one call,
            or NOT_READING. Both are in shared memory: they name the sample if a worker dies or
            hangs.
    """

    def __init__(self, split: Split, seed: int, skip: bool = False, workers: int = 0):
        self.split = split
        self.seed = seed
        self.skip = skip
        self.get_samples: Callable[[list[int]], Iterable[Any]] | None = None
        self.get_samples = getattr(split, "__getitems__", None)
        initial = [NOT_READING] * max(workers, 1)
        self.reading_sample = multiprocessing.Array("q", initial, lock=False)
        self.reading_batch = multiprocessing.Array("q", initial, lock=False)

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> Read:
        """Read the samples of a batch; torch's DataLoader calls this."""
        worker = torch.utils.data.get_worker_info()
        if worker:
            return self.read_batch(indices, worker.id)
        with seeds.undisturbed():
            return self.read_batch(indices, 0)

    def read_batch(self, indices: list[int], worker: int) -> Read:
        """Read the samples of a batch, in one call if the split supports it."""
        at_once = self.read_at_once(indices, worker)
        if isinstance(at_once, list):
            return Read(at_once, [])
        samples: list[Any] = []
        errors: list[str] = []
        for index in indices:
            self.reading_sample[worker] = index
            try:
                samples.append(self.read_sample(index))
            except FrameworkError as error:
                if not self.skip:
                    return Read(error, [])
                errors.append(str(error))
        self.reading_sample[worker] = NOT_READING
        self.reading_batch[worker] = NOT_READING
        if at_once is not None and not self.skip:
            return Read(at_once, [])
        if not samples:
            return Read(DataError(f"no sample of a batch can be read: {errors[0]}"), errors)
        return Read(samples, errors)

    def read_at_once(self, indices: list[int], worker: int) -> list[Any] | DataError | None:
        """Read a batch in one call of the split.

        Returns:
            The samples; None if they have to be read one by one; or the error to report if each of
            them can be read alone.
        """
        if self.get_samples is None:
            return None
        self.reading_sample[worker] = NOT_READING
        self.reading_batch[worker] = indices[0]
        before = generator_states()
        try:
            samples = list(self.get_samples(list(indices)))  # a copy, which the split may change
            if len(samples) != len(indices):
                raise DataError(f"it returns {len(samples)} samples for {len(indices)} indices")
        except Exception as error:
            return DataError(
                f"`__getitems__` cannot read a batch that begins with sample {indices[0]}, "
                f"but `__getitem__` can read each of its samples: {describe(error)}"
            )
        if generator_states() != before:
            self.get_samples = None
            return None
        self.reading_batch[worker] = NOT_READING
        return samples

    def read_sample(self, index: int) -> Any:
        """Return one sample.

        Raises:
            DataError: the split raises an error; with the index of the sample.
        """
        self.reseed(index)
        try:
            return self.split[index]
        except FrameworkError:
            raise
        except Exception as error:
            raise DataError(f"sample {index} cannot be read: {describe(error)}") from error

    def reseed(self, index: int) -> None:
        """Seed the global generators for a sample."""
        seed = seeds.derive(self.seed, index)
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)


class DeterministicSamples(SeededSamples):
    """Samples to cache in memory: it is an error if one of them draws random numbers.

    Each draw from a global generator is found. A generator of the split is found if one of the up
    to eight samples that `probe` reads twice differs.
    """

    def probe(self) -> int:
        """Read some samples twice, and return the estimated number of bytes of all samples.

        Raises:
            DataError: a sample is random.
        """
        count = min(8, len(self))
        # float32 could round the last index up.
        indices = torch.linspace(0, len(self) - 1, count, dtype=torch.float64).long()
        few = torch.unique(indices).tolist()
        first = tensors_of(batch_of(collate(self.__getitems__(few))))
        second = tensors_of(batch_of(collate(self.__getitems__(few))))
        for a, b in zip(first, second, strict=True):
            if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                raise self.random_error("a sample differs when it is read again")
        return sum(part.nbytes for part in first) * len(self) // len(few)

    def reseed(self, index: int) -> None:
        """Keep the state of the generators, so that `read_batch` finds draws."""

    def read_batch(self, indices: list[int], worker: int) -> Read:
        before = generator_states()
        read = super().read_batch(indices, worker)
        if generator_states() == before or isinstance(read.batch, FrameworkError):
            return read
        error = self.random_error(
            f"one of the samples {indices[0]} to {indices[-1]} draws random numbers"
        )
        return Read(error, [])

    def random_error(self, evidence: str) -> DataError:
        """Return the error for random samples."""
        return DataError(
            f"{MEMORY}: the samples of {type(self.split).__name__} are random, and would be the "
            f"same in each epoch: {evidence}"
        )


def generator_states() -> list[Any]:
    """Return the states of the global generators of Python, torch and NumPy."""
    import numpy  # not at the top, as in seeds.py

    numpy_state: Any = numpy.random.get_state()
    kind, keys, *rest = numpy_state
    torch_state = torch.get_rng_state().numpy().tobytes()
    return [random.getstate(), torch_state, kind, keys.tobytes(), *rest]


def batch_of(read: Read) -> Batch:
    """Return the batch that was read, or raise the error in its place."""
    if isinstance(read.batch, FrameworkError):
        raise read.batch
    batch: Batch = read.batch
    return batch


def read_all_samples(
    samples: DeterministicSamples, workers: int, timeout_seconds: float
) -> dict[str | int, Tensor]:
    """Return all samples of a split as one tensor for each of their parts, by name or index.

    Raises:
        DataError: the samples have different shapes or types, are nested more than once or contain
            other values than tensors, or cannot be read.
    """
    names: Sequence[str | int] = ()
    columns: list[Tensor] = []
    done = 0
    size = len(samples)
    chunks = IndexBatches(BatchIndices(sequential(size), CACHE_BATCH, size))
    for read in read_batches(samples, chunks, min(workers, len(chunks)), timeout_seconds):
        parts = named_parts(batch_of(read)) or {}
        names = list(parts)
        batch = list(parts.values())
        for name, part in parts.items():
            if not isinstance(part, Tensor):
                raise DataError(
                    f"{MEMORY} needs samples of tensors: {name} is a {type(part).__name__}"
                )
        if not columns:
            columns = [part.new_empty((len(samples), *part.shape[1:])) for part in batch]
        for column, part in zip(columns, batch, strict=True):
            if (column.shape[1:], column.dtype) != (part.shape[1:], part.dtype):
                raise DataError(
                    f"{MEMORY} needs samples of one shape and type: the first is "
                    f"{list(column.shape[1:])} {column.dtype}, sample {done} is "
                    f"{list(part.shape[1:])} {part.dtype}"
                )
            column[done : done + len(part)] = part
        done += len(batch[0])
    return dict(zip(names, columns, strict=True))


def collate(read: Read) -> Read:
    """Stack samples into a batch; an error stays in its place."""
    if isinstance(read.batch, FrameworkError):
        return read
    return read._replace(batch=stack_samples(read.batch))


def stack_samples(samples: list[Any]) -> Batch | FrameworkError:
    """Return samples as a batch, in shared memory if this process is a worker; or an error."""
    try:
        batch = as_batch(stack(samples))
        if torch.utils.data.get_worker_info() is not None:
            for tensor in tensors_of(batch):
                # Here, since the thread that sends the tensor could not report an error.
                tensor.share_memory_()
        return batch
    except FrameworkError as error:
        return error
    except Exception as error:
        if lacks_shared_memory(error):
            return shared_memory_error()
        return DataError(
            "samples of a batch cannot be stacked; expected one shape and dtype: "
            f"{reason_of(error)}"
        )


def stack(samples: list[Any]) -> Any:
    """Return samples as a batch, as torch's `default_collate`, which does not know dataclasses.

    None stays None if all samples have it.

    Raises:
        DataError: the samples have different fields.
    """
    first = samples[0]
    if first is None and all(sample is None for sample in samples):
        return None
    branches = named_branches(first)
    if branches is None:
        return torch.utils.data.default_collate(samples)
    columns: dict[Any, list[Any]] = {name: [] for name in branches}
    for sample in samples:
        parts = named_branches(sample) or {}
        if parts.keys() != columns.keys():
            raise DataError(
                "samples of a batch have different fields: "
                f"{', '.join(map(str, columns))}; {', '.join(map(str, parts)) or short(sample)}"
            )
        for name, part in parts.items():
            columns[name].append(part)
    return with_branches(first, {name: stack(column) for name, column in columns.items()})


def as_batch(batch: Any) -> Batch:
    """Return a batch as a tuple of tensors, or another nested batch unchanged.

    Raises:
        DataError: it has no tensor with rows, or contains an array instead of a tensor.
    """
    if isinstance(batch, Tensor):
        return (batch,)
    if type(batch) is list:
        batch = tuple(batch)
    if is_flat(batch) and batch:
        return batch
    if named_parts(batch) and are_fields(batch):
        return batch
    advice = ""
    if isinstance(batch, tuple | list | Mapping) or hasattr(batch, "__array__"):
        advice = "; torch.as_tensor makes tensors of arrays and numbers"
    raise DataError(
        "expected a batch of tensors, such as (inputs, targets) or a dict, got "
        f"{type(batch).__name__} ({describe_content(batch)}){advice}"
    )


def are_fields(batch: Any) -> bool:
    """Return whether a nested batch has a tensor with rows, and neither arrays nor bare numbers.

    Texts, None and objects belong to a batch, but a number or array for each row is more likely a
    tensor that is missing.
    """
    if type(batch) is tuple and any(isinstance(part, int | float) for part in batch):
        return False
    leaves = tree_leaves(batch)
    if any(hasattr(leaf, "__array__") and not isinstance(leaf, Tensor) for leaf in leaves):
        return False
    return any(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves)


def describe_content(batch: Any) -> str:
    """Return a short description of the content of a batch, such as "tuple of Tensor, ndarray"."""
    if isinstance(batch, Mapping):
        fields = [f"{name}: {type(part).__name__}" for name, part in list(batch.items())[:8]]
        return ", ".join(fields) + (", ..." if len(batch) > 8 else "")
    if not isinstance(batch, tuple | list):
        return type(batch).__name__
    if not batch:
        return f"an empty {type(batch).__name__}"
    kinds = ", ".join(type(part).__name__ for part in batch[:4])
    more = ", ..." if len(batch) > 4 else ""
    return f"{type(batch).__name__} of {kinds}{more}"


class RecordingContext:
    """The default multiprocessing context, with a list of the processes that it creates."""

    def __init__(self) -> None:
        self.context = copy(multiprocessing.get_context())
        self.processes: list[BaseProcess] = []
        make_process: Callable[..., BaseProcess] = self.context.Process

        def make_recorded(*args: Any, **kwargs: Any) -> BaseProcess:
            process = make_process(*args, **kwargs)
            self.processes.append(process)
            return process

        # mypy takes a context's class of processes for a method.
        self.context.Process = make_recorded  # type: ignore[assignment, misc]

    def kill(self) -> None:
        """Kill all processes that have started, and wait for their end."""
        for process in self.processes:
            if process.pid is not None:
                process.kill()
                process.join()


def read_batches(
    samples: SeededSamples,
    chunks: IndexBatches,
    workers: int,
    timeout_seconds: float,
    pin: bool = False,
) -> Generator[Read, None, None]:
    """Yield batches in order; all workers have ended after the last one.

    Args:
        samples: the samples of a split.
        chunks: the indices of each batch.
        workers: number of workers; 0 reads in this process.
        timeout_seconds: longest time to wait for a batch of a worker; 0 for no limit.
        pin: whether to put batches into pinned memory, from which a CUDA device can copy.

    Raises:
        DataError: a worker has died or hangs; the error names the sample.
    """
    recording = RecordingContext()
    loader: Any = torch.utils.data.DataLoader(
        samples,
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=collate,  # type: ignore[arg-type]  # of the result of `__getitems__`
        worker_init_fn=initialize_worker,
        timeout=timeout_seconds if workers else 0,
        generator=torch.Generator(),  # the default is the global one, which the model uses
        pin_memory=pin,
        multiprocessing_context=recording.context if workers else None,
    )
    batches = start_workers(loader, recording)
    processes = recording.processes
    wait = defer_deaths() if processes else nullcontext
    try:
        while True:
            with wait():
                read = next(batches, None)
            if read is None:
                return
            yield read
    except (RuntimeError, OSError, EOFError) as error:
        # An OSError: the shared memory of a process is lost when it dies.
        for process in processes:
            process.join(0.1)
        # torch raises a RuntimeError after a timeout, when all workers are alive.
        if "DataLoader" not in str(error) and all(process.is_alive() for process in processes):
            raise
        raise worker_error(samples, processes, timeout_seconds) from error
    finally:
        try:
            if processes:
                shut_down(batches)
        finally:
            recording.kill()  # a worker that hangs would keep this program from ending


def start_workers(loader: Any, recording: RecordingContext) -> Any:
    """Start the workers of a DataLoader and return its iterator.

    Raises:
        DataError: shared memory is full.
    """
    try:
        with blocked_signals():
            return iter(loader)
    except (OSError, RuntimeError) as error:
        mark_shut_down(error)
        recording.kill()
        if not lacks_shared_memory(error):
            raise
        raise shared_memory_error() from error


def lacks_shared_memory(error: BaseException) -> bool:
    """Return whether there was no shared memory for a semaphore or a tensor."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or "shared memory" in str(error)  # torch raises a RuntimeError without an errno


def shared_memory_error() -> DataError:
    """Return the error for full shared memory, with advice."""
    free = ""
    if SHARED_MEMORY.is_dir():
        free = f" ({shutil.disk_usage(SHARED_MEMORY).free:,} bytes are free)"
    return DataError(
        f"{SHARED_MEMORY} is full{free}, which loader.workers need: use loader.workers=0 or a "
        f"larger {SHARED_MEMORY} (docker run --shm-size=...)"
    )


def worker_error(
    samples: SeededSamples, processes: Sequence[BaseProcess], timeout_seconds: float
) -> DataError:
    """Return the error for a worker that has died or hangs; workers that hang are killed."""
    dead = [worker for worker, process in enumerate(processes) if not process.is_alive()]
    if dead:
        return death_error(samples, dead[0], processes[dead[0]].exitcode or 0)
    hanging = [worker for worker in range(len(processes)) if is_reading(samples, worker)]
    for worker in hanging:
        processes[worker].kill()
    name = describe_worker(samples, hanging[0] if hanging else 0)
    return DataError(
        f"loader.timeout_seconds={timeout_seconds:g}: no batch arrived in time; {name} hangs"
    )


def death_error(samples: SeededSamples, worker: int, status: int) -> DataError:
    """Return the error for a worker that has ended with an exit status."""
    if status == -signal.SIGBUS:  # no memory for a page of shared memory
        return shared_memory_error()
    name = describe_worker(samples, worker)
    if status >= 0:
        return DataError(f"{name} exited with status {status}")
    hint = " (out of memory?)" if status == -signal.SIGKILL else ""
    return DataError(f"{name} was killed by {signal.Signals(-status).name}{hint}")


def is_reading(samples: SeededSamples, worker: int) -> bool:
    """Return whether a worker is reading samples."""
    present = (samples.reading_sample[worker], samples.reading_batch[worker])
    return present != (NOT_READING, NOT_READING)


def describe_worker(samples: SeededSamples, worker: int) -> str:
    """Return the name of a worker for messages: "data worker reading sample 3"."""
    sample = samples.reading_sample[worker]
    batch = samples.reading_batch[worker]
    if sample != NOT_READING:
        return f"data worker reading sample {sample}"
    if batch != NOT_READING:
        return f"data worker reading a batch that begins with sample {batch}"
    return "a data worker"


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Block the signals that end a command, until the workers that start can ignore them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def initialize_worker(worker: int) -> None:
    """Ignore the signals that end a command, and let this worker die with the main process.

    A scheduler or Ctrl-C may send the signals to all processes of a run; the main process handles
    them, and the present step has to finish. torch would notice the death of the main process only
    after 5 s, and never in a sample that hangs.
    """
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or multiprocessing.get_start_method() == "forkserver":
        end_with_parent(os.getppid())
    else:
        end_with_parent(parent.pid)
