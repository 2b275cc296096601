"""Blocks for any shape: linear layers, residual connections, other kinds of part as blocks, changes of shape."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from framework import (
    Activation,
    Block,
    BuildError,
    Dropout,
    Norm,
    PositiveInt,
    Rate,
    Shape,
    blocks,
    shapes,
)


@blocks.register("linear", aliases=["dense"])
def linear(
    in_shape: Shape,
    width: PositiveInt = 128,
    activation: Activation | None = "relu",
    norm: Norm | None = None,
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
    bias: bool = True,
) -> nn.Sequential:
    """Linear layer over the last axis, then norm, activation and dropout.

    (D,) -> (width,), or (T, D) -> (T, width), each position alike.

    Args:
        width: output features.
        activation: what follows the norm; null for none.
        norm: what follows the linear map; null for none.
        dropout: probability of zeroing an output.
        dropout_kind: how outputs are dropped.
        bias: whether the linear map has one.
    """
    features = shapes.expect(in_shape, "(D,) or (T, D)", "linear", "put `flatten` before it")[-1]
    layers = nn.Sequential()
    layers.add_module("linear", nn.Linear(features, width, bias=bias))
    if norm is not None:
        layers.add_module("norm", norm((width,)))
    if activation is not None:
        layers.add_module("activation", activation())
    if dropout > 0:
        layers.add_module("dropout", dropout_kind(dropout))
    return layers


class Residual(nn.Module):
    """skip(x) + body(x)."""

    def __init__(self, body: nn.Module, skip: nn.Module):
        super().__init__()
        self.body, self.skip = body, skip

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


@blocks.register("residual")
def residual(
    in_shape: Shape,
    blocks: list[Block] = (),
    activation: Activation | None = None,
    norm: Norm | None = None,
) -> nn.Module:
    """Skip connection around blocks: x + blocks(x), with a projection of x where the blocks change the shape.

    The projection is linear over the last axis where only that changes, (D,) or (T, D); otherwise a convolution of
    size 1, strided where the blocks shrink the signal (He et al. 2016, arXiv:1512.03385, section 3.3, option B).

    Args:
        blocks: the residual branch.
        activation: what follows the sum.
        norm: what follows the projection, if there is one.
    """
    modules, out_shape = shapes.build_chain(blocks, in_shape)
    skip = nn.Sequential(*projection(tuple(in_shape), out_shape))
    if norm is not None and len(skip):
        skip.add_module(
            "norm", norm(out_shape[-1:] if isinstance(skip[0], nn.Linear) else out_shape)
        )
    layers = nn.Sequential(Residual(nn.Sequential(*modules), skip))
    if activation is not None:
        layers.add_module("activation", activation())
    return layers


def projection(in_shape: Shape, out_shape: Shape) -> list[nn.Module]:
    """Return what makes `out_shape` of `in_shape`: nothing, a linear map, or a strided convolution of size 1."""
    if in_shape == out_shape:
        return []
    if len(in_shape) == len(out_shape) <= 2 and in_shape[:-1] == out_shape[:-1]:
        return [nn.Linear(in_shape[-1], out_shape[-1], bias=False)]
    strides = tuple(
        -(-size // smaller) for size, smaller in zip(in_shape[1:], out_shape[1:], strict=False)
    )
    shrunk = tuple(-(-size // stride) for size, stride in zip(in_shape[1:], strides, strict=False))
    convolution = {2: nn.Conv1d, 3: nn.Conv2d}.get(len(in_shape))
    if convolution is None or len(in_shape) != len(out_shape) or shrunk != out_shape[1:]:
        raise BuildError(
            f"residual cannot add its input {in_shape} to what its blocks give, {out_shape}: they may change the "
            f"number of features or channels, and shrink a signal or image by a whole factor"
        )
    return [convolution(in_shape[0], out_shape[0], 1, strides, bias=False)]


@blocks.register("residual_mlp")
def residual_mlp(
    in_shape: Shape,
    width: PositiveInt = 128,
    activation: Activation = "relu",
    norm: Norm | None = "layer",
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
) -> nn.Module:
    """x + dropout(linear(dropout(activation(linear(norm(x)))))).

    Gorishniy et al. 2021, arXiv:2106.11959, section 3.2.

    Args:
        width: hidden features; the output has as many as the input.
        activation: between the two linear layers.
        norm: of the branch's input; null for none.
        dropout: probability of zeroing, after each linear layer.
        dropout_kind: how outputs are dropped.
    """
    features = shapes.expect(in_shape, "(D,) or (T, D)", "residual_mlp", "put `flatten` before it")[
        -1
    ]
    rest = {"dropout": dropout, "dropout_kind": dropout_kind}
    branch = [] if norm is None else [blocks.maker("norm", norm=norm, features="last")]
    branch.append(blocks.maker("linear", width=width, activation=activation, **rest))
    branch.append(blocks.maker("linear", width=features, activation=None, **rest))
    return blocks.build("residual", in_shape, blocks=branch)


@blocks.register("activation")
def activation(activation: Activation = "relu") -> nn.Module:
    """An activation as a block.

    Args:
        activation: which one.
    """
    return activation()


@blocks.register("norm")
def norm(
    in_shape: Shape, norm: Norm = "layer", features: Literal["first", "last"] = "first"
) -> nn.Module:
    """A norm as a block.

    Args:
        norm: which one.
        features: the features' axis: the first of (C, L) and (C, H, W), the last of (T, D).
    """
    return norm(in_shape[-1:] if features == "last" else in_shape)


@blocks.register("dropout")
def dropout(p: Rate = 0.5, kind: Dropout = "dropout") -> nn.Module:
    """Dropout as a block.

    Args:
        p: probability of zeroing.
        kind: what is dropped, and how.
    """
    return kind(p)


blocks.register("flatten", nn.Flatten, hide=["start_dim", "end_dim"])


@blocks.register("reshape")
class Reshape(nn.Module):
    """The same numbers in another shape."""

    def __init__(self, in_shape: Shape, shape: Sequence[int] = (-1,)):
        """Check that the numbers fit.

        Args:
            shape: the new shape without the batch axis; one size may be -1, the rest.
        """
        super().__init__()
        try:
            self.shape = torch.empty(in_shape, device="meta").reshape(tuple(shape)).shape
        except RuntimeError:
            raise BuildError(f"reshape cannot make {tuple(shape)} of {tuple(in_shape)}") from None

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape)


@blocks.register("permute")
class Permute(nn.Module):
    """The axes of a sample in another order: (C, L) -> (L, C) makes a sequence of a signal, and back."""

    def __init__(self, in_shape: Shape, axes: Sequence[int] = (1, 0)):
        """Check that each axis comes once.

        Args:
            axes: the axes of a sample, counted from 0 without the batch axis, in their new order.
        """
        super().__init__()
        if sorted(axes) != list(range(len(in_shape))):
            raise BuildError(
                f"permute expects each axis of {tuple(in_shape)} once, gets {list(axes)}"
            )
        self.axes = (0, *(axis + 1 for axis in axes))

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)
