"""Initializers of weights: those of torch.nn.init with suitable defaults, and some others.

Each fills a tensor of two or more axes in place: (out, in) of a linear layer, (out, in, ...) of a
convolution.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from framework import (
    BuildError,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    initializers,
)

GAIN = {"gain": PositiveFloat}
SLOPE = {"a": NonNegativeFloat}

initializers.register(
    "xavier_uniform", nn.init.xavier_uniform_, aliases=["glorot_uniform"], types=GAIN
)
initializers.register(
    "xavier_normal", nn.init.xavier_normal_, aliases=["glorot_normal"], types=GAIN
)
initializers.register(
    "kaiming_uniform", nn.init.kaiming_uniform_, aliases=["he_uniform"], types=SLOPE
)
initializers.register("kaiming_normal", nn.init.kaiming_normal_, aliases=["he_normal"], types=SLOPE)
initializers.register("orthogonal", nn.init.orthogonal_, types=GAIN)
initializers.register("zeros", nn.init.zeros_)
initializers.register("ones", nn.init.ones_)


@initializers.register("constant")
def constant(tensor: Tensor, val: float = 0.0) -> Tensor:
    """Fill the tensor with one value.

    Args:
        val: the value of all elements.
    """
    return nn.init.constant_(tensor, val)


@initializers.register("normal")
def normal(tensor: Tensor, mean: float = 0.0, std: NonNegativeFloat = 0.02) -> Tensor:
    """Draw from a normal distribution; the default std is that of GPT-2.

    The default of torch, std=1, is too large for weights.

    Args:
        mean: mean of the distribution.
        std: standard deviation of the distribution.
    """
    return nn.init.normal_(tensor, mean, std)


@initializers.register("trunc_normal", aliases=["truncated_normal"])
def trunc_normal(
    tensor: Tensor, mean: float = 0.0, std: PositiveFloat = 0.02, cut: PositiveFloat = 2.0
) -> Tensor:
    """Draw from a truncated normal distribution.

    Args:
        mean: mean of the distribution.
        std: standard deviation before truncation.
        cut: largest distance from the mean, in standard deviations.
    """
    return nn.init.trunc_normal_(tensor, mean, std, mean - cut * std, mean + cut * std)


@initializers.register("uniform")
def uniform(tensor: Tensor, a: float = -0.05, b: float = 0.05) -> Tensor:
    """Draw uniformly from [a, b), by default around zero.

    The default of torch, [0, 1), makes every weight positive.

    Args:
        a: lower bound.
        b: upper bound.
    """
    if a > b:
        raise BuildError(f"uniform: expected a <= b, got a={a:g}, b={b:g}")
    return nn.init.uniform_(tensor, a, b)


@initializers.register("lecun_normal")
def lecun_normal(tensor: Tensor) -> Tensor:
    """Draw from N(0, 1/fan_in), as selu needs it (LeCun et al. 1998, "Efficient BackProp", 4.6)."""
    return nn.init.kaiming_normal_(tensor, nonlinearity="linear")


@initializers.register("lecun_uniform")
def lecun_uniform(tensor: Tensor) -> Tensor:
    """Draw uniformly with variance 1/fan_in (LeCun et al. 1998, "Efficient BackProp", 4.6)."""
    return nn.init.kaiming_uniform_(tensor, nonlinearity="linear")


@initializers.register("variance_scaling")
def variance_scaling(
    tensor: Tensor,
    scale: PositiveFloat = 1.0,
    mode: Literal["fan_in", "fan_out", "fan_avg"] = "fan_in",
    distribution: Literal["normal", "uniform"] = "normal",
) -> Tensor:
    """Draw with mean 0 and variance scale/fan.

    lecun is scale=1, kaiming is scale=2, and xavier is scale=1 with mode=fan_avg.

    Args:
        scale: numerator of the variance.
        mode: the fan: the number of inputs of a unit, of its outputs, or their mean.
        distribution: shape of the distribution.
    """
    if tensor.ndim < 2:
        raise BuildError(
            f"variance_scaling: expected a weight of 2 or more axes, got {tuple(tensor.shape)}"
        )
    positions = math.prod(tensor.shape[2:])
    fan_in = tensor.shape[1] * positions
    fan_out = tensor.shape[0] * positions
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    std = math.sqrt(scale / fan)
    if distribution == "normal":
        return nn.init.normal_(tensor, 0.0, std)
    return nn.init.uniform_(tensor, -std * math.sqrt(3), std * math.sqrt(3))


@initializers.register("identity", aliases=["eye", "dirac"])
def identity(tensor: Tensor, groups: PositiveInt = 1) -> Tensor:
    """Fill with a unit matrix, or with unit kernels of a convolution: the layer returns its input.

    With fewer outputs than inputs, it returns the first ones.

    Args:
        groups: number of groups of a grouped convolution.
    """
    if tensor.ndim == 2:
        return nn.init.eye_(tensor)
    return nn.init.dirac_(tensor, groups)


@initializers.register("sparse")
def sparse(tensor: Tensor, sparsity: Fraction = 0.9, std: PositiveFloat = 0.01) -> Tensor:
    """Draw from N(0, std²) and zero a fraction of the outgoing weights of each unit (Martens 2010).

    Args:
        sparsity: fraction of zeros.
        std: standard deviation of the other weights.
    """
    matrix = nn.init.sparse_(torch.empty(len(tensor), tensor[0].numel()), sparsity, std)
    with torch.no_grad():
        return tensor.copy_(matrix.view(tensor.shape))
