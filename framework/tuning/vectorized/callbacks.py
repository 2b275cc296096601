"""Callbacks of trials that train together as one stacked model."""

from collections.abc import Callable, Sequence

from torch import Tensor

from framework.contracts.callback import Callback
from framework.contracts.callback_protocols import (
    CountingCallback,
    RowClippingCallback,
    StackableCallback,
)
from framework.contracts.transform import Transform

from .stacked_update import NotStackable

ClipRows = Callable[[Sequence[Callback], Tensor], None]

SINGLE_TRIAL = "works with a single trial only"
UNKNOWN = (
    "may change training (declare `changes_training = False` if it does not, or `alone = False` "
    "if it changes only gradients, learning rates, or weights in place)"
)


def check_stackable(callbacks: Sequence[Callback]) -> None:
    """Raise NotStackable for a callback that does not support stacked trials."""
    for callback in callbacks:
        alone = is_alone(callback)
        if alone:
            raise NotStackable(f"{type(callback).__name__} {SINGLE_TRIAL}")
        if alone is None and callback.changes_training:
            raise NotStackable(f"{type(callback).__name__} {UNKNOWN}")


def is_alone(callback: Callback) -> bool | None:
    """Return the `alone` of a callback, or None without a declaration."""
    if isinstance(callback, Transform):
        return True  # a batch is transformed once for all trials
    return callback.alone if isinstance(callback, StackableCallback) else None


def prepare(callbacks: Sequence[Callback], trials: int) -> None:
    """Prepare the callbacks that need it for the number of stacked trials."""
    for callback in callbacks:
        if isinstance(callback, CountingCallback):
            callback.among(trials)


def find_clip_rows(kind: type[Callback]) -> ClipRows | None:
    """Return the `clip_rows` of a class, or None if its `on_gradients` is overridden without it."""
    if not issubclass(kind, RowClippingCallback):
        return None
    # The first of the two in the MRO decides: a subclass that overrides only `on_gradients` would
    # otherwise clip stacked trials with the inherited `clip_rows`, i.e. as its base class does.
    for base in kind.__mro__:
        if "clip_rows" in vars(base):
            return kind.clip_rows
        if "on_gradients" in vars(base):
            return None
    return None
