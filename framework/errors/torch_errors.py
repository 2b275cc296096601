"""One-line explanations of errors that torch raises for common mistakes in data and models.

An error is recognized by the innermost function of its traceback, in `torch.nn.functional`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

from . import DataError, short
from .user_code import frames, text_of, user_place

FUNCTIONAL = "torch/nn/functional.py"
CLASS_LOSS_NAMES = ("cross_entropy", "nll_loss")
LOSS_SUFFIXES = ("_loss", "cross_entropy", "cross_entropy_with_logits", "kl_div")
BATCH_NORM_CHECK = "_verify_batch_size"  # called by batch and instance norms


@contextmanager
def torch_errors() -> Iterator[None]:
    """Raise DataError for missing outputs, a class out of range, and a batch norm of one sample."""
    try:
        yield
    except (IndexError, ValueError, TypeError) as error:
        explanation = explain(error)
        if explanation is None:
            raise
        raise DataError(explanation) from error


def explain(error: BaseException) -> str | None:
    """Return the explanation of an error; None if it is not one of the common mistakes."""
    innermost: FrameType | None = None
    for frame, _ in frames(error):
        innermost = frame
    if innermost is None or not innermost.f_code.co_filename.endswith(FUNCTIONAL):
        return None
    name = innermost.f_code.co_name
    if name == BATCH_NORM_CHECK:
        return f"a batch of one sample in training: {batch_norm_reason(error)}"
    if name in CLASS_LOSS_NAMES and isinstance(error, IndexError):
        return wrong_class(innermost.f_locals)
    if name.endswith(LOSS_SUFFIXES) and isinstance(error, TypeError) and user_place(error) is None:
        return no_outputs(innermost.f_locals)
    return None


def no_outputs(arguments: dict[str, Any]) -> str | None:
    """Return a message on the outputs that a loss of torch received; None if they are a tensor.

    Args:
        arguments: of the loss function, by name.
    """
    if "input" not in arguments or isinstance(arguments["input"], Tensor):
        return None
    return f"the model's outputs: the loss expects a tensor, got {short(arguments['input'])}"


def wrong_class(arguments: dict[str, Any]) -> str | None:
    """Return a message on the first target that is out of range; None if none is.

    Args:
        arguments: of torch's loss function, by name.
    """
    outputs = arguments.get("input")
    targets = arguments.get("target")
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if targets.is_floating_point():
        return None
    classes = outputs.shape[1] if outputs.ndim > 1 else outputs.shape[0]
    counted = targets[targets != arguments.get("ignore_index", -100)]
    wrong = counted[(counted < 0) | (counted >= classes)]
    if not len(wrong):
        return None
    return (
        f"a batch has the target {int(wrong[0])}, expected 0 to {classes - 1} ({classes} classes)"
    )


def is_batch_norm(error: BaseException) -> bool:
    """Return whether a norm over the batch got one sample."""
    return any(frame.f_code.co_name == BATCH_NORM_CHECK for frame, _ in frames(error))


def batch_norm_reason(error: BaseException) -> str:
    """Return the text of an error for which `is_batch_norm` holds, with an explanation."""
    return f"{text_of(error)}. A batch norm needs at least two samples"
