"""Callbacks that act on a run: early stopping, checkpoints, clipping, a time limit, an end to divergence."""

import math
import os
import re
import time
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from framework import Callback, Every, FrameworkError, NonNegativeFloat, PositiveFloat, PositiveInt, Trainer, callbacks
from framework.checkpoint import clean, folder_name, listed, read_manifest, remove, save, step_of
from framework.errors import CheckpointError, SettingError, did_you_mean
from framework.schema import Pattern
from framework.state import SECONDS, Cadence

Mode = Literal["auto", "min", "max"]
DURATION = r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|h)\s*"
Duration = Annotated[str, Pattern(DURATION, "a duration like 90s, 30min or 1.5h")]


class Best:
    """The best value so far of one logged metric; NaN and infinity never are."""

    def __init__(self, monitor: str, mode: Mode, min_delta: float = 0.0):
        self.monitor, self.mode, self.min_delta = monitor, mode, min_delta
        self.sign = {"min": -1.0, "max": 1.0}.get(mode, 0.0)
        self.value: float | None = None
        self.step = 0

    def start(self, trainer: Trainer) -> None:
        """Find out which way is better. Raises SettingError when `mode` is auto and nobody says it."""
        better = {"loss": "lower"} | {metric.name: metric.better for metric in trainer.metrics}
        name = self.monitor.partition("/")[2]
        if self.mode != "auto":
            return
        if name not in better:
            known = [f"{split}/{known}" for known in better for split in ("train", "val")]
            raise SettingError(
                f"cannot tell whether {self.monitor!r} is better high or low; {did_you_mean(self.monitor, known)} "
                f"(for a value logged by a part of your own, set mode to min or max)"
            )
        self.sign = 1.0 if better[name] == "higher" else -1.0

    def improved(self, trainer: Trainer) -> bool:
        """Whether the newest value is the best so far, by more than `min_delta`. Raises SettingError without one."""
        metrics = trainer.state.metrics
        if self.monitor not in metrics:
            raise SettingError(f"nothing logs {self.monitor!r}; {did_you_mean(self.monitor, metrics)}")
        value = metrics[self.monitor]
        if not math.isfinite(value):
            return False
        if self.value is not None and self.sign * (value - self.value) <= self.min_delta:
            return False
        self.value, self.step = value, trainer.state.step
        return True

    @property
    def on_training(self) -> bool:
        return self.monitor.startswith("train/")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.value, "best_step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.step = state.get("best"), state.get("best_step", 0)


