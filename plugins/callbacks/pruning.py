"""Pruning of the bad trials of a search during training."""

import math
import re
from pathlib import Path
from typing import Any, Literal

from framework import Callback, Context, NonNegativeInt, SettingError, callbacks


@callbacks.register("prune")
class Prune(Callback):
    """Ends a trial of a search that is worse than the others.

    It compares the metric of the search between trials at the same number of validations.
    `hydra.sweeper.pruner` adds this callback to each trial.

    Args:
        pruner: median: ends a trial that is worse than half of the others; halving: a third
            continues after 1, 3, 9 ... validations (Li et al. 2020, arXiv:1810.05934);
            hyperband: several halvings, some more patient (Li et al. 2018, arXiv:1603.06560).
        startup: trials that median completes before it prunes any.
        warmup: validations before the first decision.
    """

    changes_training = False
    follows_metrics = True
    only_main = True  # a trial has one value in the study

    def __init__(
        self,
        pruner: Literal["median", "halving", "hyperband"] = "median",
        startup: NonNegativeInt = 5,
        warmup: NonNegativeInt = 2,
    ):
        self.pruner = pruner
        self.startup = startup
        self.warmup = warmup
        self.measurements = 0  # values of the metric so far
        self.judge: Any = None

    def on_fit_start(self, trainer: Context) -> None:
        from framework import Judge, make_pruner

        number = trial_number(trainer.folder)
        if trainer.folder is None or number is None:
            raise SettingError(
                "prune: this run is not a trial of a search; use it with -m hydra/sweeper=optuna"
            )
        rule = make_pruner(self.pruner, self.startup, self.warmup)
        self.judge = Judge(trainer.folder.parent, number, rule)
        self.monitor = self.judge.metrics[0]
        if self.monitor.startswith("val/") and trainer.val_batches is None:
            raise SettingError(f"prune: there is no validation split to measure {self.monitor} on")
        if self.measurements > 0 and self.measurements == self.judge.last:
            self._decide(trainer, math.nan)  # in case a kill came between decision and stop

    def on_log(self, trainer: Context) -> None:
        if self.monitor.startswith("train/"):
            self._measure(trainer)

    def on_validation_end(self, trainer: Context) -> None:
        if not self.monitor.startswith("train/"):
            self._measure(trainer)

    def _measure(self, trainer: Context) -> None:
        self.measurements += 1
        if self.monitor not in trainer.state.metrics:
            raise SettingError(
                f"prune: nothing logs {self.monitor!r}, the metric of the search, during training"
            )
        value = trainer.state.metrics[self.monitor]
        if math.isfinite(value):
            self._decide(trainer, value)

    def _decide(self, trainer: Context, value: float) -> None:
        state = trainer.state
        if self.judge.prunes(value, self.measurements) and state.step != state.total_steps:
            rule = f"{self.pruner}, measurement {self.measurements}"
            trainer.stop("prune", f"{self.monitor} is worse than that of other trials ({rule})")

    def state_dict(self) -> dict[str, Any]:
        return {"looks": self.measurements}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.measurements = state.get("looks", 0)


def trial_number(run: Path | None) -> int | None:
    """Return the number at the start of the name of a trial's run folder."""
    if run is None:
        return None
    match = re.match(r"(\d+)(?:_|$)", run.name)
    return int(match[1]) if match else None
