"""The backward pass without the checks of `Tensor.backward`."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def find_engine() -> Callable[..., Any] | None:
    """Return the entry point of the engine; None in a release of torch without this name."""
    engine = getattr(torch.autograd.Variable, "_execution_engine", None)
    return getattr(engine, "run_backward", None)


RUN_BACKWARD = find_engine()


@cache
def ones_scalar(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the gradient of the loss itself, which all steps share."""
    return torch.ones((), dtype=dtype, device=device)


def run_backward(loss: Tensor) -> None:
    """Run the backward pass of a loss, as `loss.backward()` does.

    Gain: the engine is called without the argument checks of `Tensor.backward` and with a cached
    gradient of 1, which saves a tenth of the step of a small model. For anything but a plain scalar
    with a graph, and without an engine, `loss.backward()` itself is called.
    """
    if RUN_BACKWARD is None or type(loss) is not Tensor or loss.ndim or not loss.requires_grad:
        loss.backward()
        return
    gradient = ones_scalar(loss.dtype, loss.device)
    if gradient._version:  # a hook or an autograd.Function has changed it in place
        ones_scalar.cache_clear()
        gradient = ones_scalar(loss.dtype, loss.device)
    RUN_BACKWARD(
        (loss,),
        (gradient,),
        False,  # keep_graph
        False,  # create_graph
        (),  # inputs: all leaves
        allow_unreachable=True,
        accumulate_grad=True,
    )
