"""status.json: the state of a run, for users and programs that watch it.

Each state is padded with spaces to the same size. So a run that fails because the disk is full can
overwrite its earlier state, which needs no new block on the disk.
"""

import errno
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from framework.contracts.callback import Callback
from framework.contracts.context import Context
from framework.errors import FrameworkError, RunError, short
from framework.errors.user_code import describe
from framework.runtime.clock import PAUSED, Clock, Profiler
from framework.system.files import open_file, unwritable, write_file

from . import checkpoint
from .file_names import STATUS_FILE
from .run_state import read_status
from .run_time import RunTime, read_time

SIZE = 3072  # bytes of the file, at least
LEAST_SECONDS = 1.0  # between two writes
MOST_WARNINGS = 3  # the last ones, in the file
WARNING_CHARACTERS = 160


class Status(Callback):
    """Writes status.json completely or not at all: at most once a second, and at the end.

    Only the failure of a run whose disk is full overwrites the earlier state in place. A reader may
    then see parts of both, also after a crash of the machine; readers treat that as an unknown
    state.
    """

    changes_training = False
    only_main = True

    def __init__(self) -> None:
        self.seconds = LEAST_SECONDS
        self.written = -math.inf
        self.warnings: list[str] = []
        self.started: float | None = None  # of the process, in seconds of `time.monotonic`
        self.trials = 1  # that train together
        self.before = RunTime()  # of the run before this process
        self.now = RunTime()  # of this process
        self.has_begun = False  # the training in this process
        self.fit_seconds: float | None = None  # of the training, when it has ended

    def among(self, trials: int) -> None:
        self.trials = trials
        self.seconds = trials * LEAST_SECONDS

    def claim(self, trainer: Context) -> None:
        """Write the first state of a new run, so that a later failure can overwrite it."""
        self._write(trainer, "running")

    def on_fit_start(self, trainer: Context) -> None:
        if trainer.folder is not None:  # of a resumed run, it has the time until now
            self.before = read_time(read_status(trainer.folder)) or RunTime()
        self.has_begun = True
        self.fit_seconds = None
        if self.started is not None:
            self.now.start = time.monotonic() - self.started - trainer.clock.elapsed
        self._write(trainer, "running")

    def on_log(self, trainer: Context) -> None:
        if time.monotonic() - self.written >= self.seconds:
            self._write(trainer, "running")

    def on_fit_end(self, trainer: Context) -> None:
        self._update_time(trainer)
        self.fit_seconds = self.now.training
        self._write(trainer, "testing" if trainer.state.stop is None else "stopped")

    def paused(self, trainer: Context) -> None:
        """Write that the run waits between two steps."""
        self._write(trainer, "paused")

    def continued(self, trainer: Context) -> None:
        """Write that the run no longer waits."""
        self._write(trainer, "running")

    @contextmanager
    def noting_warnings(self) -> Iterator[None]:
        """Keep the last warnings of a block for the file; they are printed as before."""
        show = warnings.showwarning

        def note(message: Warning | str, *args: Any, **more: Any) -> None:
            text = short(" ".join(str(message).split()), most=WARNING_CHARACTERS, quote=False)
            others = [each for each in self.warnings if each != text]
            self.warnings = [*others, text][-MOST_WARNINGS:]
            show(message, *args, **more)

        warnings.showwarning = note
        try:
            yield
        finally:
            warnings.showwarning = show

    def done(self, trainer: Context) -> None:
        """Write that the run is complete."""
        self._write(trainer, "done")

    def on_exception(self, trainer: Context) -> None:
        error = sys.exception()
        assert error is not None
        reason = describe(error)
        if isinstance(error, FrameworkError):
            reason = f"{type(error).__name__}: {error}"
        with suppress(RunError):  # in most cases it has the same cause as the failure
            self._write(trainer, "failed", reason)

    def _write(self, trainer: Context, status: str, reason: str | None = None) -> None:
        if trainer.folder is None:
            return
        self.written = time.monotonic()
        self._update_time(trainer)
        content = status_content(trainer, status, reason)
        content["time"] = self.before.added(self.now).as_dict()
        content |= last_checkpoint(trainer.folder)
        content["warnings"] = self.warnings
        try:
            write_file(trainer.folder, STATUS_FILE, padded(content))
        except RunError:
            if status != "failed":
                raise
            overwrite(trainer.folder, content)

    def _update_time(self, trainer: Context) -> None:
        """Read the clock; after the training, what it counts is the test."""
        if not self.has_begun:
            return
        state = trainer.state
        now = time_of_clock(trainer.clock, state.step - (trainer.resumed_from or 0))
        now.start = self.now.start
        now.stacked = self.trials
        now.device = trainer.device.type
        now.reading = state.reading
        if self.fit_seconds is not None:
            now.test = now.training - self.fit_seconds
            now.training = self.fit_seconds
            now.parts = self.now.parts
        self.now = now


