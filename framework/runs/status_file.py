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
from contextlib import suppress
from pathlib import Path
from typing import Any

from framework.contracts.callback import Callback
from framework.contracts.context import Context
from framework.errors import FrameworkError, RunError
from framework.errors.user_code import describe
from framework.system.files import open_file, unwritable, write_file

from .run_files import STATUS_FILE

SIZE = 1024  # bytes of the file, at least


class Status(Callback):
    """Writes status.json completely or not at all: at most once a second, and at the end.

    Only the failure of a run whose disk is full overwrites the earlier state in place. A reader may
    then see parts of both, also after a crash of the machine; readers treat that as an unknown
    state.
    """

    changes_training = False
    only_main = True
    seconds = 1.0
    written = -math.inf

    def among(self, trials: int) -> None:
        self.seconds = trials * Status.seconds

    def claim(self, trainer: Context) -> None:
        """Write the first state of a new run, so that a later failure can overwrite it."""
        self._write(trainer, "running")

    def on_fit_start(self, trainer: Context) -> None:
        self._write(trainer, "running")

    def on_log(self, trainer: Context) -> None:
        if time.monotonic() - self.written >= self.seconds:
            self._write(trainer, "running")

    def on_fit_end(self, trainer: Context) -> None:
        self._write(trainer, "testing" if trainer.state.stop is None else "stopped")

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
        content = status_content(trainer, status, reason)
        try:
            write_file(trainer.folder, STATUS_FILE, padded(content))
        except RunError:
            if status != "failed":
                raise
            overwrite(trainer.folder, content)


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
        eta_seconds = round(state.wall_seconds / state.step * remaining_steps, 1)
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
    if "config" in trainer.manifest:  # `resume=auto` compares it without reading the config
        content["config"] = trainer.manifest["config"]
    return content


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
