"""Callbacks of trials that train together as one stacked model."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from framework.contracts.callback import Callback
from framework.contracts.transform import Transform

from .stacked_update import NotStackable

ClipRows = Callable[[Sequence[Callback], Tensor], None]

SINGLE_TRIAL = "works with a single trial only"
UNKNOWN = (
    "may change training (declare `changes_training = False` if it does not, or `alone = False` "
    "if it changes only gradients, learning rates, or weights in place)"
)


class StackableCallback(Protocol):
    """Optional members of a callback for trials that train as one stacked model.

    A plugin does not import this class: it defines members of these names.

    Attributes:
        alone: whether the callback works with a single trial only. Without this attribute, a
            callback is supported if it does not change training. One that changes only gradients,
            learning rates, or weights in place can set it to False. Other changes of the model,
            loss or optimizer of its trial would have no effect on the stacked model.
    """

    alone: bool | None

    def among(self, trials: int) -> None:
        """Prepare for `trials` stacked trials, e.g. scale the intervals between disk writes."""

    @staticmethod
    def clip_rows(callbacks: Sequence[Callback], gradients: Tensor) -> None:
        """Apply `on_gradients` for all trials at once.

        Without it, `on_gradients` is called for each trial.

        Args:
            callbacks: the callback of each trial.
            gradients: shape (trials, numbers), changed in place.
        """


def is_alone(callback: Callback) -> bool | None:
    """Return the `alone` of a callback, or None if it has none."""
    if isinstance(callback, Transform):
        return True  # a batch is transformed once for all trials
    return getattr(callback, "alone", None)


def find_clip_rows(kind: type[Callback]) -> ClipRows | None:
    """Return the `clip_rows` of a class, or None if its `on_gradients` is overridden without it."""
    for base in kind.__mro__:
        if "clip_rows" in vars(base):
            clip_rows: ClipRows = kind.clip_rows  # type: ignore[attr-defined]
            return clip_rows
        if "on_gradients" in vars(base):
            return None
    return None


def prepare(callbacks: Sequence[Callback], trials: int) -> None:
    """Call the `among` of the callbacks that have one."""
    for callback in callbacks:
        among = getattr(callback, "among", None)
        if among is not None:
            among(trials)


def check_stackable(callbacks: Sequence[Callback]) -> None:
    """Raise NotStackable for a callback that does not support stacked trials."""
    for callback in callbacks:
        alone = is_alone(callback)
        if alone:
            raise NotStackable(f"{type(callback).__name__} {SINGLE_TRIAL}")
        if alone is None and callback.changes_training:
            raise NotStackable(f"{type(callback).__name__} {UNKNOWN}")
