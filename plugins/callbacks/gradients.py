"""Parameters and gradients of an optimizer."""

from torch import Tensor
from torch.optim import Optimizer


def parameters_with_gradient(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of the optimizer that have a gradient."""
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters += [p for p in group["params"] if p.grad is not None]
    return parameters


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the gradients of the parameters of the optimizer."""
    gradients: list[Tensor] = []
    for group in optimizer.param_groups:
        gradients += [p.grad for p in group["params"] if p.grad is not None]
    return gradients
