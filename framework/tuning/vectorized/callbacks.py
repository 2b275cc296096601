"""How a callback serves trials that train as one."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from framework.contracts.callback import Callback
from framework.contracts.transform import Transform

from .stacked_update import NotStackable

ClipRows = Callable[[Sequence[Callback], Tensor], None]

OWN = "works with a trial of its own"
UNKNOWN = (
    "may change training (`changes_training = False` says that it does not, and `alone = False` "
    "that it changes no more than gradients, learning rates, or weights in their place)"
)


class StackableCallback(Protocol):
    """What a callback may have for trials that train as one; each member may be left out.

    A plugin does not import this class: it only has members of these names.

    Attributes:
        alone: whether it cannot serve one of several trials that train as one. A callback without
            it can if it changes nothing of training. One that changes no more than gradients,
            learning rates, or weights in place can too, if it says False. What else it does to the
            model, loss or optimizer of its trial would not reach the others' model.
    """

    alone: bool | None

    def among(self, trials: int) -> None:
        """Prepare to serve one of `trials` trials: scale the intervals between disk writes, say."""

    @staticmethod
    def clip_rows(callbacks: Sequence[Callback], gradients: Tensor) -> None:
        """Do what `on_gradients` does, for all trials at once.

        Without it, `on_gradients` is called for each trial.

        Args:
            callbacks: the callback of each trial.
            gradients: shape (trials, numbers), changed in place.
        """


def is_alone(callback: Callback) -> bool | None:
    """Return the `alone` of a callback; None if it does not say."""
    if isinstance(callback, Transform):
        return True  # a batch is read once for all trials
    return getattr(callback, "alone", None)


def clip_rows_of(kind: type[Callback]) -> ClipRows | None:
    """Return the `clip_rows` of a class; None if its `on_gradients` is overridden without it."""
    for base in kind.__mro__:
        if "clip_rows" in vars(base):
            return kind.clip_rows  # type: ignore[attr-defined]
        if "on_gradients" in vars(base):
            return None
    return None


def prepare(callbacks: Sequence[Callback], trials: int) -> None:
    """Tell the callbacks of a trial how many trials train as one."""
    for callback in callbacks:
        among = getattr(callback, "among", None)
        if among is not None:
            among(trials)


def check_stackable(callbacks: Sequence[Callback]) -> None:
    """Raise NotStackable for a callback that cannot serve one of several trials."""
    for callback in callbacks:
        alone = is_alone(callback)
        if alone:
            raise NotStackable(f"{type(callback).__name__} {OWN}")
        if alone is None and callback.changes_training:
            raise NotStackable(f"{type(callback).__name__} {UNKNOWN}")
