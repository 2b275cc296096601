"""When memory is full: what to say, and how to go on with less of a batch at once."""

import resource
import warnings
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from framework.errors import DataError, FrameworkError
from framework.errors.user_code import text_of

from .batch import Batch
from .torch_internals.tensor_version import version_of


class OutOfMemory(FrameworkError, torch.OutOfMemoryError):
    """The device has no memory left for what was asked of it."""


def is_full(error: BaseException) -> bool:
    """Whether an error is one of the forms in which torch or Python say that memory is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in text_of(error)  # on the CPU torch raises a RuntimeError


def free_bytes(device: torch.device) -> int | None:
    """Return how many bytes of memory a device has free; None where it does not tell.

    On the CPU a limit of a control group counts as well, as containers and batch systems set one.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = numbers_in(Path("/proc/meminfo")).get("MemAvailable:")
    left = cgroup_bytes()
    if free is None:
        return left
    return free * 1024 if left is None else min(free * 1024, left)


def cgroup_bytes(
    listing: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return how many bytes of memory the control groups of this process leave to it; None without a limit.

    Cached files count as free: the system drops them first.

    Args:
        listing: the file with the control groups of the process.
        root: where control groups are mounted, of version 1 or 2.
    """
    found = []
    for line in lines_in(listing):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, maximum, current, cached = root, "memory.max", "memory.current", "{}_file"
        elif "memory" in controllers.split(","):
            base, maximum, current = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
            cached = "total_{}_file"
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):  # each of them may have a limit
            if folder.is_relative_to(base):
                limit, used = first_number(folder / maximum), first_number(folder / current)
                if limit is None or used is None:
                    continue
                stat = numbers_in(folder / "memory.stat")
                files = stat.get(cached.format("active"), 0) + stat.get(
                    cached.format("inactive"), 0
                )
                found.append(max(0, limit - max(0, used - files)))
    return min(found, default=None)


def first_number(file: Path) -> int | None:
    """Return the number in a file; None when there is none ("max")."""
    text = " ".join(lines_in(file))
    return int(text) if text.isdigit() else None


def numbers_in(file: Path) -> dict[str, int]:
    """Return the numbers in a file with a name and a number a line; empty when there is no such file."""
    numbers = {}
    for line in lines_in(file):
        name, *rest = line.split()
        if rest and rest[0].isdigit():
            numbers[name] = int(rest[0])
    return numbers


def lines_in(file: Path) -> list[str]:
    """Return the lines of a file of the system; none when it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def available_bytes() -> int | None:
    """Return how many bytes of memory this process can still get; None where the system does not say.

    That is what `free_bytes` says of the CPU, or less if the address space of the process is limited (`ulimit -v`).
    """
    free = free_bytes(torch.device("cpu"))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    statm = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not statm.is_file():
        return free
    used = int(statm.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    left = max(0, limit - used)
    return left if free is None else min(free, left)


def check_room(needed: float, what: str) -> None:
    """Raise DataError when this machine has not so many bytes of memory free (where it tells how many it has)."""
    free = available_bytes()
    if free is not None and needed > free:
        raise DataError(
            f"{what} takes about {needed / 2**30:.3g} GiB, and {free / 2**30:.3g} GiB are free"
        )


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn every form in which torch says that memory is full into OutOfMemory, with what takes less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_full(error) or isinstance(error, OutOfMemory):
            raise
        words = (str(error).strip() or "memory is full").splitlines()[0]
        advice = "a smaller batch, micro_batch=auto (the step stays the same), or precision bf16, takes less"
        raise OutOfMemory(
            f"{device} has no room for this run: {advice}. torch says: {words}"
        ) from error


def versions(batches: Iterable[Batch]) -> list[Hashable]:
    """Return a value for each tensor that differs after an in-place change."""
    found: list[Hashable] = []
    for batch in batches:
        found += [version_of(tensor) for tensor in batch]
    return found


class MicroBatches:
    """How many samples go through the model at once. A batch of more is split along its first axis.

    Attributes:
        size: samples at once; None for whole batches.
        auto: whether the size is halved when memory is full.
    """

    def __init__(self, size: int | Literal["auto"] | None):
        self.auto = size == "auto"
        self.size = size if isinstance(size, int) else None
        self.largest = 0  # part of the last batch that was split

    def reset(self) -> None:
        """Forget what an earlier fit found out: try whole batches again."""
        if self.auto:
            self.size = None

    def split(self, batch: Batch) -> list[Batch]:
        """Return the batch in parts of at most `size` samples, in order."""
        samples = len(batch[0])
        self.largest = samples if self.size is None else min(samples, self.size)
        if self.largest == samples:
            return [batch]
        return list(zip(*(tensor.split(self.largest) for tensor in batch), strict=True))

    def halve(self, error: BaseException, unchanged: bool = True) -> bool:
        """Halve the samples at once after an error; return whether it makes sense to try again.

        Args:
            error: what was raised.
            unchanged: whether the batch is as it was before.

        Raises OutOfMemory when another try would run other inputs, since the batch is changed.
        """
        if not self.auto or not is_full(error) or self.largest <= 1:
            return False
        if not unchanged:
            raise OutOfMemory(
                "micro_batch=auto: memory is full, and the batch cannot be run again, since the "
                "model changes its inputs in place; expected a clone of them in `forward`, or "
                f"micro_batch below {self.largest}"
            ) from error
        self.size = -(-self.largest // 2)
        warnings.warn(
            f"memory is full with {self.largest} samples at once: going on with {self.size}",
            stacklevel=2,
        )
        return True

    def state_dict(self) -> dict:
        return {"size": self.size} if self.auto else {}

    def load_state_dict(self, state: dict) -> None:
        if self.auto:
            self.size = state.get("size")
