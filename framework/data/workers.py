"""Reading the samples of a split that is not in memory, in this process or in others, the same in all of them."""

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
from typing import Any, Protocol

import torch
from torch import Tensor

from framework.errors import DataError, FrameworkError
from framework.errors.user_code import describe, reason_of
from framework.runtime import seeds
from framework.runtime.batch import Batch
from framework.runtime.torch_internals.data_workers import abandon, defer_deaths, shut_down
from framework.system.signals import ENDING, end_with_parent

MEMORY = "loader.read=memory"
SHARED = Path("/dev/shm")  # where batches of worker processes lie
TO_ALL = ENDING  # what a scheduler, or Ctrl-C, sends to every process of a run


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


Read = tuple[Any, list[str]]
"""What was read for a batch (samples, then a batch; or the error that it came to), and which samples were left out."""


class SeededSamples(torch.utils.data.Dataset):
    """A split whose samples are each read under random generators of their own, in whatever process that is.

    A split with `__getitems__` (a list of indices to a list of samples) is asked for a whole batch at once. What that
    gives is taken only if Python's, NumPy's and torch's global generators have not moved: else the samples are read one
    by one, each under its own, and so for the rest of the epoch. So it is where one of them cannot be read, to name it.

    skip: leave out a sample that cannot be read. An error comes back in place of the batch: torch would wrap it in the
    text of a worker's traceback. `reading` says which sample each worker is at, -1 for none, -2 - i for a whole batch
    that begins with sample i: a dead one cannot tell.
    """

    def __init__(self, split: Split, seed: int, skip: bool = False, workers: int = 0):
        self.split, self.seed, self.skip = split, seed, skip
        self.at_once: Callable[[list[int]], Iterable[Any]] | None = getattr(
            split, "__getitems__", None
        )
        self.reading = multiprocessing.Array("q", [-1] * max(workers, 1), lock=False)

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> Read:
        worker = torch.utils.data.get_worker_info()
        if worker:
            return self.read_all(indices, worker.id)
        with seeds.undisturbed():
            return self.read_all(indices, 0)

    def read_all(self, indices: list[int], worker: int) -> Read:
        at_once = self.read_at_once(indices, worker)
        if isinstance(at_once, list):
            return at_once, []
        samples: list[Any] = []
        left_out: list[str] = []
        for index in indices:
            self.reading[worker] = index
            try:
                samples.append(self.read(index))
            except FrameworkError as error:
                if not self.skip:
                    return error, []
                left_out.append(str(error))
        self.reading[worker] = -1
        if at_once is not None and not self.skip:
            return at_once, []
        return samples or DataError(f"no sample of a batch can be read: {left_out[0]}"), left_out

    def read_at_once(self, indices: list[int], worker: int) -> list[Any] | DataError | None:
        """Return the samples; None where they must be read one by one, or the error that stands if each is sound."""
        if self.at_once is None:
            return None
        self.reading[worker], before = -2 - indices[0], generators()
        try:
            samples = list(self.at_once(list(indices)))  # whatever is done to the list that it gets
            if len(samples) != len(indices):
                raise DataError(f"it gives {len(samples)} samples for {len(indices)} indices")
        except Exception as error:
            what = f"samples {indices[0]}, ... cannot be read at once (`__getitems__`), though each alone can"
            return DataError(f"{what}: {describe(error)}")
        if generators() == before:
            self.reading[worker] = -1
            return samples
        self.at_once = None
        return None

    def reseed(self, index: int) -> None:
        seed = seeds.derive(self.seed, index)
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)

    def read(self, index: int) -> Any:
        self.reseed(index)
        try:
            return self.split[index]
        except FrameworkError:
            raise
        except Exception as error:
            raise DataError(f"sample {index} cannot be read: {describe(error)}") from error


class SteadySamples(SeededSamples):
    """Samples to be kept in memory: it is an error if one of them draws random numbers.

    Found are draws from the global generators by any sample. A generator of the split's own is found if one of the
    samples comes out other in `probe`, which reads up to eight of them twice.
    """

    def probe(self) -> int:
        """Look at some samples; return about how many bytes all of them take. Raises DataError for random ones."""
        few = torch.linspace(0, len(self) - 1, min(8, len(self))).long().unique().tolist()
        first, again = (raised(collate(self.__getitems__(few))) for _ in range(2))
        if not all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(first, again, strict=True)
        ):
            raise self.frozen("a sample that is read twice comes out other")
        return sum(part.nbytes for part in first) * len(self) // len(few)

    def reseed(self, index: int) -> None:
        """Leave the generators where they are, to see whether somebody moves them."""

    def read_all(self, indices: list[int], worker: int) -> Read:
        before = generators()
        read = super().read_all(indices, worker)
        if generators() == before or isinstance(read[0], FrameworkError):
            return read
        return self.frozen(
            f"one of the samples {indices[0]} to {indices[-1]} draws random numbers"
        ), []

    def frozen(self, evidence: str) -> DataError:
        return DataError(
            f"{MEMORY} would freeze what is random in {type(self.split).__name__}: {evidence}"
        )


