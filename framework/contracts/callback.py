"""Callbacks and the events of training.

The training loop emits these events, in this order:

    fit_start
    for each epoch:
        epoch_start
        for each step:
            step_start                  # the learning rate is still that of the previous step
            move, transform, schedule
            forward, backward           # of each micro-batch; this and the next two for each phase
            gradients                   # complete and unscaled: read, clip or change them
            optimizer
            count
            log                         # if due: trainer.state.metrics has new train/... values
            validation_start            # if due
            validation_end              # trainer.state.metrics has new val/... values
            step_end                    # state.batch is 0 after the last step of an epoch
            epoch_end                   # after the last step of an epoch
            step_done                   # nothing changes any more: save checkpoints here
    train_end                           # after the last step: the model gets its final weights here
    fit_end                             # the model has its final weights
    exception                           # instead of both, if an error ends the fit
    close                               # always the last event

A callback overrides the methods of the events that it needs; a method that is not overridden costs
nothing. Callbacks are called in the order in which they are listed. Before `fit_start`, `reset`
clears the state of an earlier fit; if the fit resumes, `load_state_dict` follows.

    class PrintLoss(Callback):
        changes_training = False

        def on_log(self, trainer: Context) -> None:
            print(trainer.state.step, trainer.state.metrics["train/loss"])

A callback may replace parameters and modules of the model, and change the groups of the optimizer.
It must not replace the model, the task or the optimizer. It must copy a batch that it needs after
the step. `trainer.stop(name, reason)` ends the run after the current step.
`callback_protocols.py` describes optional members, with which a callback works with compiled steps,
CUDA graphs and stacked trials.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from framework.errors import SettingError

from .state import Stateful

if TYPE_CHECKING:
    from .context import Context

EVENTS = (
    "fit_start",
    "epoch_start",
    "step_start",
    "gradients",
    "log",
    "validation_start",
    "validation_end",
    "step_end",
    "epoch_end",
    "step_done",
    "train_end",
    "fit_end",
    "exception",
    "close",
)


@dataclass(frozen=True)
class Pace:
    """The number of batches in each step, for a callback that changes it during the run.

    Attributes:
        total_steps: the optimizer steps of the run.
        batches_per_step: the mean number of batches in a step.
        text: the steps of each epoch, as a text.
        schedule_step: maps a step to the step of the schedule that sets its learning rate; None if
            both are the same.
    """

    total_steps: int
    batches_per_step: float
    text: str
    schedule_step: Callable[[int], int] | None = None


class Callback(Stateful):
    """Base of all callbacks; the module lists the events and the changes that a callback may make.

    Each `on_...` method receives the trainer (see `Context`).

    Attributes:
        changes_training: whether the callback may change the weights. If False, a run that resumes
            exactly may add it, remove it or change its settings.
        follows_metrics: whether the callback uses logged values to change or end the run. Then a
            resumed run must measure them at the same steps. None: True if the callback changes
            training and listens to `log` or `validation_end`.
        only_main: whether only the main process of a run with several calls it, since it only
            prints or writes files. It must not communicate then (see `Strategy`).
        runs_model: whether the callback calls the model or the task itself, other than through
            `trainer.strategy.forward`. It cannot be used with a sharded model then.
    """

    changes_training: ClassVar[bool] = True
    follows_metrics: ClassVar[bool | None] = None
    only_main: ClassVar[bool] = False
    runs_model: ClassVar[bool] = False

    def on_fit_start(self, trainer: Context) -> None:
        """Called before the first step, after a resumed state is restored."""

    def on_epoch_start(self, trainer: Context) -> None:
        """Called before the first step of an epoch, not if the fit resumes within the epoch."""

    def on_step_start(self, trainer: Context) -> None:
        """Called before the batches of a step are moved to the device and transformed."""

    def on_gradients(self, trainer: Context) -> None:
        """Called when all gradients of an update are complete and unscaled, before the update."""

    def on_step_end(self, trainer: Context) -> None:
        """Called after the update, logging and validation of a step."""

    def on_log(self, trainer: Context) -> None:
        """Called when `trainer.state.metrics` has new values of training."""

    def on_validation_start(self, trainer: Context) -> None:
        """Called before a validation."""

    def on_validation_end(self, trainer: Context) -> None:
        """Called when `trainer.state.metrics` has new values of validation."""

    def on_epoch_end(self, trainer: Context) -> None:
        """Called after `on_step_end` of the last step of an epoch."""

    def on_step_done(self, trainer: Context) -> None:
        """Called last in a step: the values are logged, and the state may be saved."""

    def on_train_end(self, trainer: Context) -> None:
        """Called after the last step, also if the run was stopped; may set the final weights."""

    def on_fit_end(self, trainer: Context) -> None:
        """Called after `on_train_end` of all callbacks."""

    def on_exception(self, trainer: Context) -> None:
        """Called instead of `on_fit_end` if an error ends the fit."""

    def on_close(self, trainer: Context) -> None:
        """Called last, before the loggers are closed."""

    @classmethod
    def depends_on(cls, settings: Mapping[str, Any]) -> Sequence[str]:
        """Return prefixes of the settings of other parts that change its effect on training.

        Args:
            settings: the settings of this callback that differ from their defaults.
        """
        return ()

    def pace(self, trainer: Context, batches: int) -> Pace | None:
        """Return how the callback distributes batches over steps, for `framework plan`.

        Args:
            trainer: the trainer that would run the fit.
            batches: the number of batches in an epoch.

        Returns:
            None if the callback does not change the number of batches in a step.
        """
        return None

    def cost(self) -> str | None:
        """Return what the callback adds to the time of a run, for `framework plan`.

        Returns:
            Such as "runs the model on 64 samples every epoch"; None if the time does not matter.
        """
        return None

    def on_save(self, model_state: dict[str, Any], own_state: dict[str, Any]) -> None:
        """Change the contents of a checkpoint before it is written.

        Args:
            model_state: the state dict of the model, with the weights that `predict` will use.
            own_state: the state dict of this callback.
        """

    def on_rewind(self, own_state: dict[str, Any]) -> None:
        """Revert the changes of `on_save` to the state, since the run returns to that checkpoint.

        Args:
            own_state: the state dict of this callback in the checkpoint.
        """


class SavingCallback(Callback):
    """Base of callbacks that save checkpoints; a run without one prints a note."""

    changes_training = False

    def save_now(self, trainer: Context) -> None:
        """Save a checkpoint after this step, unless it is saved, and wait until it is on the disk.

        It is called in `on_step_done` of another callback, in all processes.

        Raises:
            CheckpointError: it cannot be written.
        """
        raise SettingError(f"checkpoint: {type(self).__name__} does not save on request")

    def hurry_saving(self) -> None:
        """Start all pending writes without waiting for them; `finish_saving` follows."""

    def finish_saving(self) -> None:
        """Wait until all checkpoints are on the disk.

        Raises:
            CheckpointError: a checkpoint cannot be written.
        """


def changes_training(part: Any) -> bool:
    """Return whether a registered part may change the weights; a part that is a function may."""
    if not isinstance(part, type) or not issubclass(part, Callback):
        return True
    return part.changes_training


def follows_metrics(kind: Any) -> bool:
    """Return whether a class of callbacks uses logged values to change or end the run."""
    if not isinstance(kind, type) or not issubclass(kind, Callback):
        return False
    if kind.follows_metrics is not None:
        return kind.follows_metrics
    validations = kind.on_validation_end is not Callback.on_validation_end
    logs = kind.on_log is not Callback.on_log
    return kind.changes_training and (validations or logs)


def listeners(
    callbacks: Sequence[Callback], is_main: bool = True
) -> dict[str, list[Callable[[Context], None]]]:
    """Return the overridden methods of the callbacks for each event.

    Args:
        callbacks: all callbacks of the run.
        is_main: whether this is the main process; if not, callbacks with `only_main` are left out.
    """
    found: dict[str, list[Callable[[Context], None]]] = {}
    for event in EVENTS:
        name = f"on_{event}"
        found[event] = []
        for callback in callbacks:
            if callback.only_main and not is_main:
                continue
            if getattr(type(callback), name) is not getattr(Callback, name):
                found[event].append(getattr(callback, name))
    return found


def keyed(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Return the callbacks by the keys of their states, such as "0:EarlyStop" and "1:EarlyStop".

    The number counts callbacks of one class, so that adding a callback of another class changes no
    key.
    """
    seen: Counter[str] = Counter()
    found = {}
    for callback in callbacks:
        name = type(callback).__name__
        found[f"{seen[name]}:{name}"] = callback
        seen[name] += 1
    return found
