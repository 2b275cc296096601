"""Optional members of a callback, for compiled steps, CUDA graphs, stacked trials, the terminal.

A callback has one of these contracts if it has the members, with or without the class among its
bases. Without them it works too, but steps may be slower, or trials train one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .callback import Callback
    from .context import Context


@runtime_checkable
class SelectiveCallback(Protocol):
    """A callback that needs the gradients of some steps only, and all that are not finite.

    A callback that listens to `gradients` and is not selective needs those of each step.

        class LogNorms(Callback):
            def needs_gradients(self, trainer: Context) -> bool:
                return trainer.state.step % 100 == 0
    """

    def needs_gradients(self, trainer: Context) -> bool:
        """Return whether `on_gradients` must be called in the step that begins.

        If a gradient is not finite, it is called anyway.
        """


@runtime_checkable
class RecordableCallback(Protocol):
    """A callback whose `on_gradients` a CUDA graph may record and replay.

    Attributes:
        recordable: whether `on_gradients` consists of operations on the device that are the same in
            each step. It exists before the fit, and may change until `on_fit_start` returns.
    """

    recordable: bool

    def on_gradients(self, trainer: Context) -> None:
        """Read or change gradients with operations on the device."""


@runtime_checkable
class StackableCallback(Protocol):
    """A callback that declares whether it works with trials that train as one stacked model.

    A callback without this declaration works with them if it does not change training.

    Attributes:
        alone: whether the callback works with a single trial only. False is right for one that
            changes only gradients, learning rates, or weights in place. Other changes of the model,
            loss or optimizer of its trial would have no effect on the stacked model. None: as
            without the declaration.
    """

    alone: bool | None


@runtime_checkable
class CountingCallback(Protocol):
    """A callback that prepares for the number of stacked trials."""

    def among(self, trials: int) -> None:
        """Prepare for `trials` stacked trials, e.g. scale the intervals between disk writes."""


@runtime_checkable
class RowClippingCallback(Protocol):
    """A callback that applies `on_gradients` for all stacked trials at once.

    For another one, `on_gradients` is called for each trial.
    """

    @staticmethod
    def clip_rows(callbacks: Sequence[Callback], gradients: Tensor) -> None:
        """Change the gradients of all trials in place.

        Args:
            callbacks: the callback of each trial.
            gradients: shape (trials, numbers).
        """


@runtime_checkable
class LiveCallback(Protocol):
    """A callback that shows something below the progress bar in a terminal."""

    def live_view(self, columns: int, rows: int) -> RenderableType | None:
        """Return what to show at the moment, for rich; None for nothing.

        Args:
            columns: the width of the terminal in characters.
            rows: the lines that are free.
        """
