"""The events of training, listed once, beside the loop that emits them.

    fit_start
    for each epoch:
        epoch_start
        for each step:
            step_start                  # the learning rate is still that of the step before
            move, transform, schedule
            forward, backward           # of each micro-batch; from here to optimizer, for each phase of the task
            gradients                   # they are complete and unscaled: look, clip, change
            optimizer
            count
            log                         # at the trainer's cadence: trainer.state.metrics has fresh train/... values
            validation_start
            validation_end              # trainer.state.metrics has fresh val/... values
            step_end                    # all of the step is done; state.batch is 0 when it ended its epoch
            epoch_end                   # after the last step of an epoch
            step_done                   # nobody changes anything any more: what is saved here is whole
    fit_end                             # the last step is done, also after a stop
    exception                           # instead of fit_end
    close                               # always the last one

A callback overrides what it listens to; what nobody overrides costs nothing. Callbacks are called in the order listed.
Before fit_start, `reset` makes each callback forget an earlier fit; when a fit resumes,
`load_state_dict` follows.
They may replace parameters and modules of the model and change the groups of the optimizer, but not replace the model,
the task or the optimizer as a whole. A batch that one wants to keep after the step has to be copied.
What compiled steps and CUDA graphs ask of a callback that listens to `gradients` is in
`training/acceleration/callbacks.py`.
To end a run: `trainer.stop(name, reason)`; the step under way is finished first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

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
    "fit_end",
    "exception",
    "close",
)


@dataclass(frozen=True)
class Pace:
    """How batches make steps, where a callback changes it during the run.

    Attributes:
        total_steps: optimizer steps of the run.
        batches_per_step: their mean.
        text: the steps of each epoch, in words.
        schedule_step: step -> the step of the schedule that gives its learning rate; None if that
            is the step itself.
    """

    total_steps: int
    batches_per_step: float
    text: str
    schedule_step: Callable[[int], int] | None = None


class Callback(Stateful):
    """Base of all callbacks; each `on_...` takes the trainer, with its `state`, `model`, `optimizer` and `log`.

    Attributes:
        changes_training: whether it may change what the weights become; False allows other settings, or the callback
            to come and go, in a run that is resumed exactly.
        follows_metrics: whether it decides by logged values how a run continues, or when it ends;
            then a resumed run may not measure them at other times. None: it does if it may change
            training and listens to validations or logs.
    """

    changes_training: ClassVar[bool] = True
    follows_metrics: ClassVar[bool | None] = None

    def on_fit_start(self, trainer: Context) -> None: ...
    def on_epoch_start(self, trainer: Context) -> None: ...
    def on_step_start(self, trainer: Context) -> None: ...
    def on_gradients(self, trainer: Context) -> None: ...
    def on_step_end(self, trainer: Context) -> None: ...
    def on_log(self, trainer: Context) -> None: ...
    def on_validation_start(self, trainer: Context) -> None: ...
    def on_validation_end(self, trainer: Context) -> None: ...
    def on_epoch_end(self, trainer: Context) -> None: ...
    def on_step_done(self, trainer: Context) -> None: ...
    def on_fit_end(self, trainer: Context) -> None: ...
    def on_exception(self, trainer: Context) -> None: ...
    def on_close(self, trainer: Context) -> None: ...

    @classmethod
    def depends_on(cls, settings: Mapping[str, Any]) -> Sequence[str]:
        """Return prefixes of the settings of other parts that change its effect on training.

        Args:
            settings: those of this callback that differ from their defaults.
        """
        return ()

    def pace(self, trainer: Context, batches: int) -> Pace | None:
        """Return how it spreads batches over steps, for `framework plan`; None if it does not.

        Args:
            batches: of an epoch.
        """
        return None

    def on_save(self, model_state: dict[str, Any], own_state: dict[str, Any]) -> None:
        """Change what a checkpoint will hold: the model's weights as `predict` shall use them, and this one's state."""

    def on_rewind(self, own_state: dict[str, Any]) -> None:
        """Take back what `on_save` made of `own_state`: the run goes back to that checkpoint's weights."""


class SavingCallback(Callback):
    """Base of callbacks that save checkpoints; a run without one prints a note."""

    changes_training = False

    def hurry_saving(self) -> None:
        """Start pending writes without waiting for them: `finish_saving` follows."""

    def finish_saving(self) -> None:
        """Wait until all checkpoints are on the disk.

        Raises CheckpointError if one cannot be written.
        """


def changes_training(part: Any) -> bool:
    """Whether a part may change the weights: a class of callbacks says so, a function may."""
    if not isinstance(part, type) or not issubclass(part, Callback):
        return True
    return part.changes_training


def follows_metrics(kind: Any) -> bool:
    """Whether a class of callbacks decides by logged values."""
    if not isinstance(kind, type) or not issubclass(kind, Callback):
        return False
    if kind.follows_metrics is not None:
        return kind.follows_metrics
    validations = kind.on_validation_end is not Callback.on_validation_end
    logs = kind.on_log is not Callback.on_log
    return kind.changes_training and (validations or logs)


def listeners(callbacks: Sequence[Callback]) -> dict[str, list[Callable[[Context], None]]]:
    """Return for each event the methods that listen to it: those that are not the empty ones of `Callback`."""
    methods = {event: f"on_{event}" for event in EVENTS}
    return {
        event: [
            getattr(c, name)
            for c in callbacks
            if getattr(type(c), name) is not getattr(Callback, name)
        ]
        for event, name in methods.items()
    }


def keyed(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """Return callbacks by "0:EarlyStop", "1:EarlyStop": counted by class, so that one of another class shifts none."""
    seen: Counter[str] = Counter()
    found = {}
    for callback in callbacks:
        name = type(callback).__name__
        found[f"{seen[name]}:{name}"] = callback
        seen[name] += 1
    return found