def generators() -> list[Any]:
    """Return where Python's, torch's and NumPy's global generators stand."""
    import numpy  # as in seeds.py

    numpy_state: Any = numpy.random.get_state()
    kind, keys, *rest = numpy_state
    return [random.getstate(), torch.get_rng_state().numpy().tobytes(), kind, keys.tobytes(), *rest]


def raised(read: Read) -> Batch:
    """Return the batch that was read; raises the error that it came to."""
    if isinstance(read[0], FrameworkError):
        raise read[0]
    return read[0]


def read_whole(samples: SteadySamples, workers: int, timeout_seconds: float) -> list[Tensor]:
    """Return all samples of a split as one tensor for each of their parts. Raises DataError when they do not stack."""
    whole: list[Tensor] = []
    chunks, at = IndexBatches(torch.arange(len(samples)), 64), 0
    for read in read_batches(samples, chunks, min(workers, len(chunks)), timeout_seconds):
        batch = raised(read)
        whole = whole or [part.new_empty((len(samples), *part.shape[1:])) for part in batch]
        for tensor, part in zip(whole, batch, strict=True):
            if (tensor.shape[1:], tensor.dtype) != (part.shape[1:], part.dtype):
                found = f"the first is {list(tensor.shape[1:])} {tensor.dtype}, sample {at} {list(part.shape[1:])}"
                raise DataError(
                    f"{MEMORY} needs samples of one shape and type: {found} {part.dtype}"
                )
            tensor[at : at + len(part)] = part
        at += len(batch[0])
    return whole


def collate(read: Read) -> Read:
    """Stack samples into a batch; an error passes through, so that it arrives as itself."""
    samples, left_out = read
    if isinstance(samples, FrameworkError):
        return read
    try:
        batch = as_batch(torch.utils.data.default_collate(samples))
        if torch.utils.data.get_worker_info() is not None:
            for tensor in batch:
                tensor.share_memory_()  # here, as the thread that sends it could not tell of an error
        return batch, left_out
    except FrameworkError as error:
        return error, left_out
    except Exception as error:
        if lacks_shared_memory(error):
            return DataError(shared_memory_is_full()), left_out
        return DataError(
            f"samples of a batch do not stack (have they one shape and type?): {reason_of(error)}"
        ), left_out


def as_batch(batch: Any) -> Batch:
    """Return a tuple of tensors. Raises DataError for anything else."""
    parts = (batch,) if isinstance(batch, Tensor) else batch
    tensors = isinstance(parts, tuple | list) and all(isinstance(part, Tensor) for part in parts)
    if not tensors or len(parts) == 0:
        held = (
            ", ".join(map(str, batch)) if isinstance(batch, Mapping) else describe_batch_part(batch)
        )
        advice = ""
        several = isinstance(parts, tuple | list)
        if several and any(isinstance(part, tuple | list) for part in parts):
            advice = "; a Task of your own takes a flat tuple of any length"
        elif several or hasattr(batch, "__array__"):
            advice = "; torch.as_tensor makes tensors of arrays and numbers"
        got = f"{type(batch).__name__} ({held})"
        raise DataError(f"a batch must be a tuple of tensors (inputs, targets), not {got}{advice}")
    return tuple(parts)


def describe_batch_part(part: Any) -> str:
    """Return what a part of a batch is, in a few words: "tuple of Tensor, ndarray"."""
    if not isinstance(part, tuple | list):
        return type(part).__name__
    kinds = [type(each).__name__ for each in part[:4]]
    if not kinds:
        return f"an empty {type(part).__name__}"
    more = ", ..." if len(part) > 4 else ""
    return f"{type(part).__name__} of {', '.join(kinds)}{more}"


