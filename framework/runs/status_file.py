"""status.json: where a run stands, for whoever watches it.

Each state is padded with spaces to the same size. So a run that fails because the disk is full can say so in the place
of the state before, which takes no new block.
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

FILE = "status.json"
SIZE = 1024  # bytes of the file, at least


class Status(Callback):
    """Writes the run's status.json after a log, at most once a second, and at the end, whole or not at all.

    Only the failure of a run whose disk is full is written over the state before: a reader may then see parts of both
    for a moment, and a crash of the machine may leave that, which readers take for an unknown state.
    """

    changes_training = False
    seconds = 1.0
    written = -math.inf

    def among(self, trials: int) -> None:
        self.seconds = trials * Status.seconds

    def claim(self, trainer: Context) -> None:
        """Write the first state of a new run, so that whatever it fails of has its place in the file."""
        self._write(trainer, "running")

    def on_fit_start(self, trainer: Context) -> None:
        self._write(trainer, "running")

    def on_log(self, trainer: Context) -> None:
        if time.monotonic() - self.written >= self.seconds:
            self._write(trainer, "running")

    def on_fit_end(self, trainer: Context) -> None:
        self._write(trainer, "testing" if trainer.state.stop is None else "stopped")

    def done(self, trainer: Context) -> None:
        """Say that nothing is left to do."""
        self._write(trainer, "done")

    def on_exception(self, trainer: Context) -> None:
        error = sys.exception()
        assert error is not None
        reason = describe(error)
        if isinstance(error, FrameworkError):
            reason = f"{type(error).__name__}: {error}"
        with suppress(RunError):  # the run has failed already, in most cases of the same cause
            self._write(trainer, "failed", reason)

    def _write(self, trainer: Context, status: str, reason: str | None = None) -> None:
        if trainer.folder is None:
            return
        state, self.written = trainer.state, time.monotonic()
        if reason is None and state.stop is not None:
            reason = str(state.stop)
        seconds_per_step = state.wall_seconds / max(state.step, 1)
        left = max(state.total_steps - state.step, 0)
        content: dict[str, Any] = {
            "status": status,
            "reason": reason,
            "step": state.step,
            "total_steps": state.total_steps,
            "epoch": state.epoch,
            "wall_seconds": round(state.wall_seconds, 3),
            "eta_seconds": round(seconds_per_step * left, 1)
            if state.step and status == "running"
            else None,
            "samples_per_second": state.metrics.get("train/samples_per_second"),
            "pid": os.getpid(),
            "updated": time.time(),
        }
        if "config" in trainer.manifest:
            content["config"] = trainer.manifest[
                "config"
            ]  # `resume=auto` compares it without reading the config
        try:
            write_file(trainer.folder, FILE, padded(content))
        except RunError:
            if status != "failed":
                raise
            overwrite(trainer.folder, content)


def padded(content: dict[str, Any]) -> bytes:
    """Return a state as JSON in ASCII, of `SIZE` bytes if it is not longer."""
    text = json.dumps(content)
    return text.ljust(SIZE - 1).encode() + b"\n"


def overwrite(folder: Path, content: dict[str, Any]) -> None:
    """Write a state over the one before, in one write and with a reason that fits. Raises RunError."""
    try:
        with open_file(folder, FILE, "r+") as file:
            room = max(os.fstat(file.fileno()).st_size, SIZE)
            reason = content["reason"] or ""
            while len(padded(content)) > room and reason:
                reason = reason[: len(reason) // 2]
                content["reason"] = f"{reason}..."
            data = padded(content)
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.truncate()
    except OSError as error:
        raise unwritable(folder / FILE, error, SIZE) from error


MOST_STATUS = 2**20  # bytes


def read_status(run: Path) -> dict[str, Any]:
    """Return the content of status.json; nothing when it is missing or something else.

    It tells the fingerprint of the config only if it is not older than the config.
    """
    try:
        with open_file(run, "status.json", most=MOST_STATUS) as file:
            updated = os.fstat(file.fileno()).st_mtime_ns
            status = json.loads(file.read(MOST_STATUS))
    except (OSError, RunError, ValueError, RecursionError):
        return {}
    if not isinstance(status, dict):
        return {}
    if "config" in status and updated < os.lstat(run / "config.yaml").st_mtime_ns:
        del status["config"]
    return status


def status_of(run: Path) -> str | None:
    """Return the status of a run, such as "done"; None when it has none."""
    status = read_status(run).get("status")
    return status if isinstance(status, str) else None
