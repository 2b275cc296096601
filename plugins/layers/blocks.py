"""Blocks for any shape: linear layers, residual connections, other parts as blocks, reshaping."""

import math
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

CONVOLUTIONS: dict[int, type[nn.Module]] = {2: nn.Conv1d, 3: nn.Conv2d}
"""By the number of axes of a sample."""


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

    (D,) -> (width,), or (T, D) -> (T, width) at each position.

    Args:
        width: output features.
        activation: after the norm; null for none.
        norm: after the linear layer; null for none.
        dropout: probability of zeroing an output.
        dropout_kind: how outputs are dropped.
        bias: add a learned bias.
    """
    features = expect_features(in_shape, "linear")
    layers = nn.Sequential()
    layers.add_module("linear", nn.Linear(features, width, bias=bias))
    if norm is not None:
        layers.add_module("norm", norm((width,)))
    if activation is not None:
        layers.add_module("activation", activation())
    if dropout > 0:
        layers.add_module("dropout", dropout_kind(dropout))
    return layers


def expect_features(in_shape: Shape, name: str) -> int:
    """Return the features D of a shape (D,) or (T, D).

    Raises:
        BuildError: the shape is another one.
    """
    return shapes.expect(in_shape, "(D,) or (T, D)", name, "put `flatten` before it")[-1]


class Residual(nn.Module):
    """skip(x) + body(x)."""

    def __init__(self, body: nn.Module, skip: nn.Module):
        super().__init__()
        self.body = body
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


@blocks.register("residual")
def residual(
    in_shape: Shape,
    blocks: list[Block] = (),
    activation: Activation | None = None,
    norm: Norm | None = None,
) -> nn.Module:
    """Skip connection around blocks: x + blocks(x), or projection(x) + blocks(x).

    A projection is used where the blocks change the shape: linear over the last axis if only that
    one changes, (D,) or (T, D); otherwise a convolution of size 1, strided if the blocks shrink the
    signal (He et al. 2016, arXiv:1512.03385, section 3.3, option B).

    Args:
        blocks: the residual branch.
        activation: after the sum; null for none.
        norm: after the projection; null for none.
    """
    modules, out_shape = shapes.build_chain(blocks, in_shape)
    skip = nn.Sequential(*projection(tuple(in_shape), out_shape))
    if norm is not None and len(skip):
        linear_skip = isinstance(skip[0], nn.Linear)
        skip.add_module("norm", norm(out_shape[-1:] if linear_skip else out_shape))
    layers = nn.Sequential(Residual(nn.Sequential(*modules), skip))
    if activation is not None:
        layers.add_module("activation", activation())
    return layers


def projection(in_shape: Shape, out_shape: Shape) -> list[nn.Module]:
    """Return the layers that map `in_shape` to `out_shape`: none, or one linear or convolution.

    Raises:
        BuildError: no linear map or strided convolution of size 1 does it.
    """
    if in_shape == out_shape:
        return []
    if len(in_shape) == len(out_shape) <= 2 and in_shape[:-1] == out_shape[:-1]:
        return [nn.Linear(in_shape[-1], out_shape[-1], bias=False)]
    strides = []
    strided_sizes = []
    for size, out_size in zip(in_shape[1:], out_shape[1:], strict=False):
        stride = math.ceil(size / out_size)
        strides.append(stride)
        strided_sizes.append(math.ceil(size / stride))
    convolution = CONVOLUTIONS.get(len(in_shape))
    same_rank = len(in_shape) == len(out_shape)
    if convolution is None or not same_rank or tuple(strided_sizes) != out_shape[1:]:
        raise BuildError(
            f"residual cannot add its input {in_shape} to the output {out_shape} of its blocks:"
            " they may change the number of features or channels, and shrink a signal or image by"
            " an integer factor"
        )
    return [convolution(in_shape[0], out_shape[0], 1, tuple(strides), bias=False)]


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
        norm: normalization of the input of the branch; null for none.
        dropout: probability of zeroing after each linear layer.
        dropout_kind: how outputs are dropped.
    """
    features = expect_features(in_shape, "residual_mlp")
    drop = {"dropout": dropout, "dropout_kind": dropout_kind}
    branch = []
    if norm is not None:
        branch.append(blocks.maker("norm", norm=norm, features="last"))
    branch.append(blocks.maker("linear", width=width, activation=activation, **drop))
    branch.append(blocks.maker("linear", width=features, activation=None, **drop))
    return blocks.build("residual", in_shape, blocks=branch)


@blocks.register("activation")
def activation(activation: Activation = "relu") -> nn.Module:
    """An activation as a block.

    Args:
        activation: the activation to apply.
    """
    return activation()


@blocks.register("norm")
def norm(
    in_shape: Shape, norm: Norm = "layer", features: Literal["first", "last"] = "first"
) -> nn.Module:
    """A norm as a block.

    Args:
        norm: the norm to apply.
        features: the axis of the features: first for (C, L) and (C, H, W), last for (T, D).
    """
    return norm(in_shape[-1:] if features == "last" else in_shape)


@blocks.register("dropout")
def dropout(p: Rate = 0.5, kind: Dropout = "dropout") -> nn.Module:
    """Dropout as a block.

    Args:
        p: probability of zeroing.
        kind: the kind of dropout.
    """
    return kind(p)


blocks.register("flatten", nn.Flatten, hide=["start_dim", "end_dim"])


@blocks.register("reshape")
class Reshape(nn.Module):
    """Change the shape of a sample.

    Args:
        shape: the new shape without the batch axis; one size may be -1, which is inferred.
    """

    def __init__(self, in_shape: Shape, shape: Sequence[int] = (-1,)):
        super().__init__()
        try:
            self.shape = torch.empty(in_shape, device="meta").reshape(tuple(shape)).shape
        except RuntimeError:
            raise BuildError(f"reshape: {tuple(in_shape)} does not fit {tuple(shape)}") from None

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape)


@blocks.register("permute")
class Permute(nn.Module):
    """Reorder the axes of a sample: by default (C, L) -> (L, C), from a signal to a sequence.

    Args:
        axes: the axes of a sample, counted from 0 without the batch axis, in their new order.
    """

    def __init__(self, in_shape: Shape, axes: Sequence[int] = (1, 0)):
        super().__init__()
        if sorted(axes) != list(range(len(in_shape))):
            raise BuildError(
                f"permute: axes={list(axes)}: expected each axis of {tuple(in_shape)} once"
            )
        self.axes = (0, *(axis + 1 for axis in axes))

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)
