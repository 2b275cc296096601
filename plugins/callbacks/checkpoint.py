"""Callbacks that act on a run: early stopping, checkpoints, clipping, a time limit."""

import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from framework import (
    Callback,
    CheckpointError,
    Context,
    Every,
    NonNegativeFloat,
    Pattern,
    PositiveFloat,
    PositiveInt,
    SavingCallback,
    Schedule,
    SettingError,
    Writer,
    callbacks,
    checkpoints,
    did_you_mean,
    files,
    gradient_numbers,
    snapshot,
    state_after_a_step,
)
from framework.contracts.callback import keyed
from framework.contracts.state import SECONDS, Cadence

Mode = Literal["auto", "min", "max"]
DURATION = r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|h)\s*"
Duration = Annotated[str, Pattern(DURATION, "a duration like 90s, 30min or 1.5h")]


class Best:
    """The best values so far of one logged metric, the very best first; NaN and infinity never are."""

    def __init__(self, monitor: str, mode: Mode, min_delta: float = 0.0, most: int = 1):
        self.monitor, self.mode, self.min_delta, self.most = monitor, mode, min_delta, most
        self.sign = {"min": -1.0, "max": 1.0}.get(mode, 0.0)
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
        better = {"loss": "lower"} | {metric.name: metric.better for metric in trainer.metrics}
        name = self.monitor.partition("/")[2]
        if name not in better:
            known = [f"{split}/{known}" for known in better for split in ("train", "val")]
            raise SettingError(
                f"cannot tell whether {self.monitor!r} is better high or low; {did_you_mean(self.monitor, known)} "
                f"(for a value logged by a part of your own, set mode to min or max)"
            )
        return 1.0 if better[name] == "higher" else -1.0

    def improved(self, trainer: Context) -> bool:
        """Whether the newest value is among the best, by more than `min_delta`. Raises SettingError without one."""
        metrics = trainer.state.metrics
        if self.monitor not in metrics:
            raise SettingError(f"nothing logs {self.monitor!r}; {did_you_mean(self.monitor, metrics)}")
        value = metrics[self.monitor]
        if not math.isfinite(value):
            return False
        if len(self.ranked) == self.most and self.sign * (value - self.ranked[-1][0]) <= self.min_delta:
            return False
        others = [each for each in self.ranked if each[1] != trainer.state.step]
        ranked = sorted([*others, (value, trainer.state.step)], key=lambda each: -self.sign * each[0])
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


