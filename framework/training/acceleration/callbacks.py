"""Callbacks that listen to `gradients`, in accelerated steps.

A compiled step or a CUDA graph may go from the batch to the updated parameters in one call, and
cannot call `on_gradients` in between. `contracts/callback_protocols.py` has the members with which
a callback allows that.
"""

from collections.abc import Sequence

from framework.contracts.callback import Callback
from framework.contracts.callback_protocols import RecordableCallback, SelectiveCallback
from framework.contracts.context import Context


class GradientCallbacks:
    """The callbacks of a trainer that listen to `gradients`, for steps that may omit their calls.

    Args:
        callbacks: the result of `gradient_callbacks`.
        trainer: the argument of `needs_gradients`.
    """

    def __init__(self, callbacks: Sequence[Callback], trainer: Context):
        self.callbacks = list(callbacks)
        self.trainer = trainer
        # For each callback. Not in each step: comparing one with a Protocol takes 5 microseconds.
        self.selective: list[SelectiveCallback | None] = []
        self.recordable: list[RecordableCallback | None] = []
        for callback in self.callbacks:
            self.selective.append(callback if isinstance(callback, SelectiveCallback) else None)
            self.recordable.append(callback if isinstance(callback, RecordableCallback) else None)

    def need_gradients(self, except_recorded: bool = False) -> bool:
        """Return whether a callback needs the gradients of this step even if they are finite.

        Args:
            except_recorded: whether callbacks that can be recorded do not count.
        """
        asked: list[SelectiveCallback] = []
        for selective, recordable in zip(self.selective, self.recordable, strict=True):
            if except_recorded and recordable is not None and recordable.recordable:
                continue
            if selective is None:
                return True
            asked.append(selective)
        return any(each.needs_gradients(self.trainer) for each in asked)

    def recorded(self) -> list[RecordableCallback]:
        """Return the callbacks that can be recorded now."""
        return [each for each in self.recordable if each is not None and each.recordable]

    def all_recorded(self) -> bool:
        """Return whether all callbacks can be recorded now."""
        return len(self.recorded()) == len(self.callbacks)


def gradient_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """Return the callbacks that listen to `gradients`, in their order."""
    return [each for each in callbacks if type(each).on_gradients is not Callback.on_gradients]
