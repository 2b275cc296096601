"""Where the time of a run goes: counters that are always on and never wait for a device, and a profiler that may."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from time import perf_counter

import torch

from framework.errors import RunError
from framework.errors.terminal import print_line, printable_lines
from framework.system.files import write_file

NOTHING = nullcontext()
TRACE = "profile.pt.trace.json"
SKIPPED, RECORDED = 5, 50  # steps that a profiler waits, and follows
SLOW_SHARE, SLOW_SECONDS = 0.3, 1.0  # of waiting for data, from which on there is advice


def slow_data(shares: Mapping[str, float], seconds: float) -> float | None:
    """Return the share of the time spent waiting for data, or None when that is little.

    Args:
        shares: of the time of training, by what it was spent on.
        seconds: the time of training.
    """
    share = shares.get("waiting for data", 0.0)
    return share if share >= SLOW_SHARE and share * seconds >= SLOW_SECONDS else None


class Clock:
    """Seconds spent by part ("waiting for data", "validation" ...); what no part has is the training steps."""

    def __init__(self) -> None:
        self.began = perf_counter()
        self.seconds: dict[str, float] = {}
        self.inner: list[float] = []  # for each part under way, the time of the parts within it

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a block to a part, except that of parts within it."""
        began = perf_counter()
        self.inner.append(0.0)
        try:
            yield
        finally:
            took = perf_counter() - began
            self.add(name, took - self.inner.pop())
            if self.inner:
                self.inner[-1] += took

    def detail(self, name: str) -> AbstractContextManager:
        """Count the time of a block that is worth it only to a profiler."""
        return NOTHING

    def step(self) -> None:
        """A step is done."""

    def finish(self) -> None:
        """The run is over, well or not."""

    @property
    def elapsed(self) -> float:
        """Seconds since the clock began."""
        return perf_counter() - self.began

    def shares(self) -> dict[str, float]:
        """Return the steps' share of the time since the clock began, and that of each part; they add up to 1."""
        whole = max(self.elapsed, 1e-9)
        longest_first = sorted(self.seconds.items(), key=lambda part: -part[1])
        parts = {name: seconds / whole for name, seconds in longest_first}
        return {"steps": 1 - sum(parts.values()), **parts}


class Profiler(Clock):
    """Follows some early steps in detail; then prints a table, and writes a trace for Perfetto or TensorBoard.

    While it does, every part waits for the device at its end, so that its time is its own; the run is slower for it.
    """

    def __init__(self, device: torch.device, folder: Path | None):
        super().__init__()
        self.device, self.folder, self.steps = device, folder, 0
        self.recorder: torch.profiler.profile | None = None
        self.before: dict[str, float] = {}
        self.from_second = 0.0

    def detail(self, name: str) -> AbstractContextManager:
        return self._followed(name) if self.recorder is not None else NOTHING

    @contextmanager
    def _followed(self, name: str) -> Iterator[None]:
        with self.part(name), torch.profiler.record_function(name):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def step(self) -> None:
        self.steps += 1
        if self.steps == SKIPPED:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self.recorder = torch.profiler.profile(activities=kinds)
            self.recorder.__enter__()
            self.before, self.from_second = dict(self.seconds), perf_counter()
        elif self.steps == SKIPPED + RECORDED:
            self.finish()

    def finish(self) -> None:
        if self.recorder is None:
            return
        whole, count = perf_counter() - self.from_second, self.steps - SKIPPED
        recorder, self.recorder = self.recorder, None
        recorder.__exit__(None, None, None)
        spent = {
            name: seconds - self.before.get(name, 0.0) for name, seconds in self.seconds.items()
        }
        print(
            printable_lines(
                times_table(spent | {"the rest": whole - sum(spent.values())}, whole, count)
            ),
            file=sys.stderr,
        )
        if self.folder is not None:
            write_trace(recorder, self.folder)
            print_line(
                f"trace: {self.folder / TRACE} (open it in https://ui.perfetto.dev)", sys.stderr
            )


def write_trace(recorder: torch.profiler.profile, folder: Path) -> None:
    """Write the trace into a folder, whole or not at all. Raises RunError when it cannot be written.

    torch writes it by its path, and tells no error of a full disk: so it goes to a temporary folder first.
    """
    with TemporaryDirectory() as temporary:
        written = Path(temporary) / TRACE
        recorder.export_chrome_trace(str(written))
        trace = written.read_bytes() if written.exists() else b""
    if not trace.rstrip().endswith(b"}"):
        raise RunError(f"{folder / TRACE} cannot be written: is {gettempdir()} full?")
    write_file(folder, TRACE, trace)


def times_table(seconds: dict[str, float], whole: float, steps: int) -> str:
    """Return a table of parts, the longest first: microseconds a step, and their share of the whole."""
    rows = sorted(((spent, name) for name, spent in seconds.items() if spent > 0), reverse=True)
    lines = [f"{'of a step (mean of ' + str(steps) + ')':<28}{'µs':>10}{'share':>8}"]
    lines += [
        f"{name:<28}{spent / steps * 1e6:>10,.0f}{spent / whole:>8.1%}" for spent, name in rows
    ]
    return "\n".join([*lines, f"{'in all':<28}{whole / steps * 1e6:>10,.0f}{1:>8.0%}"])
