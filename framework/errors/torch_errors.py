"""Errors of torch's own functions that come of a common mistake in the data, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

from . import DataError, short
from .user_code import frames, text_of, user_place

FUNCTIONAL = "torch/nn/functional.py"
CLASS_LOSSES = ("cross_entropy", "nll_loss")
LOSSES = ("_loss", "cross_entropy", "cross_entropy_with_logits", "kl_div")
BATCH_SIZE = "_verify_batch_size"


@contextmanager
def torch_errors() -> Iterator[None]:
    """Raise DataError for no outputs, a class out of range, and a batch norm of one sample."""
    try:
        yield
    except (IndexError, ValueError, TypeError) as error:
        said = explain(error)
        if said is None:
            raise
        raise DataError(said) from error


def explain(error: BaseException) -> str | None:
    """Return what an error of torch's functions means; None for all others."""
    innermost: FrameType | None = None
    for frame, _ in frames(error):
        innermost = frame
    if innermost is None or not innermost.f_code.co_filename.endswith(FUNCTIONAL):
        return None
    name = innermost.f_code.co_name
    if name == BATCH_SIZE:
        return f"a batch of one sample in training: {text_of(error)}. A batch norm needs two"
    if name in CLASS_LOSSES and isinstance(error, IndexError):
        return wrong_class(innermost.f_locals)
    if name.endswith(LOSSES) and isinstance(error, TypeError) and user_place(error) is None:
        return no_outputs(innermost.f_locals)
    return None


def no_outputs(given: dict[str, Any]) -> str | None:
    """Return what a loss of torch got as outputs, from its arguments; None if that is a tensor."""
    if "input" not in given or isinstance(given["input"], Tensor):
        return None
    return f"the model's outputs: the loss expects a tensor, got {short(given['input'])}"


def is_batch_norm(error: BaseException) -> bool:
    """Whether an error says that a norm over the batch was given one sample."""
    return any(frame.f_code.co_name == BATCH_SIZE for frame, _ in frames(error))


def wrong_class(given: dict[str, Any]) -> str | None:
    """Return which target is out of range, from the arguments of torch's loss; None if none is."""
    outputs = given.get("input")
    targets = given.get("target")
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if targets.is_floating_point():
        return None
    classes = outputs.shape[1] if outputs.ndim > 1 else outputs.shape[0]
    counted = targets[targets != given.get("ignore_index", -100)]
    wrong = counted[(counted < 0) | (counted >= classes)]
    if not len(wrong):
        return None
    range_of = f"with {classes} classes they go from 0 to {classes - 1}"
    return f"a batch has the target {int(wrong[0])}; {range_of}"
