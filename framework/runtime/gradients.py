"""The numbers of sparse and complex gradients, for which many functions of torch have no code."""

from collections.abc import Iterable

import torch
from torch import Tensor


def numbers_of(tensor: Tensor) -> Tensor:
    """Return a tensor's numbers as a dense, real tensor; of a sparse one those that it stores.

    It shares the memory of a dense tensor, and of a sparse one that is coalesced.
    """
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def gradient_numbers(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the numbers of the parameters' gradients; to write them is to change the gradients."""
    found: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        found.append(numbers_of(parameter.grad))
    return found