@callbacks.register("early_stop", aliases=["early_stopping"])
class EarlyStop(Callback):
    """Ends the run when a metric has not improved for some validations."""

    changes_training = False
    follows_metrics = True

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

    def on_fit_start(self, trainer: Context) -> None:
        if not self.best.start(trainer):
            self.waited = 0
        if self.best.monitor.startswith("val/") and trainer.val_batches is None:
            raise SettingError(
                f"early_stop: there is no validation split to measure {self.best.monitor} on; monitor train/loss"
            )

    def on_log(self, trainer: Context) -> None:
        if self.best.on_training:
            self._look(trainer)

    def on_validation_end(self, trainer: Context) -> None:
        if not self.best.on_training:
            self._look(trainer)

    def _look(self, trainer: Context) -> None:
        if self.best.improved(trainer):
            self.waited = 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            best = [f"is best at {value:.6g} (step {step})" for value, step in self.best.ranked]
            since = best[0] if best else "has never been finite"
            name, times = self.best.monitor, self.waited
            trainer.stop("early_stop", f"{name} {since} and did not improve {times} times in a row")

    def state_dict(self) -> dict[str, Any]:
        return {**self.best.state_dict(), "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state)
        self.waited = state.get("waited", 0)


@callbacks.register("checkpoint", aliases=["model_checkpoint"])
class Checkpoint(SavingCallback):
    """Saves all that it takes to go on, in the run's folder under `checkpoints`; always at the end too.

    The newest ones stay, and the best, to the first of which the link `checkpoints/best` leads. A checkpoint is written
    when all of a step is done, so a run resumed from it goes on as if nothing had happened; also when the run is told
    to stop by a signal, and when it fails between two steps (in reading data).
    """

    def __init__(
        self,
        every: Every = "1epoch",
        monitor: str | None = "val/loss",
        mode: Mode = "auto",
        keep: PositiveInt = 2,
        best: PositiveInt = 1,
        background: bool = True,
    ):
        """Say when to save and what to keep.

        Args:
            every: when to save; besides, whenever the monitored metric is among the best so far.
            monitor: what tells the best ones; null for none.
            mode: whether low (min) or high (max) is better; auto: as the metric itself says.
            keep: how many of the newest stay (those with NaN in the weights do not count); a
                resumed run also keeps the one that it resumed from.
            best: how many of the best stay.
            background: write while training goes on, from a copy in memory, once a second at most; what would be
                removed before its turn comes is then never written. false: training waits until it is on the disk.
        """
        self.cadence, self.keep, self.background = Cadence(every), keep, background
        self.best = None if monitor is None else Best(monitor, mode, most=best)
        self.writer, self.recent = Writer(), list[int]()
        self.folder: Path | None = None
        self.saved: int | None = None
        self.found_better = False
        self.checked = False  # the state after a step is one that can be saved

    def reset(self) -> None:
        super().reset()
        self.recent = []
        self.saved = None
        self.found_better = False
        self.checked = False

    def among(self, trials: int) -> None:
        self.writer.pause, self.writer.rest = trials * Writer.pause, trials * Writer.rest

    def on_fit_start(self, trainer: Context) -> None:
        if trainer.folder is None:
            raise SettingError("checkpoint: the run has no folder to save in; give the Trainer a `folder`")
        if "run" not in trainer.manifest:  # the folder of a run was made when it was claimed
            files.make_folder(trainer.folder)
        self.folder = trainer.folder / "checkpoints"
        checkpoints.clean(self.folder)
        step = trainer.state.step
        if step == 0 and "run" not in trainer.manifest and checkpoints.listed(self.folder):  # a run's folder is claimed
            advice = "give the Trainer another folder, or go on with `fit(resume=...)`"
            raise SettingError(f"checkpoint: {self.folder} has those of another fit already: {advice}")
        snapshot.check_model(trainer.model.state_dict())
        snapshot.check_training(self._state_of_parts(trainer))
        snapshot.check_training({"optimizer": {"state": state_after_a_step(trainer.optimizer)}})
        self.saved = step if (self.folder / checkpoints.folder_name(step)).exists() else None
        if self.best is not None:
            self.best.start(trainer)
            if self.best.ranked and (best := self.folder / checkpoints.folder_name(self.best.ranked[0][1])).is_dir():
                checkpoints.link_to(best, "best")  # a kill may have come between the checkpoint and the link

    def on_log(self, trainer: Context) -> None:
        if self.best is not None and self.best.on_training:
            self.found_better |= self.best.improved(trainer)

    def on_validation_end(self, trainer: Context) -> None:
        if self.best is not None and not self.best.on_training:
            self.found_better |= self.best.improved(trainer)

    def on_step_done(self, trainer: Context) -> None:
        self.writer.check()
        if not self.checked:
            self._check_state(trainer)
        state = trainer.state
        if self.cadence.due(state, epoch_end=state.batch == 0) or self.found_better:
            self._save(trainer)

    def on_fit_end(self, trainer: Context) -> None:
        if self.saved != trainer.state.step or self.found_better:
            self._save(trainer)
        self.finish_saving()

    def on_exception(self, trainer: Context) -> None:
        """Save where the run stands, if it failed between two steps; never hide what it failed of."""
        cause = sys.exception()
        try:
            self.finish_saving()
            if self._sound(trainer):
                self._save(trainer)
                self.finish_saving()
        except CheckpointError as error:
            said = isinstance(cause, CheckpointError)  # a second save that fails for the same reason
            if not said and trainer.folder is not None and trainer.folder.is_dir():  # or the run failed of its end
                warnings.warn(str(error), stacklevel=2)

    def _sound(self, trainer: Context) -> bool:
        """Whether the state is that after a whole step, not saved yet, and whoever ended the run has time for it."""
        failed = isinstance(sys.exception(), Exception) and not isinstance(sys.exception(), CheckpointError)
        new = self.folder is not None and trainer.state.step > 0 and self.saved != trainer.state.step
        return failed and new and trainer.at_boundary

    def hurry_saving(self) -> None:
        self.writer.begin_at_once()

    def finish_saving(self) -> None:
        """Wait until every checkpoint asked for is on the disk; raise what went wrong."""
        self.writer.join()

    def _check_state(self, trainer: Context) -> None:
        """Raise CheckpointError at once, not at the first save, for a state that cannot be saved."""
        parts = keyed(trainer.callbacks)
        callbacks = {key: callback.state_dict() for key, callback in parts.items()}
        snapshot.check_training(self._state_of_parts(trainer) | {"callbacks": callbacks})
        self.checked = True

    def _state_of_parts(self, trainer: Context) -> dict[str, Any]:
        """Return the state of what a user gives to `fit`, which is there before its first event."""
        schedule = trainer.schedule.state_dict() if isinstance(trainer.schedule, Schedule) else {}
        return {"optimizer": trainer.optimizer.state_dict(), "schedule": schedule}

    def _save(self, trainer: Context) -> None:
        with trainer.clock.part("checkpoint"):
            self._submit(trainer)

    def _submit(self, trainer: Context) -> None:
        training = trainer.capture()
        model, step = training.pop("model"), trainer.state.step
        for key, callback in keyed(trainer.callbacks).items():
            callback.on_save(model, training["callbacks"][key])
        state = (self.folder, model, training, step, trainer.manifest)
        pinned = self._pinned(trainer)
        then = partial(self._keep, step, pinned, self._is_best(step))
        if not self.background:
            then(checkpoints.save(*state))
        else:
            self.recent = [*self.recent, step][-self.keep :]
            self.writer.submit(*state, then=then, stays={*pinned, *self.recent})
        self.saved, self.found_better = step, False

    def _is_best(self, step: int) -> bool:
        return self.found_better and self.best is not None and self.best.ranked[0][1] == step

    def _pinned(self, trainer: Context) -> set[int | None]:
        """The steps whose checkpoints stay, whatever else is removed."""
        best = [] if self.best is None else [step for _, step in self.best.ranked]
        return {trainer.state.step, trainer.resumed_from, *best}

    def _keep(self, step: int, pinned: set[int | None], is_best: bool, saved: Path) -> None:
        """Once a checkpoint is on the disk and verified: link the best, remove what is neither new nor pinned.

        It may run in the writer's thread, so what it needs of the run is given. What is damaged stays: nobody knows
        what it is. What is of a later step stays: it is of another course of the run, which went further.
        """
        checkpoints.verify(saved)
        if is_best:
            checkpoints.link_to(saved, "best")
        good, spoiled = [], []
        for checkpoint in checkpoints.listed(saved.parent):
            if checkpoints.step_of(checkpoint) > step or checkpoint.is_symlink():
                continue
            try:
                (spoiled if checkpoints.read_manifest(checkpoint)["nan"] else good).append(checkpoint)
            except CheckpointError:
                continue
        for checkpoint in [*good[: -self.keep], *spoiled]:
            if checkpoints.step_of(checkpoint) not in pinned:
                checkpoints.remove(checkpoint)

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

    alone, recordable = False, True
    follows_metrics = False

    def __init__(self, norm: PositiveFloat | None = 1.0, value: PositiveFloat | None = None):
        """Say how far gradients may go; by norm first, if both are set.

        Args:
            norm: the largest 2-norm of all gradients together; null for no limit.
            value: the largest absolute value of a single component (the real or imaginary part of
                a complex number); null for no limit.
        """
        if norm is None and value is None:
            raise SettingError("clip_gradients: with neither `norm` nor `value` there is nothing to clip")
        self.norm, self.value = norm, value
        self.measured: Tensor | None = None

    def reset(self) -> None:
        super().reset()
        self.measured = None

    def on_gradients(self, trainer: Context) -> None:
        parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        if self.norm is not None:
            self.measured = clip_norm(parameters, self.norm)
        if self.value is not None:
            clip_values(parameters, self.value)

    @staticmethod
    def clip_rows(callbacks: Sequence[Callback], gradients: Tensor) -> None:
        """Clip a row of gradients for each of the callbacks."""
        for row, each in enumerate(callbacks):
            assert isinstance(each, ClipGradients)
            if each.norm is not None:
                each.measured = gradients[row].norm()
                gradients[row].mul_((each.norm / (each.measured + 1e-6)).clamp(max=1.0))  # as torch does
            if each.value is not None:
                gradients[row].clamp_(-each.value, each.value)

    def on_log(self, trainer: Context) -> None:
        if self.measured is not None:
            trainer.log({"train/gradient_norm": self.measured})


def clip_norm(parameters: Sequence[Tensor], norm: float) -> Tensor:
    """Scale gradients so that their 2-norm is at most `norm`; return what it was."""
    try:
        return nn.utils.clip_grad_norm_(parameters, norm)
    except NotImplementedError:  # torch does not clip sparse gradients
        gradients = gradient_numbers(parameters)
    measured = nn.utils.get_total_norm(gradients)
    factor = (norm / (measured + 1e-6)).clamp(max=1.0)  # as torch does
    for gradient in gradients:
        gradient.mul_(factor)
    return measured


def clip_values(parameters: Sequence[Tensor], value: float) -> None:
    """Limit the absolute value of each component of the gradients."""
    try:
        nn.utils.clip_grad_value_(parameters, value)
    except NotImplementedError:  # torch clips neither sparse nor complex gradients
        for gradient in gradient_numbers(parameters):
            gradient.clamp_(-value, value)


@callbacks.register("timer")
class Timer(Callback):
    """Logs train/seconds_per_epoch, and ends the run when it has taken long enough."""

    changes_training = False

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

    def reset(self) -> None:
        self.spent_before = 0.0

    def on_fit_start(self, trainer: Context) -> None:
        self.began = self.epoch_began = time.monotonic()

    def on_epoch_start(self, trainer: Context) -> None:
        self.epoch_began = time.monotonic()

    def on_step_end(self, trainer: Context) -> None:
        if self.spent > self.seconds:
            trainer.stop("timer", f"the limit of {self.limit} is reached")

    def on_epoch_end(self, trainer: Context) -> None:
        trainer.log({"train/seconds_per_epoch": time.monotonic() - self.epoch_began})

    @property
    def spent(self) -> float:
        """Seconds since the run began, without the time between being stopped and resumed."""
        return self.spent_before + time.monotonic() - self.began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spent_before = state.get("seconds", 0.0)
