"""Free memory, errors for memory that is full, and micro-batches that need less of it."""

import resource
import sys
import warnings
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from framework.errors import DataError, FrameworkError
from framework.errors.user_code import text_of

from .batch import Batch, count_rows, split_rows, tensors_of
from .torch_internals.tensor_version import version_of


class OutOfMemory(FrameworkError, torch.OutOfMemoryError):
    """The memory of a device is full."""


def is_full(error: BaseException) -> bool:
    """Return whether an error of torch or Python reports that memory is full."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in text_of(error)  # on the CPU torch raises a RuntimeError


def free_bytes(device: torch.device) -> int | None:
    """Return the number of free bytes of a device's memory; None if it is not known.

    On the CPU it respects the limit of a control group, which containers and batch systems set.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    available = numbers_in(Path("/proc/meminfo")).get("MemAvailable:")
    if available is not None:
        limits.append(available * 1024)
    cgroup = cgroup_bytes()
    if cgroup is not None:
        limits.append(cgroup)
    return min(limits, default=None)


class CgroupFiles(NamedTuple):
    """The files of a control group, and the statistics that count cached files."""

    limit: str
    usage: str
    cached: tuple[str, str]


CGROUP_V1 = CgroupFiles(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)
CGROUP_V2 = CgroupFiles("memory.max", "memory.current", ("active_file", "inactive_file"))


def cgroup_bytes(
    listing: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the number of bytes that the control groups of this process have left.

    It is None without a limit. Cached files count as free: the system drops them first.

    Args:
        listing: the file that lists the control groups of the process.
        root: the mount point of control groups, of version 1 or 2.
    """
    free = []
    for line in lines_in(listing):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = root
            files = CGROUP_V2
        elif "memory" in controllers.split(","):
            base = root / "memory"
            files = CGROUP_V1
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):  # each of them may have a limit
            if folder.is_relative_to(base):
                left = bytes_left(folder, files)
                if left is not None:
                    free.append(left)
    return min(free, default=None)


def bytes_left(group: Path, files: CgroupFiles) -> int | None:
    """Return the number of bytes that one control group allows; None without a limit."""
    limit = first_number(group / files.limit)
    used = first_number(group / files.usage)
    if limit is None or used is None:
        return None
    statistics = numbers_in(group / "memory.stat")
    cached = sum(statistics.get(name, 0) for name in files.cached)
    return max(0, limit - max(0, used - cached))


def first_number(file: Path) -> int | None:
    """Return the number in a file; None if it has none, such as "max"."""
    text = " ".join(lines_in(file))
    return int(text) if text.isdigit() else None


def numbers_in(file: Path) -> dict[str, int]:
    """Return the numbers of a file with lines of name and number; empty if it is missing."""
    numbers = {}
    for line in lines_in(file):
        name, *rest = line.split()
        if rest and rest[0].isdigit():
            numbers[name] = int(rest[0])
    return numbers


def lines_in(file: Path) -> list[str]:
    """Return the lines of a system file; empty if it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def available_bytes() -> int | None:
    """Return the number of bytes that this process can still allocate; None if it is not known.

    These are the free bytes of the CPU's memory, or less if the address space of the process is
    limited (`ulimit -v`).
    """
    free = free_bytes(torch.device("cpu"))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    statm = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not statm.is_file():
        return free
    used = int(statm.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    left = max(0, limit - used)
    return left if free is None else min(free, left)


def peak_bytes(device: torch.device) -> int:
    """Return the largest memory until now: of tensors on a CUDA device, otherwise of the process.

    That of the process is its resident memory. (On Linux, `getrusage` counts the process that
    started this one, too.)
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = numbers_in(Path("/proc/self/status")).get("VmHWM:")
    if peak is not None:
        return 1024 * peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_room(needed: float, subject: str) -> None:
    """Raise DataError if this machine is known to have less free memory.

    Args:
        needed: the number of bytes.
        subject: of the message, such as "500 sounds".
    """
    free = available_bytes()
    if free is not None and needed > free:
        raise DataError(
            f"{subject} needs about {needed / 2**30:.3g} GiB; {free / 2**30:.3g} GiB are free"
        )


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Raise OutOfMemory, with advice, if an error in a block reports that memory is full."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_full(error) or isinstance(error, OutOfMemory):
            raise
        cause = (str(error).strip() or "memory is full").splitlines()[0]
        raise OutOfMemory(
            f"the memory of {device} is full; a smaller batch, micro_batch=auto (the same step in "
            f"parts) or precision=bf16 needs less. torch: {cause}"
        ) from error


def versions(batches: Iterable[Batch]) -> list[Hashable]:
    """Return a value for each tensor that differs after an in-place change."""
    found: list[Hashable] = []
    for batch in batches:
        found += [version_of(tensor) for tensor in tensors_of(batch)]
    return found


class MicroBatches:
    """Splits batches along their first axis into parts that run through the model one by one.

    Args:
        size: the number of samples of a part; None for whole batches; auto begins with whole
            batches, and halves the size each time memory is full.

    Attributes:
        size: the present number of samples of a part; None for whole batches.
        auto: whether the size is halved when memory is full.
        largest: the number of samples in the largest part of the last batch.
    """

    def __init__(self, size: int | Literal["auto"] | None):
        self.auto = size == "auto"
        self.size = size if isinstance(size, int) else None
        self.largest = 0

    def reset(self) -> None:
        """Try whole batches again, whatever size an earlier fit needed."""
        if self.auto:
            self.size = None

    def split(self, batch: Batch) -> list[Batch]:
        """Return the parts of a batch, in order."""
        samples = count_rows(batch)
        self.largest = samples if self.size is None else min(samples, self.size)
        if self.largest == samples:
            return [batch]
        return split_rows(batch, self.largest)

    def halve(self, error: BaseException, unchanged: bool = True) -> bool:
        """Halve the size after an error; return whether to try the batch again.

        Args:
            error: raised for the batch.
            unchanged: whether the tensors of the batch still have their values.

        Raises:
            OutOfMemory: the batch cannot be tried again, since the model changed it.
        """
        if not self.auto or not is_full(error) or self.largest <= 1:
            return False
        if not unchanged:
            raise OutOfMemory(
                "micro_batch=auto: memory is full, and the batch cannot be run again, since the "
                "model changes its inputs in place; clone them in `forward`, or set micro_batch "
                f"below {self.largest}"
            ) from error
        self.size = -(-self.largest // 2)
        warnings.warn(
            f"memory is full with {self.largest} samples at once: continuing with {self.size}",
            stacklevel=2,
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the size that auto has found; empty without auto."""
        return {"size": self.size} if self.auto else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the size that auto had found."""
        if self.auto:
            self.size = state.get("size")
