"""Heads: map features to the outputs of the task."""

from math import prod
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from framework import Activation, Dropout, Norm, PositiveInt, Rate, Shape, blocks, heads, shapes

Pooling = Literal["flatten", "mean", "max", "first", "last"]


class Pool(nn.Module):
    """Reduce a sample of any shape to features (D,).

    flatten keeps all numbers; mean, max, first and last reduce the positions. Positions are the
    first axis of (T, D), and the axes after the channels of (C, H, W).

    Args:
        in_shape: (D,), (T, D) or (C, H, W); any shape for flatten.
        pool: flatten, mean, max, first or last.

    Raises:
        BuildError: the shape does not fit the kind of pooling.
    """

    def __init__(self, in_shape: Shape, pool: str):
        super().__init__()
        if pool in ("first", "last"):
            shapes.expect(in_shape, "(D,) or (T, D)", f"pool={pool}")
        elif pool != "flatten":
            shapes.expect(in_shape, "(D,), (T, D) or (C, H, W)", f"pool={pool}")
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        if self.pool == "flatten" or x.ndim == 2:
            return x.flatten(1)
        if self.pool in ("first", "last"):
            return x[:, 0 if self.pool == "first" else -1]
        positions = (1,) if x.ndim == 3 else (2, 3)
        if self.pool == "max":
            return x.amax(positions)
        if x.ndim == 4 and x.stride(1) == 1:
            # Unlike that of mean, the gradient of avg_pool2d has the format of x: channels last.
            return F.avg_pool2d(x, x.shape[2:]).flatten(1)
        return x.mean(positions)


@heads.register("class", aliases=["value", "linear"])
class LinearHead(nn.Module):
    """Pooling and one linear layer: logits of classes or labels, or values of any shape.

    Args:
        pool: how positions are reduced: flatten keeps all numbers; first and last need (T, D).
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, pool: Pooling = "flatten"):
        super().__init__()
        self.out_shape = tuple(out_shape)
        self.pool = Pool(in_shape, pool)
        (features,) = shapes.output_shape(self.pool, in_shape)
        self.linear = nn.Linear(features, prod(out_shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(x)).reshape(-1, *self.out_shape)


@heads.register("mlp")
class MLPHead(nn.Module):
    """Pooling, a hidden layer and a linear layer: logits, or values of any shape.

    Args:
        width: hidden features.
        activation: after the norm of the hidden layer.
        norm: after the hidden layer; null for none.
        dropout: probability of zeroing a hidden feature.
        dropout_kind: how hidden features are dropped.
        pool: how positions are reduced: flatten keeps all numbers; first and last need (T, D).
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        width: PositiveInt = 128,
        activation: Activation = "relu",
        norm: Norm | None = None,
        dropout: Rate = 0.0,
        dropout_kind: Dropout = "dropout",
        pool: Pooling = "flatten",
    ):
        super().__init__()
        self.pool = Pool(in_shape, pool)
        shape = shapes.output_shape(self.pool, in_shape)
        self.hidden = blocks.build(
            "linear",
            shape,
            width=width,
            activation=activation,
            norm=norm,
            dropout=dropout,
            dropout_kind=dropout_kind,
        )
        self.output = heads.build("class", shapes.output_shape(self.hidden, shape), out_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(self.pool(x)))


@heads.register("token")
class TokenHead(nn.Module):
    """One linear layer at every position: (T, D) -> (T, outputs), such as logits of next tokens.

    `outputs` is the last entry of out_shape, which is (outputs,) or (T, outputs).
    """

    def __init__(self, in_shape: Shape, out_shape: Shape):
        super().__init__()
        _, features = shapes.expect(in_shape, "(T, D)", "token head")
        self.linear = nn.Linear(features, out_shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)
