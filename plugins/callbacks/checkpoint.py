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
    ShardedWriter,
    Writer,
    callbacks,
    checkpoints,
    files,
    processes,
    snapshot,
    state_after_a_step,
)
from framework.contracts.callback import keyed
from framework.contracts.state import Cadence

from .best import Best, Mode


@callbacks.register("checkpoint", aliases=["model_checkpoint"])
class Checkpoint(SavingCallback):
    """Saves checkpoints in the run folder: at a cadence, on improvement, and at the end.

    The folder `checkpoints` keeps the newest and the best ones; the link `checkpoints/best` leads
    to the best. A checkpoint contains the complete state after a step, so a resumed run equals an
    uninterrupted one. A signal that stops the run, or an error between two steps (in reading
    data), also causes a checkpoint.

    Args:
        every: when to save; also saved whenever the monitored metric is among the best so far.
        monitor: the metric that ranks checkpoints; null for none.
        mode: whether low (min) or high (max) is better; auto: the metric itself decides.
        keep: number of newest checkpoints to keep (those with NaN in the weights do not count);
            a resumed run also keeps the one that it resumed from.
        best: number of best checkpoints to keep.
        background: write during training, from a copy in memory, at most once a second; a
            checkpoint that would be removed before its turn is not written. With strategy=fsdp
            all are written, and training waits before a save for the end of the save before it.
            false: training waits until the checkpoint is on the disk.
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
        self.cadence = Cadence(every)
        self.keep = keep
        self.background = background
        self.best = None if monitor is None else Best(monitor, mode, count=best)
        self.writer = Writer()
        self.sharded_writer: ShardedWriter | None = None  # for a sharded state
        self.recent: list[int] = []  # steps of the newest checkpoints
        self.requested: list[int] = []  # steps of those that the user has requested
        self.folder: Path | None = None
        self.saved: int | None = None  # step of the last checkpoint
        self.found_better = False
        self.checked = False  # whether the state after a step can be saved

    def reset(self) -> None:
        super().reset()
        self.recent = []
        self.requested = []
        self.saved = None
        self.found_better = False
        self.checked = False

    def among(self, trials: int) -> None:
        self.writer.pause = trials * Writer.pause
        self.writer.rest = trials * Writer.rest

    def on_fit_start(self, trainer: Context) -> None:
        if trainer.folder is None:
            raise SettingError(
                "checkpoint: the run has no folder to save in; give the Trainer a `folder`"
            )
        if "run" not in trainer.manifest:
            files.make_folder(trainer.folder)
        self.folder = trainer.folder / "checkpoints"
        self._make_sharded_writer(trainer)
        step = trainer.state.step
        if trainer.strategy.is_main:
            self._prepare_folder(self.folder, trainer)
        snapshot.check_model(trainer.model.state_dict())
        snapshot.check_training(self._state_of_parts(trainer))
        snapshot.check_training({"optimizer": {"state": state_after_a_step(trainer.optimizer)}})
        exists = (self.folder / checkpoints.folder_name(step)).exists()
        self.saved = step if trainer.strategy.from_main(exists) else None
        if self.best is not None:
            self.best.start(trainer)
            if trainer.strategy.is_main:
                self._repair_link(self.best, self.folder)

    def _make_sharded_writer(self, trainer: Context) -> None:
        """Make a writer if the strategy shards the state (collective).

        Raises:
            SettingError: there is another checkpoint callback. The saves of both would use the same
                connections at the same time.
        """
        self.sharded_writer = None
        saver = trainer.strategy.state_saver()
        if saver is None:
            return
        count = sum(isinstance(callback, Checkpoint) for callback in trainer.callbacks)
        if count > 1:
            raise SettingError(
                f"checkpoint: expected one such callback with a sharded state, got {count}"
            )
        self.sharded_writer = ShardedWriter(saver, trainer.strategy.rank)

    def _prepare_folder(self, folder: Path, trainer: Context) -> None:
        """Remove unfinished checkpoints from the folder.

        Raises:
            SettingError: it has checkpoints of another fit.
        """
        checkpoints.clean(folder)
        claimed = "run" in trainer.manifest  # a run of an experiment has a new folder of its own
        if trainer.state.step == 0 and not claimed and checkpoints.listed(folder):
            raise SettingError(
                f"checkpoint: {folder} already has checkpoints of another fit: give the"
                " Trainer another folder, or resume with `fit(resume=...)`"
            )

    def on_log(self, trainer: Context) -> None:
        if self.best is not None and self.best.on_training:
            self.found_better |= self.best.improved(trainer)

    def on_validation_end(self, trainer: Context) -> None:
        if self.best is not None and not self.best.on_training:
            self.found_better |= self.best.improved(trainer)

    def on_step_done(self, trainer: Context) -> None:
        self.writer.check()
        if self.sharded_writer is not None:
            self.sharded_writer.check()
        if not self.checked:
            self._check_state(trainer)
        state = trainer.state
        if self.cadence.due(state) or self.found_better:
            self._save(trainer)

    def on_fit_end(self, trainer: Context) -> None:
        if self.saved != trainer.state.step or self.found_better:
            self._save(trainer)
        self.finish_saving()

    def on_exception(self, trainer: Context) -> None:
        """Save if the run failed between two steps; never replace the error of the run."""
        cause = sys.exception()
        if isinstance(cause, processes.LostProcess):
            self.sharded_writer = None  # a save in progress waits for that process, too
        try:
            self.finish_saving()
            if self._can_save_after(cause, trainer):
                self._save(trainer)
                self.finish_saving()
        except CheckpointError as error:
            reported = isinstance(cause, CheckpointError)
            folder_exists = trainer.folder is not None and trainer.folder.is_dir()
            if folder_exists and not reported:
                warnings.warn(str(error), stacklevel=2)

    def save_now(self, trainer: Context) -> None:
        self.requested.append(trainer.state.step)  # it is kept
        if self.saved != trainer.state.step or self.found_better:
            self._save(trainer)
        self.finish_saving()

    def hurry_saving(self) -> None:
        self.writer.begin_at_once()

    def finish_saving(self) -> None:
        """Wait until every submitted checkpoint is on the disk.

        Raises:
            CheckpointError: a checkpoint cannot be written.
        """
        self.writer.join()
        if self.sharded_writer is not None:
            self.sharded_writer.join()

    def state_dict(self) -> dict[str, Any]:
        state = {} if self.best is None else self.best.state_dict()
        return state | {"requested": list(self.requested)} if self.requested else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.requested = list(state.get("requested", []))
        if self.best is not None:
            self.best.load_state_dict(state)

    def _repair_link(self, best: Best, folder: Path) -> None:
        """Link the best checkpoint again, in case the process was killed before it did so."""
        if not best.ranked:
            return
        checkpoint = folder / checkpoints.folder_name(best.ranked[0][1])
        if checkpoint.is_dir():
            checkpoints.link_to(checkpoint, "best")

    def _can_save_after(self, cause: BaseException | None, trainer: Context) -> bool:
        """Return whether the state after an error is complete and new, and can be saved in time.

        There is no time after a KeyboardInterrupt or SystemExit. Of a run with several processes
        the others may have ended, and a checkpoint has values of each.
        """
        if trainer.strategy.world_size > 1:
            return False
        if not isinstance(cause, Exception) or isinstance(cause, CheckpointError):
            return False
        step = trainer.state.step
        new = self.folder is not None and step > 0 and self.saved != step
        return new and trainer.at_boundary

    def _check_state(self, trainer: Context) -> None:
        """Raise CheckpointError for a state that cannot be saved, before the first save is due."""
        parts = keyed(trainer.callbacks)
        callbacks = {key: callback.state_dict() for key, callback in parts.items()}
        snapshot.check_training(self._state_of_parts(trainer) | {"callbacks": callbacks})
        self.checked = True

    def _state_of_parts(self, trainer: Context) -> dict[str, Any]:
        """Return the state of the arguments of `fit`, which exists before the first event."""
        schedule = trainer.schedule.state_dict() if isinstance(trainer.schedule, Schedule) else {}
        return {"optimizer": trainer.optimizer.state_dict(), "schedule": schedule}

    def _save(self, trainer: Context) -> None:
        with trainer.clock.part("checkpoint"):
            self._submit(trainer)

    def _submit(self, trainer: Context) -> None:
        training = trainer.capture()
        model = training.pop("model")
        step = trainer.state.step
        for key, callback in keyed(trainer.callbacks).items():
            callback.on_save(model, training["callbacks"][key])
        assert self.folder is not None
        pinned = self._pinned_steps(trainer)
        finish = partial(self._link_and_prune, step, pinned, self._is_best(step))
        if self.sharded_writer is not None:
            state = (self.folder, model, training, step, trainer.manifest)
            self.sharded_writer.submit(*state, then=finish)
            if not self.background:
                self.sharded_writer.join()
        else:
            model, training = trainer.strategy.full((model, training))
            state = (self.folder, model, training, step, trainer.manifest)
            if trainer.strategy.is_main and self.background:
                self.recent = [*self.recent, step][-self.keep :]
                self.writer.submit(*state, then=finish, stays={*pinned, *self.recent})
            elif trainer.strategy.is_main:
                finish(checkpoints.save(*state))
        self.saved = step
        self.found_better = False

    def _is_best(self, step: int) -> bool:
        return self.found_better and self.best is not None and self.best.ranked[0][1] == step

    def _pinned_steps(self, trainer: Context) -> set[int | None]:
        """Return the steps whose checkpoints are never removed."""
        steps = {trainer.state.step, trainer.resumed_from, *self.requested}
        if self.best is not None:
            steps |= {step for _, step in self.best.ranked}
        return steps

    def _link_and_prune(
        self, step: int, pinned: set[int | None], is_best: bool, saved: Path
    ) -> None:
        """Verify a written checkpoint, link it if it is the best, and remove old ones.

        It may run in the writer's thread, so it does not read the trainer. Damaged checkpoints are
        kept, since their content is unknown. So are those of later steps: they belong to another
        course of the run, which went further.
        """
        checkpoints.verify(saved)
        if is_best:
            checkpoints.link_to(saved, "best")
        good: list[Path] = []
        with_nan: list[Path] = []
        for checkpoint in checkpoints.listed(saved.parent):
            if checkpoints.step_of(checkpoint) > step or checkpoint.is_symlink():
                continue
            try:
                manifest = checkpoints.read_manifest(checkpoint)
            except CheckpointError:
                continue
            (with_nan if manifest["nan"] else good).append(checkpoint)
        for checkpoint in [*good[: -self.keep], *with_nan]:
            if checkpoints.step_of(checkpoint) not in pinned:
                checkpoints.remove(checkpoint)