def status_content(trainer: Context, status: str, reason: str | None) -> dict[str, Any]:
    """Return the content of status.json.

    Args:
        reason: of a failure; by default that of the stop, if there is one.
    """
    state = trainer.state
    if reason is None and state.stop is not None:
        reason = str(state.stop)
    eta_seconds = None
    if state.step and status == "running":
        remaining_steps = max(state.total_steps - state.step, 0)
        seconds = state.wall_seconds - trainer.clock.seconds.get(PAUSED, 0.0)
        eta_seconds = round(seconds / state.step * remaining_steps, 1)
    content: dict[str, Any] = {
        "status": status,
        "reason": reason,
        "step": state.step,
        "total_steps": state.total_steps,
        "epoch": state.epoch,
        "wall_seconds": round(state.wall_seconds, 3),
        "eta_seconds": eta_seconds,
        "samples_per_second": state.metrics.get("train/samples_per_second"),
        "processes": trainer.strategy.world_size,
        "pid": os.getpid(),
        "updated": time.time(),
    }
    if trainer.step_kind is not None:
        content["step_kind"] = trainer.step_kind
    if "config" in trainer.manifest:  # `resume=auto` compares it without reading the config
        content["config"] = trainer.manifest["config"]
    return content


def time_of_clock(clock: Clock, steps: int) -> RunTime:
    """Return the time that the clock of a fit has counted so far.

    Args:
        steps: the number of steps of the fit.
    """
    parts = dict(clock.seconds)
    of_a_step = {}
    if isinstance(clock, Profiler):
        of_a_step = clock.recorded
        for name in clock.details:  # counted in the recorded steps only
            parts.pop(name, None)
    return RunTime(
        training=clock.elapsed, parts=parts, steps=steps, sessions=1, of_a_step=of_a_step
    )


def last_checkpoint(run: Path) -> dict[str, Any]:
    """Return the step of the newest checkpoint of a run, and the time when it was written."""
    try:
        newest = checkpoint.listed(run / "checkpoints")[-1:]
        times = [os.lstat(path).st_mtime for path in newest]
    except OSError:
        return {}
    for path, written in zip(newest, times, strict=True):
        return {"checkpoint_step": checkpoint.step_of(path), "checkpoint_time": written}
    return {}


def padded(content: dict[str, Any]) -> bytes:
    """Return a state as JSON in ASCII, padded to at least `SIZE` bytes."""
    return json.dumps(content).ljust(SIZE - 1).encode() + b"\n"


def overwrite(folder: Path, content: dict[str, Any]) -> None:
    """Overwrite the earlier state in place, in one write; a long reason is shortened to fit.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        with open_file(folder, STATUS_FILE, "r+") as file:
            size = max(os.fstat(file.fileno()).st_size, SIZE)
            if len(padded(content)) > size:
                content["warnings"] = []
            reason = content["reason"] or ""
            while len(padded(content)) > size and reason:
                reason = reason[: len(reason) // 2]
                content["reason"] = f"{reason}..."
            data = padded(content)
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.truncate()
    except OSError as error:
        raise unwritable(folder / STATUS_FILE, error, SIZE) from error
