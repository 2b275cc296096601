"""The best values of a logged metric."""

import math
from typing import Any, Literal

from framework import Context, SettingError, did_you_mean
from framework.contracts.direction import direction_sign, metric_directions

Mode = Literal["auto", "min", "max"]


class Best:
    """The best finite values of one logged metric so far.

    Args:
        monitor: tag of the metric, such as val/loss.
        mode: whether low (min) or high (max) is better; auto: the metric itself decides.
        min_delta: a smaller difference is no improvement.
        count: number of values to keep.

    Attributes:
        ranked: (value, step) of each, the best first.
    """

    def __init__(self, monitor: str, mode: Mode, min_delta: float = 0.0, count: int = 1):
        self.monitor = monitor
        self.mode = mode
        self.min_delta = min_delta
        self.count = count
        self.sign = 0.0 if mode == "auto" else direction_sign(mode)
        self.ranked: list[tuple[float, int]] = []
        self.restored: dict[str, Any] = {}

    def start(self, trainer: Context) -> bool:
        """Determine which direction is better, and drop restored values of another metric.

        Returns:
            Whether the restored values were kept.

        Raises:
            SettingError: `mode` is auto and the metric is unknown.
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
            known: list[str] = []
            for metric in directions:
                known += [f"train/{metric}", f"val/{metric}"]
            suggestion = did_you_mean(self.monitor, known)
            raise SettingError(
                f"the better direction of {self.monitor!r} is not known; {suggestion} "
                f"(for a value that custom code logs, set mode=min or mode=max)"
            )
        return direction_sign(directions[name])

    def improved(self, trainer: Context) -> bool:
        """Rank the newest value; return whether it is among the best, by more than `min_delta`.

        With several processes, all of them rank the value of the main one (collective).

        Raises:
            SettingError: the metric is not logged.
        """
        metrics = trainer.state.metrics
        if self.monitor not in metrics:
            raise SettingError(
                f"nothing logs {self.monitor!r}; {did_you_mean(self.monitor, metrics)}"
            )
        value = metrics[self.monitor]
        if trainer.strategy.world_size > 1:
            value = trainer.strategy.from_main(value)
        if not math.isfinite(value):
            return False
        if len(self.ranked) == self.count:
            worst = self.ranked[-1][0]
            if self.sign * (value - worst) <= self.min_delta:
                return False
        step = trainer.state.step
        ranked = [entry for entry in self.ranked if entry[1] != step]
        ranked.append((value, step))
        ranked.sort(key=lambda entry: -self.sign * entry[0])
        self.ranked = ranked[: self.count]
        return True

    @property
    def on_training(self) -> bool:
        """Whether the metric is measured in training, not in validation."""
        return self.monitor.startswith("train/")

    def state_dict(self) -> dict[str, Any]:
        """Return the best values and the metric that they belong to."""
        ranked = [list(entry) for entry in self.ranked]
        return {"best": ranked, "monitor": self.monitor, "sign": self.sign}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values; `start` drops them if they belong to another metric."""
        self.restored = state
        ranked = [(value, step) for value, step in state.get("best", [])]
        self.ranked = ranked[: self.count]
