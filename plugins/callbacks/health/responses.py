"""How an activation responds to its inputs: where its derivative is almost 0.

The derivative is measured with autograd, so that it is known for any element-wise module.
"""

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

SMALL = 0.01  # of the largest derivative; below, a unit passes almost no gradient
MOST_NUMBERS = 4096  # of the parameters and buffers of an activation
PLAIN = (bool, int, float, str)
Kind = Literal["saturates", "dies", "open"]


class Response:
    """The derivative of an activation.

    Attributes:
        kind: saturates: it is almost 0 at both ends, but not around 0 (sigmoid, tanh). dies: it is
            almost 0 elsewhere, such as for all negative inputs (relu, gelu). open: it is almost 0
            nowhere (leaky_relu).
        largest: the largest absolute derivative for inputs from -20 to 20.
    """

    def __init__(self, kind: Kind, largest: float):
        self.kind = kind
        self.largest = largest

    def stuck(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Return which inputs have a derivative below `SMALL` of the largest, bool of their shape.

        Args:
            module: the activation.
            inputs: of any shape.
        """
        return derivative(module, inputs).abs() < SMALL * self.largest


def response_of(module: nn.Module) -> Response | None:
    """Return the response of a module; None if it is no element-wise function, or a linear one.

    A copy of the module in evaluation mode is called with numbers from -20 to 20.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if next(module.children(), None) is not None or sum(t.numel() for t in tensors) > MOST_NUMBERS:
        return None
    try:
        alone = copy.deepcopy(module).cpu().float().eval()
        slopes = element_wise_derivative(alone)
    except Exception:  # a module that is no activation may fail in any way
        return None
    if slopes is None or torch.equal(slopes, slopes[:1].expand_as(slopes)):
        return None
    largest = float(slopes.max())
    small = slopes < SMALL * largest
    if not small.any():
        return Response("open", largest)
    middle = len(small) // 2
    near_zero = small[middle - 10 : middle + 11]
    if small[0] and small[-1] and not near_zero.any():
        return Response("saturates", largest)
    return Response("dies", largest)


def responses_of(modules: Iterable[nn.Module]) -> dict[nn.Module, Response]:
    """Return the responses of the activations among some modules; equal ones are measured once."""
    known: dict[tuple[Any, ...], Response | None] = {}
    found = {}
    for module in modules:
        settings = settings_of(module)
        key = (type(module), module if settings is None else settings)
        if key not in known:
            known[key] = response_of(module)
        response = known[key]
        if response is not None:
            found[module] = response
    return found


def settings_of(module: nn.Module) -> tuple[Any, ...] | None:
    """Return the plain attributes of a module; None if it has others, such as parameters."""
    if next(chain(module.parameters(), module.buffers(), module.children()), None) is not None:
        return None
    plain = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    plain.pop("training", None)
    if not all(value is None or isinstance(value, PLAIN) for value in plain.values()):
        return None
    return tuple(plain.items())


def element_wise_derivative(module: nn.Module) -> Tensor | None:
    """Return the absolute derivative at 801 numbers from -20 to 20; None if they are not alone."""
    numbers = torch.linspace(-20, 20, 801)
    with torch.no_grad():
        column = module(numbers[:, None].clone())
        row = module(numbers[None].clone())
    if column.shape != (801, 1) or row.shape != (1, 801):
        return None
    if not torch.allclose(column.flatten(), row.flatten(), atol=1e-6, equal_nan=True):
        return None
    return derivative(module, numbers[:, None]).abs().flatten()


def derivative(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return the derivative of an element-wise module at each input."""
    with torch.enable_grad():
        at = inputs.detach().requires_grad_()
        # A copy, since the module may write its result into its inputs.
        (slopes,) = torch.autograd.grad(module(at * 1).sum(), at)
    return slopes
