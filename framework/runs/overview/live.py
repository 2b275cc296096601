"""Follow runs while they write: the state in status.json, and the curves in metrics.jsonl.

Only these two files are read, and whether the process of the run holds its lock. A refresh reads
what was appended since the last one. Its cost, and the memory, do not grow with the run: a long
file is read in parts at first, and a curve keeps a limited number of points.

This module does not import torch, so that `framework watch` starts at once.
"""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from framework.contracts.history import Curve
from framework.errors import RunError
from framework.runs.file_names import METRICS, STATUS_FILE
from framework.runs.run_files import MOST_SERIES, RunFiles, metrics_row, number_in
from framework.runs.run_state import ACTIVE, State
from framework.system.files import open_file, parse_row

MOST_POINTS = 2_000  # of a curve
MOST_READ = 4 * 2**20  # bytes that one refresh reads
PARTS = 192  # of a longer file, which are read in place of all of it
PART_BYTES = 2**14
TAIL_BYTES = 2**20
QUIET_SECONDS = 120.0  # without news, after which a running run gets a warning


class LiveMetrics:
    """The curves of a run, read as they grow.

    Attributes:
        curves: by metric, in the order in which they appear; each has a value.
        step: the last step that was read.
        exists: whether there is a metrics.jsonl.
        sampled: whether the file was so long that only parts of it were read.
    """

    def __init__(self, run: Path):
        self.run = run
        self.exists = False
        self._restart()

    def _restart(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.step = 0
        self.position = 0
        self.file: tuple[int, int] | None = None  # device and inode
        self.sampled = False

    def refresh(self) -> None:
        """Read the lines that were appended.

        Raises:
            RunError: the file is a link or not regular.
        """
        try:
            file = open_file(self.run, METRICS)
        except (FileNotFoundError, NotADirectoryError):
            self.exists = False
            return
        except OSError as error:
            raise RunError(f"{METRICS} cannot be read: {error.strerror}") from error
        with file:
            self.exists = True
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self.file or status.st_size < self.position:
                self._restart()  # replaced or truncated by a run that is resumed
                self.file = identity
            if status.st_size - self.position > MOST_READ:
                self._sample(file, status.st_size)
            self._read(file, MOST_READ)

    def _sample(self, file: BinaryIO, size: int) -> None:
        """Read parts of a long file, up to its tail."""
        self.sampled = True
        end = size - TAIL_BYTES
        span = (end - self.position) // PARTS
        for start in range(self.position, end - PART_BYTES, max(span, PART_BYTES)):
            file.seek(start)
            content = file.read(PART_BYTES)
            first = content.find(b"\n") + 1  # the part begins inside a line
            last = content.rfind(b"\n") + 1
            self._add_lines(content[first:last])
        file.seek(end)
        content = file.read(TAIL_BYTES)
        self.position = end + content.find(b"\n") + 1

    def _read(self, file: BinaryIO, most: int) -> None:
        """Read the complete lines from the present position on."""
        file.seek(self.position)
        content = file.read(most)
        complete = content[: content.rfind(b"\n") + 1]
        if not complete and len(content) == most:  # a line without end
            self.position += most
        self.position += len(complete)
        self._add_lines(complete)

    def _add_lines(self, lines: bytes) -> None:
        for line in lines.splitlines():
            content = parse_row(line)
            row = None if content is None else metrics_row(content)
            if row is None:
                continue
            if row.step < self.step:  # the run was resumed from an earlier step
                self._drop_after(row.step)
            self.step = row.step
            for metric, value in row.values.items():
                self._add_value(metric, row.step, value)

    def _add_value(self, metric: str, step: int, value: float) -> None:
        if metric not in self.curves:
            if len(self.curves) >= MOST_SERIES:
                return
            self.curves[metric] = Curve(most_points=MOST_POINTS)
        self.curves[metric].add(step, value)

    def _drop_after(self, step: int) -> None:
        curves = self.curves
        self.curves = {}
        for metric, curve in curves.items():
            for point in curve:
                if point.step < step:
                    self._add_value(metric, *point)


class LiveRun:
    """A run that is followed.

    Attributes:
        path: the folder of the run.
        label: a name for the screen.
        status: the content of status.json.
        state: see `State` in run_state.py.
        metrics: the curves.
        problem: why a file cannot be read; "" otherwise.
    """

    def __init__(self, path: Path, label: str):
        self.path = path
        self.label = label
        self.metrics = LiveMetrics(path)
        self.status: dict[str, Any] = {}
        self.state: State = "unknown"
        self.problem = ""
        self.is_read = False
        self._seen: tuple[int, int] | None = None

    def refresh(self) -> None:
        """Read what is new; a run that has ended is read again only if its files have changed."""
        seen = (modified(self.path / STATUS_FILE), modified(self.path / METRICS))
        if self.is_read and self.state not in ACTIVE and seen == self._seen:
            return
        files = RunFiles(self.path)
        self.status = files.status
        self.state = files.state
        self.problem = ""
        if self.status or not files.problems:
            self._seen = seen
        else:
            self.problem = files.problems[0]
        try:
            self.metrics.refresh()
        except RunError as error:
            self.problem = str(error)
        self.is_read = True

    @property
    def step(self) -> int:
        """The number of steps done, as far as it is known."""
        return max(int(number_in(self.status, "step") or 0), self.metrics.step)

    @property
    def total_steps(self) -> int:
        """The steps of the whole run; 0 if they are not known."""
        return max(int(number_in(self.status, "total_steps") or 0), 0)

    @property
    def updated(self) -> float | None:
        """Seconds since the run has written its state or a metric; None if it is not known."""
        times = [modified(self.path / name) / 1e9 for name in (STATUS_FILE, METRICS)]
        newest = max(times)
        return max(time.time() - newest, 0.0) if newest else None

    @property
    def eta_seconds(self) -> float | None:
        """The remaining seconds of training of a run that is running; None if not known."""
        eta = number_in(self.status, "eta_seconds")
        updated = number_in(self.status, "updated")
        if self.state != "running" or eta is None or updated is None:
            return None
        return max(eta - max(time.time() - updated, 0.0), 0.0)

    @property
    def samples_per_second(self) -> float | None:
        """The speed of a run in training."""
        if self.state != "running":
            return None
        return number_in(self.status, "samples_per_second")

    @property
    def checkpoint(self) -> tuple[int, float] | None:
        """The step of the last checkpoint, and its age in seconds."""
        step = number_in(self.status, "checkpoint_step")
        written = number_in(self.status, "checkpoint_time")
        if step is None or written is None:
            return None
        return int(step), max(time.time() - written, 0.0)

    @property
    def processes(self) -> int:
        """The number of processes; 0 if it is not known."""
        return int(number_in(self.status, "processes") or 0)

    @property
    def reason(self) -> str:
        """Why the run has failed or stopped; "" otherwise."""
        reason = self.status.get("reason")
        if self.state not in ("failed", "stopped") or not isinstance(reason, str):
            return ""
        return reason

    def process_text(self) -> str:
        """Return the processes, and the slowest of them; "" for a single process."""
        if self.processes < 2:
            return ""
        text = f"{self.processes} processes"
        curves = self.metrics.curves
        slowest = curves.get("train/slowest_process")
        if slowest is not None and math.isfinite(slowest.last.value):
            text += f", the slowest is rank {slowest.last.value:.0f}"
        for name in ("communication", "waiting"):
            curve = curves.get(f"train/{name}")
            if curve is not None and math.isfinite(curve.last.value):
                text += f", {curve.last.value:.0%} {name}"
        return text

    def warnings(self) -> Iterator[str]:
        """Yield what a user should look at."""
        if self.state == "stale":
            yield "its process ended without a result; `framework resume` continues the run"
        if self.problem:
            yield self.problem
        updated = self.updated
        if self.state == "running" and updated is not None and updated > QUIET_SECONDS:
            yield f"no news for {updated / 60:.0f} min"
        if not self.metrics.exists:
            yield "there is no metrics.jsonl: loggers=[json_lines,...] writes it"
        for metric, curve in self.metrics.curves.items():
            if not math.isfinite(curve.last.value):
                yield f"{metric} is not finite"
        noted = self.status.get("warnings")
        for text in noted if isinstance(noted, list) else ():
            if isinstance(text, str):
                yield text


def modified(path: Path) -> int:
    """Return the time of the last change of a file in nanoseconds; 0 without the file."""
    try:
        return os.lstat(path).st_mtime_ns
    except OSError:
        return 0
