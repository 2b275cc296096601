"""Heads: from features to the task's outputs."""

from math import prod
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from framework import Activation, Dropout, Norm, PositiveInt, Rate, Shape, blocks, heads, shapes

Pooling = Literal["flatten", "mean", "max", "first", "last"]


class Pool(nn.Module):
    """Features (D,) of a sample of any shape: all of its numbers, or its positions' mean, maximum, first or last.

    Positions are the first axis of (T, D), and those behind the channels of (C, H, W).
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
        if self.pool == "mean" and x.ndim == 4 and x.stride(1) == 1:
            return F.avg_pool2d(x, x.shape[2:]).flatten(
                1
            )  # its gradient is in the format of x: channels last
        return x.mean(positions) if self.pool == "mean" else x.amax(positions)


@heads.register("class", aliases=["value", "linear"])
class LinearHead(nn.Module):
    """Pooled features through one linear layer: logits of classes or labels, or values of any shape."""

    def __init__(self, in_shape: Shape, out_shape: Shape, pool: Pooling = "flatten"):
        """Build the linear layer.

        Args:
            pool: how positions become one: flatten keeps all numbers; first and last are for (T, D) only.
        """
        super().__init__()
        self.out_shape = tuple(out_shape)
        self.pool = Pool(in_shape, pool)
        (features,) = shapes.output_shape(self.pool, in_shape)
        self.linear = nn.Linear(features, prod(out_shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(x)).reshape(-1, *self.out_shape)


@heads.register("mlp")
class MLPHead(nn.Module):
    """Pooled features through a hidden layer and a linear one: logits, or values of any shape."""

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
        """Build the two layers.

        Args:
            width: hidden features.
            activation: after the hidden layer's norm.
            norm: after the hidden layer; null for none.
            dropout: probability of zeroing a hidden feature.
            dropout_kind: how hidden features are dropped.
            pool: how positions become one: flatten keeps all numbers; first and last are for (T, D) only.
        """
        super().__init__()
        self.pool = Pool(in_shape, pool)
        shape = shapes.output_shape(self.pool, in_shape)
        rest = {
            "activation": activation,
            "norm": norm,
            "dropout": dropout,
            "dropout_kind": dropout_kind,
        }
        self.hidden = blocks.build("linear", shape, width=width, **rest)
        self.output = heads.build("class", shapes.output_shape(self.hidden, shape), out_shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(self.pool(x)))


@heads.register("token")
class TokenHead(nn.Module):
    """The same linear layer at every position: (T, D) -> (T, outputs), such as logits of each next token.

    `outputs` is the last number of out_shape, which may be (outputs,) or (T, outputs).
    """

    def __init__(self, in_shape: Shape, out_shape: Shape):
        super().__init__()
        _, features = shapes.expect(in_shape, "(T, D)", "token head")
        self.linear = nn.Linear(features, out_shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)
