"""Shapes of outputs and targets: comparing them must not broadcast one along the wrong axis."""

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

    Raises DataError when the shapes differ by more than axes of length 1.
    """
    if targets.shape == outputs.shape:
        return targets
    if not fits(targets.shape, outputs.shape):
        shapes = f"{tuple(targets.shape)}, but the model's outputs {tuple(outputs.shape)}"
        raise DataError(f"targets have shape {shapes}")
    return targets.reshape(outputs.shape)


def class_shape(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return class indices in the shape of outputs (batch, classes, ...) without the classes.

    Raises DataError when the shapes differ by more than axes of length 1.
    """
    class_axis(outputs)
    shape = outputs.shape[:1] + outputs.shape[2:]
    if fits(targets.shape, shape):
        return targets if targets.shape == shape else targets.reshape(shape)
    raise DataError(
        f"targets have shape {tuple(targets.shape)}; class indices for the model's outputs "
        f"{tuple(outputs.shape)} have shape {tuple(shape)}"
    )


def probability_shape(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return class probabilities in the shape of outputs (batch, classes, ...)."""
    class_axis(outputs)
    if targets.ndim < 2:
        raise DataError(
            f"targets have shape {tuple(targets.shape)} and type {targets.dtype}, but the model's outputs "
            f"{tuple(outputs.shape)}: class indices are integers, such as targets.long()"
        )
    return same_shape(outputs, targets)


def class_axis(outputs: Tensor) -> None:
    """Raise DataError when outputs have no axis of classes."""
    if outputs.ndim < 2:
        shape = tuple(outputs.shape)
        raise DataError(f"the model's outputs have shape {shape}, not (batch, classes)")


def fits(shape: torch.Size, other: torch.Size) -> bool:
    """Whether two shapes are equal but for axes of length 1."""
    return shape == other or [n for n in shape if n != 1] == [n for n in other if n != 1]


def misaligned(one: torch.Size, other: torch.Size) -> bool:
    """Whether broadcasting would match the batch axis of one shape with another axis of the other.

    That is so for (N, 1) with (N,), which gives (N, N). It is not for (N, Q) with (N, 1).
    """
    if len(one) == len(other) or min(len(one), len(other)) == 0 or min(one[0], other[0]) < 2:
        return False
    return broadcast(one, other) is not None  # for others torch itself raises an error


def broadcast(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape that two shapes are broadcast to, or None.

    `torch.broadcast_shapes` does the same, but imports sympy, which takes half a second.
    """
    sizes: list[int] = []
    for first, second in zip_longest(reversed(one), reversed(other), fillvalue=1):
        if first != second and 1 not in (first, second):
            return None
        sizes.insert(0, second if first == 1 else first)
    return tuple(sizes)


def call_aligned(who: str, function: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> Any:
    """Call a function of outputs and targets.

    Raises DataError when it broadcasts outputs and targets whose batch axes do not meet.
    """
    suspects = misaligned_outputs(outputs, targets)
    if not suspects:
        return function(outputs, targets)
    with Alignment(who, suspects, targets):
        return function(outputs, targets)


def misaligned_outputs(outputs: Any, targets: Any) -> list[Tensor]:
    """Return the outputs that torch would broadcast with the targets along the wrong axis."""
    if not isinstance(targets, Tensor):
        return []
    return [output for output in tensors_in(outputs) if misaligned(output.shape, targets.shape)]


class Alignment(TorchFunctionMode):
    """Follows what is computed from outputs and targets; raises DataError where they are broadcast.

    Only operations on the shapes of the outputs and the targets themselves count: a loss that compares
    all pairs adds axes by itself.
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
    """Functions that broadcast, and whose result does not show it."""

    def __init__(self, who: str, outputs: Sequence[Tensor], targets: Tensor):
        super().__init__()
        self.who = who
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
        given = tensors_in((args, kwargs))
        made = tensors_in(result)
        outputs = [tensor for tensor in given if tensor in self.from_outputs]
        others = [tensor for tensor in given if tensor not in self.from_outputs]
        targets = [tensor for tensor in others if tensor in self.from_targets]
        self._check(function, outputs, targets, made)
        for tensor in made:
            if outputs:
                self.from_outputs[tensor] = True
            elif targets:
                self.from_targets[tensor] = True
        return result

    def _check(
        self, function: Any, outputs: list[Tensor], targets: list[Tensor], made: list[Tensor]
    ) -> None:
        shapes = {output.shape for output in outputs} & self.output_shapes
        if not shapes or all(target.shape != self.target_shape for target in targets):
            return
        for shape in shapes:
            spread = broadcast(shape, self.target_shape)
            if spread is None:
                continue
            if function in self.reducing or any(tensor.shape == spread for tensor in made):
                raise DataError(
                    f"{self.who} broadcasts outputs of shape {tuple(shape)} and targets of shape "
                    f"{tuple(self.target_shape)} to {spread}: give both the same shape"
                )


def tensors_in(values: Any) -> list[Tensor]:
    leaves: Iterable[Any] = tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
