"""Checkpoints of a run: the newest and the best."""

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from framework import (
    CheckpointError,
    Context,
    Every,
    PositiveInt,
    SavingCallback,
    Schedule,
    SettingError,
    Writer,
    callbacks,
    checkpoints,
    files,
    snapshot,
    state_after_a_step,
)
from framework.contracts.callback import keyed
from framework.contracts.state import Cadence

from .best import Best, Mode


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
            raise SettingError(
                "checkpoint: the run has no folder to save in; give the Trainer a `folder`"
            )
        if "run" not in trainer.manifest:  # the folder of a run was made when it was claimed
            files.make_folder(trainer.folder)
        self.folder = trainer.folder / "checkpoints"
        checkpoints.clean(self.folder)
        step = trainer.state.step
        if (
            step == 0 and "run" not in trainer.manifest and checkpoints.listed(self.folder)
        ):  # a run's folder is claimed
            advice = "give the Trainer another folder, or go on with `fit(resume=...)`"
            raise SettingError(
                f"checkpoint: {self.folder} has those of another fit already: {advice}"
            )
        snapshot.check_model(trainer.model.state_dict())
        snapshot.check_training(self._state_of_parts(trainer))
        snapshot.check_training({"optimizer": {"state": state_after_a_step(trainer.optimizer)}})
        self.saved = step if (self.folder / checkpoints.folder_name(step)).exists() else None
        if self.best is not None:
            self.best.start(trainer)
            if (
                self.best.ranked
                and (best := self.folder / checkpoints.folder_name(self.best.ranked[0][1])).is_dir()
            ):
                checkpoints.link_to(
                    best, "best"
                )  # a kill may have come between the checkpoint and the link

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
            said = isinstance(
                cause, CheckpointError
            )  # a second save that fails for the same reason
            if (
                not said and trainer.folder is not None and trainer.folder.is_dir()
            ):  # or the run failed of its end
                warnings.warn(str(error), stacklevel=2)

    def _sound(self, trainer: Context) -> bool:
        """Whether the state is that after a whole step, not saved yet, and whoever ended the run has time for it."""
        failed = isinstance(sys.exception(), Exception) and not isinstance(
            sys.exception(), CheckpointError
        )
        new = (
            self.folder is not None and trainer.state.step > 0 and self.saved != trainer.state.step
        )
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
                (spoiled if checkpoints.read_manifest(checkpoint)["nan"] else good).append(
                    checkpoint
                )
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
