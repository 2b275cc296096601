"""The best values of a logged metric."""

import math
from typing import Any, Literal

from framework import (
    Context,
    SettingError,
    did_you_mean,
)
from framework.contracts.direction import direction_sign, metric_directions

Mode = Literal["auto", "min", "max"]


class Best:
    """The best values so far of one logged metric, the very best first; NaN and infinity never are."""

    def __init__(self, monitor: str, mode: Mode, min_delta: float = 0.0, most: int = 1):
        self.monitor, self.mode, self.min_delta, self.most = monitor, mode, min_delta, most
        self.sign = 0.0 if mode == "auto" else direction_sign(mode)
        self.ranked: list[tuple[float, int]] = []  # (value, step)
        self.restored: dict[str, Any] = {}

    def start(self, trainer: Context) -> bool:
        """Find out which way is better, and drop restored values of another metric.

        Returns whether the restored values were kept.
        Raises SettingError when `mode` is auto and nobody says it.
        """
        if self.mode == "auto":
            self.sign = self._sign(trainer)
        monitor = self.restored.get("monitor", self.monitor)
        sign = self.restored.get("sign", self.sign)
        if monitor == self.monitor and sign == self.sign:
            return True
        self.ranked = []
        return False

    def _sign(self, trainer: Context) -> float:
        directions = metric_directions(trainer.metrics)
        name = self.monitor.partition("/")[2]
        if name not in directions:
            known = [f"{split}/{known}" for known in directions for split in ("train", "val")]
            raise SettingError(
                f"cannot tell whether {self.monitor!r} is better high or low; {did_you_mean(self.monitor, known)} "
                f"(for a value logged by a part of your own, set mode to min or max)"
            )
        return direction_sign(directions[name])

    def improved(self, trainer: Context) -> bool:
        """Whether the newest value is among the best, by more than `min_delta`. Raises SettingError without one."""
        metrics = trainer.state.metrics
        if self.monitor not in metrics:
            raise SettingError(
                f"nothing logs {self.monitor!r}; {did_you_mean(self.monitor, metrics)}"
            )
        value = metrics[self.monitor]
        if not math.isfinite(value):
            return False
        if (
            len(self.ranked) == self.most
            and self.sign * (value - self.ranked[-1][0]) <= self.min_delta
        ):
            return False
        others = [each for each in self.ranked if each[1] != trainer.state.step]
        ranked = sorted(
            [*others, (value, trainer.state.step)], key=lambda each: -self.sign * each[0]
        )
        self.ranked = ranked[: self.most]
        return True

    @property
    def on_training(self) -> bool:
        return self.monitor.startswith("train/")

    def state_dict(self) -> dict[str, Any]:
        ranked = [list(each) for each in self.ranked]
        return {"best": ranked, "monitor": self.monitor, "sign": self.sign}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = state
        self.ranked = [(value, step) for value, step in state.get("best", [])][: self.most]
