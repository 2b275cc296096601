"""What accelerated steps ask of the callbacks that listen to `gradients`."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

from framework.contracts.callback import Callback


@runtime_checkable
class SelectiveCallback(Protocol):
    """A callback that needs the gradients of some steps only, unless they are not finite.

    Where no callback needs them, a compiled step goes from the batch to the updated parameters. A
    callback that listens to `gradients` and is not selective needs those of each step.
    """

    def needs_gradients(self, trainer: Any) -> bool:
        """Return whether `on_gradients` must be called in the step that begins."""


@runtime_checkable
class RecordableCallback(Protocol):
    """A callback whose `on_gradients` a CUDA graph may record and replay.

    Attributes:
        recordable: whether `on_gradients` consists of operations on the device that are the same in
            each step.
    """

    recordable: bool

    def on_gradients(self, trainer: Any) -> None: ...


class GradientCallbacks:
    """The callbacks of a trainer that listen to `gradients`, for steps that may not call them.

    Args:
        callbacks: those that listen, in their order.
        trainer: what `needs_gradients` is called with.
    """

    def __init__(self, callbacks: Sequence[Callback], trainer: Any):
        self.callbacks, self.trainer = list(callbacks), trainer
        self.selective = [each for each in callbacks if isinstance(each, SelectiveCallback)]

    def need_gradients(self) -> bool:
        """Return whether one needs the gradients of this step even if all are finite."""
        if len(self.selective) < len(self.callbacks):
            return True
        return any(each.needs_gradients(self.trainer) for each in self.selective)

    def recordable(self) -> list[RecordableCallback]:
        """Return those that can be recorded."""
        return [each for each in self.callbacks if is_recordable(each)]

    def unrecordable(self) -> "GradientCallbacks":
        """Return those that cannot be recorded."""
        others = [each for each in self.callbacks if not is_recordable(each)]
        return GradientCallbacks(others, self.trainer)


def gradient_callbacks(callbacks: Sequence[Callback]) -> list[Callback]:
    """Return the callbacks that listen to `gradients`, in their order."""
    return [each for each in callbacks if type(each).on_gradients is not Callback.on_gradients]


def is_recordable(callback: Callback) -> TypeGuard[RecordableCallback]:
    return isinstance(callback, RecordableCallback) and callback.recordable
