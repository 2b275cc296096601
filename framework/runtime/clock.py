"""The time of a run by activity: counters that are always on, and a profiler.

The counters never wait for a device; the profiler does.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from time import perf_counter
from typing import Any

import torch

from framework.errors import RunError
from framework.errors.terminal import print_line, printable_lines
from framework.system.files import write_file

NO_DETAIL = nullcontext()
TRACE = "profile.pt.trace.json"
COMMUNICATION = "communication and waiting"  # for the other processes of the run
WAITING_FOR_DATA = "waiting for data"
PAUSED = "paused"  # by `framework tell`
SKIPPED = 5  # steps before the profiler starts
RECORDED = 50  # steps that it records
SLOW_SHARE = 0.3  # share of the time spent waiting for data that is worth advice
SLOW_SECONDS = 1.0  # least time spent waiting for data that is worth advice


def slow_data(shares: Mapping[str, float], seconds: float) -> float | None:
    """Return the share of the time spent waiting for data, or None if it is small.

    Args:
        shares: the share of each activity in the time of training, see `Clock.shares`.
        seconds: the time of training.
    """
    share = shares.get(WAITING_FOR_DATA, 0.0)
    if share < SLOW_SHARE or share * seconds < SLOW_SECONDS:
        return None
    return share


def seconds_of_waiting(clock: "Clock") -> float:
    """Return the seconds that the training loop of a clock has waited for data."""
    return clock.seconds.get(WAITING_FOR_DATA, 0.0)


class Clock:
    """Counts seconds by activity, such as "waiting for data" or "validation".

    Time that no activity counts belongs to the training steps.
    """

    def __init__(self) -> None:
        self.began = perf_counter()
        self.seconds: dict[str, float] = {}
        self.nested: list[float] = []  # for each open activity, the time of the ones inside it

    def add(self, part: str, seconds: float) -> None:
        """Add seconds to an activity."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of a block to an activity, without that of activities inside the block."""
        began = perf_counter()
        self.nested.append(0.0)
        try:
            yield
        finally:
            elapsed = perf_counter() - began
            self.add(name, elapsed - self.nested.pop())
            if self.nested:
                self.nested[-1] += elapsed

    def detail(self, name: str) -> AbstractContextManager[Any]:
        """Count the time of a block if a profiler is recording."""
        return NO_DETAIL

    def step(self) -> None:
        """Note the end of a step."""

    def finish(self) -> None:
        """Note the end of the run, successful or not."""

    @property
    def elapsed(self) -> float:
        """Seconds since the clock began."""
        return perf_counter() - self.began

    def shares(self) -> dict[str, float]:
        """Return the share of the steps and of each activity in the time since the clock began.

        They add up to 1. The activities are sorted by their time, the longest first.
        """
        total = max(self.elapsed, 1e-9)
        longest_first = sorted(self.seconds.items(), key=lambda part: -part[1])
        parts = {name: seconds / total for name, seconds in longest_first}
        return {"steps": 1 - sum(parts.values()), **parts}


class CurrentClock:
    """The clock of the fit in progress, for code that has no trainer; None outside of fits."""

    def __init__(self) -> None:
        self.clock: Clock | None = None

    @contextmanager
    def set(self, clock: Clock) -> Iterator[None]:
        """Use a clock in a block."""
        before = self.clock
        self.clock = clock
        try:
            yield
        finally:
            self.clock = before

    def part(self, name: str) -> AbstractContextManager[Any]:
        """Return a block whose time is added to an activity of the clock, if there is one."""
        return NO_DETAIL if self.clock is None else self.clock.part(name)


CURRENT_CLOCK = CurrentClock()  # a global, as the connection of the processes is


class Profiler(Clock):
    """Records some early steps in detail, prints a table, and writes a trace.

    While it records, each activity waits for the device at its end, so that it counts its own time
    only. This makes the run slower.

    Args:
        device: the device of the model.
        folder: the folder of the trace, which https://ui.perfetto.dev shows; None for no trace.

    Attributes:
        recorded: seconds of the parts of a step, once they are recorded.
        details: the names of the parts of a step, which are counted while it records only.
    """

    def __init__(self, device: torch.device, folder: Path | None):
        super().__init__()
        self.device = device
        self.folder = folder
        self.steps = 0
        self.recorder: torch.profiler.profile | None = None
        self.seconds_before: dict[str, float] = {}
        self.recording_began = 0.0
        self.recorded: dict[str, float] = {}
        self.details: set[str] = set()

    def detail(self, name: str) -> AbstractContextManager[Any]:
        return NO_DETAIL if self.recorder is None else self._recorded(name)

    @contextmanager
    def _recorded(self, name: str) -> Iterator[None]:
        self.details.add(name)
        with self.part(name), torch.profiler.record_function(name):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

    def step(self) -> None:
        self.steps += 1
        if self.steps == SKIPPED:
            self._start()
        elif self.steps == SKIPPED + RECORDED:
            self.finish()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.recorder = torch.profiler.profile(activities=activities)
        self.recorder.__enter__()
        self.seconds_before = dict(self.seconds)
        self.recording_began = perf_counter()

    def finish(self) -> None:
        if self.recorder is None:
            return
        total = perf_counter() - self.recording_began
        recorder = self.recorder
        self.recorder = None
        recorder.__exit__(None, None, None)
        spent = {}
        for name, seconds in self.seconds.items():
            spent[name] = seconds - self.seconds_before.get(name, 0.0)
        spent["the rest"] = total - sum(spent.values())
        steps = self.steps - SKIPPED
        self.recorded = {name: seconds / max(steps, 1) for name, seconds in spent.items()}
        table = times_table(spent, total, steps)
        print(printable_lines(table), file=sys.stderr)
        if self.folder is not None:
            write_trace(recorder, self.folder)
            trace = self.folder / TRACE
            print_line(f"trace: {trace} (open it in https://ui.perfetto.dev)", sys.stderr)


def write_trace(recorder: torch.profiler.profile, folder: Path) -> None:
    """Write the trace into a folder, completely or not at all.

    torch writes to a path, and reports no error of a full disk. So it writes to a temporary folder
    first.

    Raises:
        RunError: the trace cannot be written.
    """
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / TRACE
        recorder.export_chrome_trace(str(file))
        trace = file.read_bytes() if file.exists() else b""
    if not trace.rstrip().endswith(b"}"):
        raise RunError(f"{folder / TRACE} cannot be written: is {gettempdir()} full?")
    write_file(folder, TRACE, trace)


def times_table(seconds: Mapping[str, float], total: float, steps: int) -> str:
    """Return a table of activities, the longest first: microseconds per step, and share.

    Args:
        seconds: the time of each activity; those without time are left out.
        total: the time of all steps.
        steps: the number of steps.
    """
    lines = [f"{f'of a step (mean of {steps})':<28}{'µs':>10}{'share':>8}"]
    spent = [(time, name) for name, time in seconds.items() if time > 0]
    for time, name in sorted(spent, reverse=True):
        lines.append(f"{name:<28}{time / steps * 1e6:>10,.0f}{time / total:>8.1%}")
    lines.append(f"{'in all':<28}{total / steps * 1e6:>10,.0f}{1:>8.0%}")
    return "\n".join(lines)
