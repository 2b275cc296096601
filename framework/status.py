"""status.json: where a run stands, for whoever watches it."""

import json
import math
import os
import sys
import time
from typing import Any

from .callback import Callback
from .errors import FrameworkError
from .files import write_file
from .trainer import Trainer
from .user_code import describe


class Status(Callback):
    """Writes the run's status.json after a log, at most once a second, and at the end, whole or not at all."""

    changes_training = False
    seconds = 1.0
    written = -math.inf

    def among(self, trials: int) -> None:
        self.seconds = trials * Status.seconds

    def on_fit_start(self, trainer: Trainer) -> None:
        self._write(trainer, "running")

    def on_log(self, trainer: Trainer) -> None:
        if time.monotonic() - self.written >= self.seconds:
            self._write(trainer, "running")

    def on_fit_end(self, trainer: Trainer) -> None:
        self._write(trainer, "testing" if trainer.state.stop is None else "stopped")

    def done(self, trainer: Trainer) -> None:
        """Say that nothing is left to do."""
        self._write(trainer, "done")

    def on_exception(self, trainer: Trainer) -> None:
        error = sys.exception()
        assert error is not None
        reason = describe(error)
        if isinstance(error, FrameworkError):
            reason = f"{type(error).__name__}: {error}"
        self._write(trainer, "failed", reason)

    def _write(self, trainer: Trainer, status: str, reason: str | None = None) -> None:
        if trainer.folder is None:
            return
        state, self.written = trainer.state, time.monotonic()
        seconds_per_step = state.wall_seconds / max(state.step, 1)
        left = max(state.total_steps - state.step, 0)
        content: dict[str, Any] = {
            "status": status,
            "reason": reason or state.stop,
            "step": state.step,
            "total_steps": state.total_steps,
            "epoch": state.epoch,
            "wall_seconds": round(state.wall_seconds, 3),
            "eta_seconds": round(seconds_per_step * left, 1) if state.step and status == "running" else None,
            "samples_per_second": state.metrics.get("train/samples_per_second"),
            "pid": os.getpid(),
            "updated": time.time(),
        }
        if "config" in trainer.manifest:
            content["config"] = trainer.manifest["config"]  # `resume=auto` compares it without reading the config
        write_file(trainer.folder, "status.json", json.dumps(content) + "\n")