@callbacks.register("early_stop", aliases=["early_stopping"])
class EarlyStop(Callback):
    """Ends the run when a metric has not improved for some validations."""

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Mode = "auto",
        patience: PositiveInt = 10,
        min_delta: NonNegativeFloat = 0.0,
    ):
        """Watch one metric.

        Args:
            monitor: val/... is looked at after each validation, train/... whenever it is logged.
            mode: whether low (min) or high (max) is better; auto: as the metric itself says.
            patience: looks in a row without improvement before the run ends.
            min_delta: what is less than this is no improvement.
        """
        self.best, self.patience, self.waited = Best(monitor, mode, min_delta), patience, 0

    def on_fit_start(self, trainer: Trainer) -> None:
        self.best.start(trainer)
        if self.best.monitor.startswith("val/") and trainer.val_batches is None:
            raise SettingError(
                f"early_stop: there is no validation split to measure {self.best.monitor} on; monitor train/loss"
            )

    def on_log(self, trainer: Trainer) -> None:
        if self.best.on_training:
            self._look(trainer)

    def on_validation_end(self, trainer: Trainer) -> None:
        if not self.best.on_training:
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if self.best.improved(trainer):
            self.waited = 0
            return
        self.waited += 1
        if self.waited >= self.patience and trainer.state.stop is None:
            best = self.best
            since = "has never been finite" if best.value is None else f"is best at {best.value:.6g} (step {best.step})"
            trainer.state.stop = f"early_stop: {best.monitor} {since} and did not improve {self.waited} times in a row"

    def state_dict(self) -> dict[str, Any]:
        return {**self.best.state_dict(), "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state)
        self.waited = state.get("waited", 0)


@callbacks.register("checkpoint", aliases=["model_checkpoint"])
class Checkpoint(Callback):
    """Saves all that it takes to go on, in the run's folder under `checkpoints`; always at the end too.

    The newest ones stay, and the best one, to which the link `checkpoints/best` leads. A checkpoint is written when all
    of a step is done, so a run resumed from it goes on as if nothing had happened.
    """

    def __init__(
        self,
        every: Every = "1epoch",
        monitor: str | None = "val/loss",
        mode: Mode = "auto",
        keep: PositiveInt = 2,
    ):
        """Say when to save and what to keep.

        Args:
            every: when to save; besides, whenever the monitored metric is the best so far.
            monitor: what tells the best one; null for none.
            mode: whether low (min) or high (max) is better; auto: as the metric itself says.
            keep: how many of the newest stay (those with NaN in the weights do not count).
        """
        self.cadence, self.keep = Cadence(every), keep
        self.best = None if monitor is None else Best(monitor, mode)
        self.saved: int | None = None
        self.found_better = False

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.folder is None:
            raise SettingError("checkpoint: the run has no folder to save in; give the Trainer a `folder`")
        self.folder = trainer.folder / "checkpoints"
        clean(self.folder)
        step = trainer.state.step
        self.saved = step if (self.folder / folder_name(step)).exists() else None
        if self.best is not None:
            self.best.start(trainer)

    def on_log(self, trainer: Trainer) -> None:
        if self.best is not None and self.best.on_training:
            self.found_better |= self.best.improved(trainer)

    def on_validation_end(self, trainer: Trainer) -> None:
        if self.best is not None and not self.best.on_training:
            self.found_better |= self.best.improved(trainer)

    def on_step_end(self, trainer: Trainer) -> None:
        state = trainer.state
        if self.cadence.due(state, epoch_end=state.batch == 0) or self.found_better:
            self._save(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        if self.saved != trainer.state.step or self.found_better:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        training = trainer.state_dict()
        model = training.pop("model")
        saved = save(self.folder, model, training, trainer.state.step)
        self.saved = trainer.state.step
        if self.found_better:
            link = self.folder / f".best-{os.getpid()}"
            link.unlink(missing_ok=True)
            link.symlink_to(saved.name)
            os.replace(link, self.folder / "best")
        self.found_better = False
        self._rotate(saved.name)

    def _rotate(self, newest: str) -> None:
        """Remove what is neither among the newest, nor the best. What is damaged stays: nobody knows what it is."""
        good, spoiled = [], []
        for checkpoint in listed(self.folder):
            if step_of(checkpoint) > step_of(self.folder / newest) or checkpoint.is_symlink():
                continue  # of another course of the run, which went further
            try:
                (spoiled if read_manifest(checkpoint)["nan"] else good).append(checkpoint)
            except CheckpointError:
                continue
        best = None if self.best is None else folder_name(self.best.step)
        for checkpoint in [*good[: -self.keep], *spoiled]:
            if checkpoint.name not in (newest, best):
                remove(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.best is None else self.best.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.best is not None:
            self.best.load_state_dict(state)


@callbacks.register("clip_gradients", aliases=["gradient_clipping"])
class ClipGradients(Callback):
    """Limits the gradients before each update, and logs their norm before that as train/gradient_norm.

    By norm: g · min(1, norm / ‖g‖₂) over all parameters together (Pascanu et al. 2013, arXiv:1211.5063, section 3.2).
    Nothing is read off the device but at log points.
    """

    def __init__(self, norm: PositiveFloat | None = 1.0, value: PositiveFloat | None = None):
        """Say how far gradients may go; by norm first, if both are set.

        Args:
            norm: the largest 2-norm of all gradients together; null for no limit.
            value: the largest absolute value of a single component; null for no limit.
        """
        if norm is None and value is None:
            raise SettingError("clip_gradients: with neither `norm` nor `value` there is nothing to clip")
        self.norm, self.value = norm, value
        self.measured: Tensor | None = None

    def on_gradients(self, trainer: Trainer) -> None:
        parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        if self.norm is not None:
            self.measured = nn.utils.clip_grad_norm_(parameters, self.norm)
        if self.value is not None:
            nn.utils.clip_grad_value_(parameters, self.value)

    def on_log(self, trainer: Trainer) -> None:
        if self.measured is not None:
            trainer.log({"train/gradient_norm": self.measured})


@callbacks.register("timer")
class Timer(Callback):
    """Logs train/seconds_per_epoch, and ends the run when it has taken long enough."""

    def __init__(self, limit: Duration | None = None):
        """Set a limit, or none.

        Args:
            limit: how long the run may take, all resumed parts of it together, e.g. 30min; null for no limit.
        """
        self.limit, self.seconds = limit, math.inf
        if limit is not None:
            match = re.fullmatch(DURATION, limit)
            if match is None:
                raise SettingError(f"timer: limit should be a duration like 90s, 30min or 1.5h, not {limit!r}")
            self.seconds = float(match[1]) * SECONDS[match[2]]
        self.spent_before = 0.0
        self.began = self.epoch_began = time.monotonic()

    def on_fit_start(self, trainer: Trainer) -> None:
        self.began = self.epoch_began = time.monotonic()

    def on_epoch_start(self, trainer: Trainer) -> None:
        self.epoch_began = time.monotonic()

    def on_step_end(self, trainer: Trainer) -> None:
        if self.spent > self.seconds and trainer.state.stop is None:
            trainer.state.stop = f"timer: the limit of {self.limit} is reached"

    def on_epoch_end(self, trainer: Trainer) -> None:
        trainer.log({"train/seconds_per_epoch": time.monotonic() - self.epoch_began})

    @property
    def spent(self) -> float:
        """Seconds since the run began, without the time between being stopped and resumed."""
        return self.spent_before + time.monotonic() - self.began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spent_before = state.get("seconds", 0.0)


class Diverged(FrameworkError):
    """The loss is no number any more. A result of the run, not a mistake in what was asked: hence another status."""

    exit_status = 3


@callbacks.register("stop_on_nan", aliases=["terminate_on_nan"])
class StopOnNan(Callback):
    """Ends the run with an error when the loss is NaN or infinite, as logged and before each validation."""

    def __init__(self, every_step: bool = False):
        """Say how soon to notice.

        Args:
            every_step: look after each step; it waits for the device each time, which slows fast steps.
        """
        self.every_step = every_step

    def on_step_end(self, trainer: Trainer) -> None:
        if self.every_step:
            self._look(trainer, float(trainer.loss))

    def on_log(self, trainer: Trainer) -> None:
        self._look(trainer, trainer.state.metrics["train/loss"])

    def on_validation_start(self, trainer: Trainer) -> None:
        self._look(trainer, float(trainer.loss))

    def _look(self, trainer: Trainer, loss: float) -> None:
        if math.isfinite(loss):
            return
        noticed = "" if self.every_step else ", or in a step since the last look (every_step=true tells which)"
        raise Diverged(
            f"stop_on_nan: the loss is {loss} at step {trainer.state.step}{noticed}; {first_spoiled(trainer.model)}. "
            f"A lower learning rate, warm-up or clip_gradients may help."
        )


def first_spoiled(model: nn.Module) -> str:
    """Name the first parameter that is not finite, or whose gradient is not."""
    for name, parameter in model.named_parameters():
        for what, values in (("gradient", parameter.grad), ("value", parameter)):
            if values is not None and not values.isfinite().all():
                return f"the first {what} that is not finite is of {name}"
    return "all parameters are still finite"
