"""Callbacks that listen to `gradients`, in accelerated steps.

A compiled step or a CUDA graph may go from the batch to the updated parameters in one call, and
cannot call `on_gradients` in between. The protocols here tell when that is allowed.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

from framework.contracts.callback import Callback


@runtime_checkable
class SelectiveCallback(Protocol):
    """A callback that needs the gradients of some steps only, and all that are not finite.

    A callback that listens to `gradients` and is not selective needs those of each step.

        class LogNorms(Callback):
            def needs_gradients(self, trainer: Context) -> bool:
                return trainer.state.step % 100 == 0
    """

    def needs_gradients(self, trainer: Any) -> bool:
        """Return whether `on_gradients` must be called in the step that begins.

        If a gradient is not finite, it is called anyway.
        """


class RecordableCallback(Protocol):
    """A callback whose `on_gradients` a CUDA graph may record and replay.

    Attributes:
        recordable: whether `on_gradients` consists of operations on the device that are the same in
            each step.
    """

    recordable: bool

    def on_gradients(self, trainer: Any) -> None:
        """Read or change gradients with operations on the device."""


class GradientCallbacks:
    """The callbacks of a trainer that listen to `gradients`, for steps that may omit their calls.

    Args:
        callbacks: the result of `gradient_callbacks`.
        trainer: the argument of `needs_gradients`.
    """

    def __init__(self, callbacks: Sequence[Callback], trainer: Any):
        self.callbacks = list(callbacks)
        self.trainer = trainer
        # Not in each step: comparing an object with a Protocol takes 5 microseconds.
        self.are_selective = [isinstance(each, SelectiveCallback) for each in self.callbacks]

    def need_gradients(self, except_recordable: bool = False) -> bool:
        """Return whether a callback needs the gradients of this step even if they are finite.

        Args:
            except_recordable: whether callbacks that can be recorded do not count.
        """
        selective: list[Any] = []
        for callback, is_selective in zip(self.callbacks, self.are_selective, strict=True):
            if except_recordable and is_recordable(callback):
                continue
            if not is_selective:
                return True
            selective.append(callback)
        return any(each.needs_gradients(self.trainer) for each in selective)

    def all_recordable(self) -> bool:
        """Return whether all callbacks can be recorded."""
        return all(is_recordable(each) for each in self.callbacks)

    def recordable(self) -> list[RecordableCallback]:
        """Return the callbacks that can be recorded."""
        return [each for each in self.callbacks if is_recordable(each)]


def gradient_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """Return the callbacks that listen to `gradients`, in their order."""
    return [each for each in callbacks if type(each).on_gradients is not Callback.on_gradients]


def is_recordable(callback: Callback) -> TypeGuard[RecordableCallback]:
    """Return whether a callback is recordable now; it may decide that when the fit starts."""
    return bool(getattr(callback, "recordable", False))
