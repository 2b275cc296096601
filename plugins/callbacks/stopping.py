"""Callbacks that end a run: early stopping and a time limit."""

import math
from typing import Any

from framework import (
    Callback,
    Context,
    NonNegativeFloat,
    PositiveInt,
    SettingError,
    callbacks,
)
from framework.contracts.duration import Duration, duration_seconds
from framework.contracts.state import SHARED_TIME

from .best import Best, Mode


@callbacks.register("early_stop", aliases=["early_stopping"])
class EarlyStop(Callback):
    """Ends the run when a metric has not improved for some validations.

    Args:
        monitor: val/... is checked after each validation, train/... whenever it is logged.
        mode: whether low (min) or high (max) is better; auto: the metric itself decides.
        patience: checks in a row without improvement before the run ends.
        min_delta: a smaller difference is no improvement.
    """

    changes_training = False
    follows_metrics = True

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Mode = "auto",
        patience: PositiveInt = 10,
        min_delta: NonNegativeFloat = 0.0,
    ):
        self.best = Best(monitor, mode, min_delta)
        self.patience = patience
        self.waited = 0  # checks since the last improvement

    def on_fit_start(self, trainer: Context) -> None:
        if not self.best.start(trainer):
            self.waited = 0
        monitor = self.best.monitor
        if monitor.startswith("val/") and trainer.val_batches is None:
            raise SettingError(
                f"early_stop.monitor={monitor}: there is no validation split; monitor train/loss"
            )

    def on_log(self, trainer: Context) -> None:
        if self.best.on_training:
            self._check(trainer)

    def on_validation_end(self, trainer: Context) -> None:
        if not self.best.on_training:
            self._check(trainer)

    def _check(self, trainer: Context) -> None:
        if self.best.improved(trainer):
            self.waited = 0
            return
        self.waited += 1
        if self.waited < self.patience:
            return
        monitor = self.best.monitor
        checks = "check" if self.waited == 1 else "checks in a row"
        history = "it has never been finite"
        if self.best.ranked:
            value, step = self.best.ranked[0]
            history = f"best value {value:.6g} at step {step}"
        trainer.stop(
            "early_stop", f"{monitor} has not improved for {self.waited} {checks} ({history})"
        )

    def state_dict(self) -> dict[str, Any]:
        return {**self.best.state_dict(), "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state)
        self.waited = state.get("waited", 0)


@callbacks.register("timer")
class Timer(Callback):
    """Logs train/seconds_per_epoch, and ends the run at a time limit.

    Args:
        limit: of the training time, e.g. 30min; a resumed run counts its earlier parts too;
            null for no limit.
    """

    changes_training = False

    def __init__(self, limit: Duration | None = None):
        self.limit = limit
        self.seconds = math.inf
        if limit is not None:
            try:
                self.seconds = duration_seconds(limit)
            except SettingError as error:
                raise SettingError(f"timer: limit: {error}") from None
        self.spent_before = 0.0
        self.began = SHARED_TIME.now()
        self.epoch_began = self.began

    def reset(self) -> None:
        self.spent_before = 0.0

    def on_fit_start(self, trainer: Context) -> None:
        self.began = SHARED_TIME.now()
        self.epoch_began = self.began

    def on_epoch_start(self, trainer: Context) -> None:
        self.epoch_began = SHARED_TIME.now()

    def on_step_end(self, trainer: Context) -> None:
        if self.spent > self.seconds:
            trainer.stop("timer", f"the limit of {self.limit} is reached")

    def on_epoch_end(self, trainer: Context) -> None:
        trainer.log({"train/seconds_per_epoch": SHARED_TIME.now() - self.epoch_began})

    @property
    def spent(self) -> float:
        """Seconds of training, without the time between a stop and a resume."""
        return self.spent_before + SHARED_TIME.now() - self.began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spent_before = state.get("seconds", 0.0)
