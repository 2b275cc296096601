"""Activations: those of torch under their usual names, and some that torch lacks.

The output has the shape of the input, except for the gated activations (glu, reglu, geglu, swiglu),
which halve the last axis. Softmax, softmin and log_softmax act on the last axis.

`inplace` is no setting: it would overwrite inputs that another layer may use, such as a residual
connection.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framework import BuildError, NonNegativeFloat, PositiveFloat, PositiveInt, activations

activations.register("identity", nn.Identity, aliases=["none", "linear"])
activations.register("relu", nn.ReLU, hide=["inplace"])
activations.register("relu6", nn.ReLU6, hide=["inplace"])
activations.register("leaky_relu", nn.LeakyReLU, hide=["inplace"])
activations.register(
    "prelu", nn.PReLU, hide=["device", "dtype"], types={"num_parameters": PositiveInt}
)
activations.register(
    "rrelu",
    nn.RReLU,
    hide=["inplace"],
    types={"lower": NonNegativeFloat, "upper": NonNegativeFloat},
)
activations.register("elu", nn.ELU, hide=["inplace"], types={"alpha": PositiveFloat})
activations.register("celu", nn.CELU, hide=["inplace"], types={"alpha": PositiveFloat})
activations.register("selu", nn.SELU, hide=["inplace"])
activations.register("gelu", nn.GELU, types={"approximate": Literal["none", "tanh"]})
activations.register("silu", nn.SiLU, aliases=["swish"], hide=["inplace"])
activations.register("mish", nn.Mish, hide=["inplace"])
activations.register(
    "softplus", nn.Softplus, types={"beta": PositiveFloat, "threshold": PositiveFloat}
)
activations.register("sigmoid", nn.Sigmoid)
activations.register("logsigmoid", nn.LogSigmoid, aliases=["log_sigmoid"])
activations.register("tanh", nn.Tanh)
activations.register("tanhshrink", nn.Tanhshrink)
activations.register("softsign", nn.Softsign)
activations.register("softshrink", nn.Softshrink, types={"lambd": NonNegativeFloat})
activations.register("hardshrink", nn.Hardshrink, types={"lambd": NonNegativeFloat})
activations.register(
    "hardtanh", nn.Hardtanh, aliases=["hard_tanh"], hide=["min_value", "max_value", "inplace"]
)
activations.register("hardsigmoid", nn.Hardsigmoid, aliases=["hard_sigmoid"], hide=["inplace"])
activations.register(
    "hardswish", nn.Hardswish, aliases=["hard_swish", "hard_silu"], hide=["inplace"]
)
activations.register("glu", nn.GLU, hide=["dim"])


@activations.register("threshold")
class Threshold(nn.Threshold):
    """Return x if x > threshold, else `value`; the default is relu.

    Args:
        threshold: inputs above it are returned unchanged.
        value: replaces all other inputs.
    """

    def __init__(self, threshold: float = 0.0, value: float = 0.0):
        super().__init__(threshold, value)


@activations.register("softmax")
class Softmax(nn.Softmax):
    """exp(x) / sum(exp(x)) along the last axis: positive numbers with sum 1."""

    def __init__(self) -> None:
        super().__init__(dim=-1)


@activations.register("softmin")
class Softmin(nn.Softmin):
    """Softmax of -x along the last axis."""

    def __init__(self) -> None:
        super().__init__(dim=-1)


@activations.register("log_softmax", aliases=["logsoftmax"])
class LogSoftmax(nn.LogSoftmax):
    """The logarithm of the softmax along the last axis."""

    def __init__(self) -> None:
        super().__init__(dim=-1)


@activations.register("squareplus")
class Squareplus(nn.Module):
    """(x + √(x² + b)) / 2, a softplus without exp and log (Barron 2021, arXiv:2112.11687, eq. 1).

    Args:
        b: width of the curved region; near 0 it is relu, at 4 it is 1 for x = 0.
    """

    def __init__(self, b: PositiveFloat = 4.0):
        super().__init__()
        self.b = b

    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.sqrt(x * x + self.b)) / 2

    def extra_repr(self) -> str:
        return f"b={self.b:g}"


@activations.register("snake")
class Snake(nn.Module):
    """x + sin²(αx)/α, for periodic signals (Ziyin et al. 2020, arXiv:2006.08195, eq. 3).

    Args:
        alpha: frequency of the periodic part.
        trainable: learn alpha, one number for this layer.
    """

    def __init__(self, alpha: PositiveFloat = 1.0, trainable: bool = False):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha))) if trainable else alpha

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x).square() / self.alpha

    def extra_repr(self) -> str:
        return f"alpha={float(self.alpha):g}"


@activations.register("sine")
class Sine(nn.Module):
    """sin(ωx) (Sitzmann et al. 2020, "SIREN", arXiv:2006.09661, section 3.2).

    The paper uses ω = 30 for coordinates in [-1, 1].

    Args:
        omega: frequency.
    """

    def __init__(self, omega: PositiveFloat = 1.0):
        super().__init__()
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * x)

    def extra_repr(self) -> str:
        return f"omega={self.omega:g}"


@activations.register("relu_squared", aliases=["squared_relu", "relu2"])
class SquaredReLU(nn.Module):
    """max(x, 0)² (So et al. 2021, "Primer", arXiv:2109.08668, section 4)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


@activations.register("quick_gelu")
class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), an approximation of gelu.

    Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@activations.register("reglu")
class ReGLU(nn.Module):
    """a · relu(b), where [a, b] are the halves of the last axis.

    Shazeer 2020, arXiv:2002.05202, equation 5; the order of the halves is that of glu.
    """

    def forward(self, x: Tensor) -> Tensor:
        a, b = halves(x)
        return a * F.relu(b)


@activations.register("geglu")
class GEGLU(nn.Module):
    """a · gelu(b), where [a, b] are the halves of the last axis.

    Shazeer 2020, arXiv:2002.05202, equation 5; the order of the halves is that of glu.
    """

    def forward(self, x: Tensor) -> Tensor:
        a, b = halves(x)
        return a * F.gelu(b)


@activations.register("swiglu")
class SwiGLU(nn.Module):
    """a · silu(b), where [a, b] are the halves of the last axis.

    Shazeer 2020, arXiv:2002.05202, equation 5; the order of the halves is that of glu.
    """

    def forward(self, x: Tensor) -> Tensor:
        a, b = halves(x)
        return a * F.silu(b)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split the last axis in two.

    Raises:
        BuildError: the last axis is odd.
    """
    if x.shape[-1] % 2:
        raise BuildError(
            f"gated activation: expected an even last axis, got {x.shape[-1]} in {tuple(x.shape)}"
        )
    a, b = x.chunk(2, dim=-1)
    return a, b
