"""Bases of callbacks that show the model at a cadence, and at the last step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from framework.data.dataset import check_has_validation

from .callback import Callback
from .state import Cadence, Every

if TYPE_CHECKING:
    from .context import Context


class PeriodicCallback(Callback):
    """Base of callbacks that show something at a cadence, and at the last step of the run.

    A subclass implements `show`, and calls `show_if_due` in the event in which it shows: after a
    step, or after a validation.

        class LogBias(PeriodicCallback):
            def on_step_end(self, trainer: Context) -> None:
                self.show_if_due(trainer)

            def show(self, trainer: Context) -> None:
                trainer.log({"bias": trainer.model.bias.detach()})

    A last step that is not due is shown when the fit ends, with the weights that the model keeps,
    such as an average. If a signal ends the run, it is not, since the run may be resumed. No step
    is shown twice.

    Args:
        every: how often to show it.
    """

    changes_training = False

    def __init__(self, every: Every = "1epoch"):
        self.cadence = Cadence(every)
        self.shown_step = -1

    def show(self, trainer: Context) -> None:
        """Pass the state after the current step to the loggers."""
        raise NotImplementedError

    def show_if_due(self, trainer: Context) -> None:
        """Show the current step if the cadence is due."""
        if self.cadence.due(trainer.state):
            self.show_once(trainer)

    def show_once(self, trainer: Context) -> None:
        """Show the current step, unless it has been shown."""
        if self.shown_step != trainer.state.step:
            self.shown_step = trainer.state.step
            self.show(trainer)

    def on_fit_end(self, trainer: Context) -> None:
        """Show the last step, unless the run may be resumed."""
        if not trainer.state.interrupted:
            self.show_once(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the last step that was shown."""
        return {"shown": self.shown_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the last step that was shown."""
        self.shown_step = state.get("shown", -1)


class ValidationCallback(PeriodicCallback):
    """Base of callbacks that show results on the validation split, after a validation if due.

    They show the validated weights: the average, if a callback that averages comes later in the
    list.

    Attributes:
        name: the name of the callback, for messages.
    """

    name: ClassVar[str]

    def on_fit_start(self, trainer: Context) -> None:
        """Check that there is a validation split that can be read again."""
        check_has_validation(trainer.val_batches, f"callbacks.{self.name}")

    def on_validation_end(self, trainer: Context) -> None:
        """Show the validated weights if due."""
        self.show_if_due(trainer)

    def cost(self) -> str:
        """Return that the validation split is read once more."""
        return f"reads the validation split once more, {self.cadence}"
