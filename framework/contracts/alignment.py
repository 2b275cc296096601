"""Shapes of outputs and targets, which must not be broadcast along the wrong axis.

With outputs (N, 1) and targets (N,), torch computes N × N differences. The functions here give
targets the shape of the outputs where that is safe, and report the broadcast where it is not.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from framework.errors import DataError
from framework.runtime.torch_internals.pytree import tree_leaves


def same_shape(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return targets in the shape of the outputs.

    Raises:
        DataError: the shapes differ in more than axes of length 1.
    """
    if targets.shape == outputs.shape:
        return targets
    if not fits(targets.shape, outputs.shape):
        raise DataError(
            f"targets have shape {tuple(targets.shape)}, but the model's outputs have shape "
            f"{tuple(outputs.shape)}"
        )
    return targets.reshape(outputs.shape)


def class_shape(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return class indices in the shape of the outputs without their class axis.

    Args:
        outputs: shape (batch, classes, ...).
        targets: shape (batch, ...), with or without axes of length 1.

    Raises:
        DataError: the shapes differ in more than axes of length 1.
    """
    check_class_axis(outputs)
    shape = outputs.shape[:1] + outputs.shape[2:]
    if targets.shape == shape:
        return targets
    if not fits(targets.shape, shape):
        raise DataError(
            f"targets have shape {tuple(targets.shape)}: for the model's outputs of shape "
            f"{tuple(outputs.shape)}, class indices have shape {tuple(shape)}"
        )
    return targets.reshape(shape)


def probability_shape(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return class probabilities in the shape of the outputs, (batch, classes, ...).

    Raises:
        DataError: the shapes differ in more than axes of length 1.
    """
    check_class_axis(outputs)
    if targets.ndim < 2:
        raise DataError(
            f"targets have shape {tuple(targets.shape)} and type {targets.dtype}, but the model's "
            f"outputs have shape {tuple(outputs.shape)}: convert class indices with targets.long()"
        )
    return same_shape(outputs, targets)


def check_class_axis(outputs: Tensor) -> None:
    """Raise DataError if outputs have no class axis."""
    if outputs.ndim < 2:
        raise DataError(
            f"the model's outputs: expected shape (batch, classes), got {tuple(outputs.shape)}"
        )


def fits(shape: torch.Size, other: torch.Size) -> bool:
    """Return whether two shapes are equal except for axes of length 1."""
    return shape == other or squeezed(shape) == squeezed(other)


def squeezed(shape: torch.Size) -> list[int]:
    """Return a shape without its axes of length 1."""
    return [size for size in shape if size != 1]


def misaligned(one: torch.Size, other: torch.Size) -> bool:
    """Return whether broadcasting aligns the batch axis of one shape with another axis.

    True for (N, 1) with (N,), which gives (N, N). False for (N, Q) with (N, 1).
    """
    if len(one) == len(other) or min(len(one), len(other)) == 0 or min(one[0], other[0]) < 2:
        return False
    return broadcast(one, other) is not None  # if it is None, torch itself raises an error


def broadcast(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape that two shapes are broadcast to, or None if they cannot be.

    `torch.broadcast_shapes` does the same, but imports sympy, which takes half a second.
    """
    sizes: list[int] = []
    for first, second in zip_longest(reversed(one), reversed(other), fillvalue=1):
        if first != second and 1 not in (first, second):
            return None
        sizes.insert(0, second if first == 1 else first)
    return tuple(sizes)


def call_aligned(
    caller: str, function: Callable[[Any, Any], Any], outputs: Any, targets: Any
) -> Any:
    """Return the result of a function of outputs and targets.

    Args:
        caller: the name of the function for the message, such as "the loss huber".
        function: takes outputs and targets.
        outputs: the first argument: a tensor, or a structure of tensors.
        targets: the second argument.

    Raises:
        DataError: the function broadcasts outputs and targets with the batch axis of one along
            another axis of the other.
    """
    suspects = misaligned_outputs(outputs, targets)
    if not suspects:
        return function(outputs, targets)
    with Alignment(caller, suspects, targets):
        return function(outputs, targets)


def misaligned_outputs(outputs: Any, targets: Any) -> list[Tensor]:
    """Return the output tensors that torch broadcasts with the targets along the wrong axis."""
    if not isinstance(targets, Tensor):
        return []
    return [output for output in tensors_in(outputs) if misaligned(output.shape, targets.shape)]


class Alignment(TorchFunctionMode):
    """Follows operations on outputs and targets, and raises DataError if these are broadcast.

    Only operations on the original shapes count: a loss that compares all pairs of samples adds
    axes explicitly.

    Attributes:
        reducing: functions that broadcast without any trace in the shape of their result.
    """

    reducing: ClassVar[set[Any]] = {
        F.mse_loss,
        F.l1_loss,
        F.smooth_l1_loss,
        F.huber_loss,
        F.poisson_nll_loss,
        F.soft_margin_loss,
        F.hinge_embedding_loss,
        F.kl_div,
        F.cosine_similarity,
        F.pairwise_distance,
        torch.dist,
    }

    def __init__(self, caller: str, outputs: Sequence[Tensor], targets: Tensor):
        super().__init__()
        self.caller = caller
        self.output_shapes = {output.shape for output in outputs}
        self.target_shape = targets.shape
        self.from_outputs = WeakTensorKeyDictionary()
        self.from_targets = WeakTensorKeyDictionary({targets: True})
        for output in outputs:
            self.from_outputs[output] = True

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        results = tensors_in(result)
        outputs: list[Tensor] = []
        targets: list[Tensor] = []
        for tensor in tensors_in((args, kwargs)):
            if tensor in self.from_outputs:
                outputs.append(tensor)
            elif tensor in self.from_targets:
                targets.append(tensor)
        self._check(function, outputs, targets, results)
        for tensor in results:
            if outputs:
                self.from_outputs[tensor] = True
            elif targets:
                self.from_targets[tensor] = True
        return result

    def _check(
        self, function: Any, outputs: list[Tensor], targets: list[Tensor], results: list[Tensor]
    ) -> None:
        shapes = {output.shape for output in outputs} & self.output_shapes
        if not shapes or all(target.shape != self.target_shape for target in targets):
            return
        for shape in shapes:
            spread = broadcast(shape, self.target_shape)
            if spread is None:
                continue
            if function in self.reducing or any(tensor.shape == spread for tensor in results):
                raise DataError(
                    f"{self.caller} broadcasts outputs of shape {tuple(shape)} and targets of "
                    f"shape {tuple(self.target_shape)} to {spread}: give both the same shape"
                )


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in a nested structure."""
    leaves: Iterable[Any] = tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