class RecordingContext:
    """The default multiprocessing context, with a list of the processes that were made in it."""

    def __init__(self) -> None:
        self.context = copy(multiprocessing.get_context())
        self.processes: list[BaseProcess] = []
        make_process: Callable[..., BaseProcess] = self.context.Process

        def recorded(*args: Any, **kwargs: Any) -> BaseProcess:
            process = make_process(*args, **kwargs)
            self.processes.append(process)
            return process

        self.context.Process = recorded  # type: ignore[assignment, misc]

    def kill(self) -> None:
        """Kill every process that has started, and wait for its end."""
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
    """Yield batches, read here or by other processes, in order; after the last one no process is left.

    pin: read them into memory that a CUDA device can copy from by itself.
    Raises DataError naming the sample when a process dies, or when no batch has come for `timeout_seconds` (0: never).
    """
    recording = RecordingContext()
    loader: Any = torch.utils.data.DataLoader(
        samples,
        batch_sampler=chunks,
        num_workers=workers,
        collate_fn=collate,  # type: ignore[arg-type]
        worker_init_fn=stay_with_parent,
        timeout=timeout_seconds if workers else 0,
        generator=torch.Generator(),  # DataLoader would draw from the global one, which the model uses
        pin_memory=pin,
        multiprocessing_context=recording.context if workers else None,
    )
    batches = started(loader, recording)
    processes = recording.processes
    wait = defer_deaths() if processes else nullcontext
    try:
        while True:
            with wait():
                read = next(batches, None)
            if read is None:
                return
            yield read[0], read[1]
    except (
        RuntimeError,
        OSError,
        EOFError,
    ) as error:  # OSError: memory that a process shared is gone with it
        for process in processes:
            process.join(0.1)
        # Of a timeout only the text tells: torch raises a RuntimeError, and all processes live.
        if "DataLoader" not in str(error) and all(process.is_alive() for process in processes):
            raise
        raise fault(samples, processes, timeout_seconds) from error
    finally:
        try:
            if processes:
                shut_down(batches)
        finally:
            recording.kill()  # one that hangs ignores everything else, and this program could never end


def started(loader: Any, recording: RecordingContext) -> Any:
    """Return an iterator of a DataLoader, whose processes run. Raises DataError if there is no shared memory."""
    try:
        with undisturbed_start():
            return iter(loader)
    except (OSError, RuntimeError) as error:
        abandon(error)
        recording.kill()
        if not lacks_shared_memory(error):
            raise
        raise DataError(shared_memory_is_full()) from error


def lacks_shared_memory(error: BaseException) -> bool:
    """Whether an error says that a semaphore or a tensor found no room in shared memory."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or "shared memory" in str(error)  # torch raises a RuntimeError without an errno


def shared_memory_is_full() -> str:
    said = f"{SHARED} is full"
    if SHARED.is_dir():
        said += f" ({shutil.disk_usage(SHARED).free:,} bytes are free)"
    return f"{said}, which loader.workers need: use loader.workers=0, or a larger {SHARED} (docker run --shm-size=...)"


def fault(
    samples: SeededSamples, processes: Sequence[BaseProcess], timeout_seconds: float
) -> DataError:
    """Say which sample a dead process was reading, or one that takes too long; the latter is killed."""
    dead = [number for number, process in enumerate(processes) if not process.is_alive()]
    late = [number for number, index in enumerate(samples.reading) if index != -1]
    number = (dead or late or [0])[0]
    index = samples.reading[number]
    which = f"sample {index}" if index >= 0 else f"a batch that begins with sample {-2 - index}"
    what = "a process that loads data" if index == -1 else f"the process that read {which}"
    if not dead:
        for stuck in late:
            processes[stuck].kill()
        return DataError(
            f"no batch has come for {timeout_seconds:g} s (loader.timeout_seconds): {what} hangs"
        )
    status = processes[number].exitcode or 0
    if status == -signal.SIGBUS:  # a page of shared memory was written for which there is no room
        return DataError(shared_memory_is_full())
    how = f"of {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
    return DataError(
        f"{what} has died {how}" + ", perhaps for want of memory" * (status == -signal.SIGKILL)
    )


@contextmanager
def undisturbed_start() -> Iterator[None]:
    """Hold back the signals of a scheduler while processes start, until they ignore them by themselves."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stay_with_parent(worker: int) -> None:
    """Leave the signals that end a command to the main process: they may be sent to all of its processes, and the step
    must be finished.

    A worker dies with its parent, though; torch would notice after 5 s, and never in a sample that hangs.
    """
    for number in TO_ALL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TO_ALL)
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or multiprocessing.get_start_method() == "forkserver":
        end_with_parent(os.getppid())
    else:
        end_with_parent(parent.pid)
