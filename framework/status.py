"""status.json: where a run stands, for whoever watches it."""

import json
import os
import time
from pathlib import Path
from typing import Any

from .callback import Callback
from .trainer import Trainer


class Status(Callback):
    """Writes the run's status.json at each log and at the end, whole or not at all."""

    def __init__(self, folder: Path):
        self.file = folder / "status.json"

    def on_fit_start(self, trainer: Trainer) -> None:
        self._write(trainer, "running")

    def on_log(self, trainer: Trainer) -> None:
        self._write(trainer, "running")

    def on_fit_end(self, trainer: Trainer) -> None:
        self._write(trainer, "done" if trainer.state.stop is None else "stopped")

    def on_exception(self, trainer: Trainer) -> None:
        self._write(trainer, "failed")

    def _write(self, trainer: Trainer, status: str) -> None:
        state = trainer.state
        left = max(state.total_steps - state.step, 0)
        content: dict[str, Any] = {
            "status": status,
            "reason": state.stop,
            "step": state.step,
            "total_steps": state.total_steps,
            "epoch": state.epoch,
            "wall_seconds": round(state.wall_seconds, 3),
            "eta_seconds": round(state.wall_seconds / state.step * left, 1) if state.step and status == "running" else None,
            "samples_per_second": state.metrics.get("train/samples_per_second"),
            "pid": os.getpid(),
            "updated": time.time(),
        }
        beside = self.file.with_suffix(".tmp")
        beside.write_text(json.dumps(content) + "\n")
        os.replace(beside, self.file)
