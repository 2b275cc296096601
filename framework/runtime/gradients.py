"""The numbers of sparse and complex gradients, which many functions of torch do not support."""

from collections.abc import Iterable

import torch
from torch import Tensor


def numbers_of(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor as a dense, real tensor; for a sparse tensor its values.

    The result shares the memory of a dense tensor, and of a sparse tensor that is coalesced.
    """
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def gradient_numbers(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the numbers of the gradients of parameters; writing to them changes the gradients."""
    numbers: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        numbers.append(numbers_of(parameter.grad))
    return numbers
