"""Models for sequences of floats of unequal length, with the blocks of `layers/sequence.py`."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from framework import (
    Activation,
    Block,
    Dropout,
    Maker,
    NonNegativeInt,
    Norm,
    PositiveInt,
    Rate,
    Shape,
    blocks,
    heads,
    models,
)

Pooling = Literal["mean", "max", "statistics", "attention"]


@models.register("sequence_cnn")
def sequence_cnn(
    in_shape: Shape,
    out_shape: Shape,
    front: list[Block] = (),
    channels: Sequence[PositiveInt] = (64, 96, 128),
    kernel_size: PositiveInt = 5,
    stride: PositiveInt = 2,
    activation: Activation = "relu",
    norm: Norm | None = "layer",
    pool: Pooling = "statistics",
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
) -> nn.Module:
    """1-d convolutions over a sequence with a mask (channels + 1, length), then pooling.

    Each stage is a strided convolution and a residual one. Padding is ignored.

    Args:
        front: blocks that come first, such as log_mel and spec_augment.
        channels: output channels of each stage.
        kernel_size: length of each kernel, an odd number.
        stride: factor by which each stage shortens the sequence.
        activation: after each norm.
        norm: after each convolution; null for none.
        pool: how frames are pooled, see masked_pool.
        dropout: probability of zeroing an output of the residual convolutions, and a pooled
            feature.
        dropout_kind: how outputs are dropped.
    """
    rest = {"kernel_size": kernel_size, "activation": activation, "norm": norm}
    drop = {"dropout": dropout, "dropout_kind": dropout_kind}
    layers = list(front)
    for width in channels:
        layers += stage("masked_conv1d", width, stride, rest, drop)
    return pooled_model(in_shape, out_shape, layers, pool, dropout, dropout_kind)


@models.register("spectrogram_cnn")
def spectrogram_cnn(
    in_shape: Shape,
    out_shape: Shape,
    front: list[Block] = (),
    channels: Sequence[PositiveInt] = (16, 32, 64),
    kernel_size: PositiveInt = 3,
    stride: PositiveInt = 2,
    activation: Activation = "relu",
    norm: Norm | None = "layer",
    pool: Pooling = "statistics",
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
) -> nn.Module:
    """2-d convolutions over a sequence with a mask, as an image (bands, frames), then pooling.

    Inputs are (channels + 1, length). Each stage is a strided convolution and a residual one; the
    remaining bands become features of a frame. Padding is ignored.

    Args:
        front: blocks that come first and return bands in order, such as log_mel.
        channels: output channels of each stage.
        kernel_size: height and width of each kernel, an odd number.
        stride: factor by which each stage shrinks bands and frames.
        activation: after each norm.
        norm: after each convolution; null for none.
        pool: how frames are pooled, see masked_pool.
        dropout: probability of zeroing an output of the residual convolutions, and a pooled
            feature.
        dropout_kind: how outputs are dropped.
    """
    rest = {"kernel_size": kernel_size, "activation": activation, "norm": norm}
    drop = {"dropout": dropout, "dropout_kind": dropout_kind}
    layers: list[Block] = [*front, blocks.maker("as_picture")]
    for width in channels:
        layers += stage("masked_conv2d", width, stride, rest, drop)
    layers.append(blocks.maker("as_sequence"))
    return pooled_model(in_shape, out_shape, layers, pool, dropout, dropout_kind)


@models.register("sequence_transformer")
def sequence_transformer(
    in_shape: Shape,
    out_shape: Shape,
    front: list[Block] = (),
    width: PositiveInt = 96,
    depth: PositiveInt = 3,
    heads: PositiveInt = 4,
    expansion: PositiveInt = 4,
    halvings: NonNegativeInt = 2,
    position: Literal["sinusoidal", "learned", "none"] = "sinusoidal",
    activation: Activation = "gelu",
    norm: Norm = "layer",
    pool: Pooling = "statistics",
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
) -> nn.Module:
    """Transformer encoder over a sequence with a mask (channels + 1, length), then pooling.

    Padding is ignored.

    Args:
        front: blocks that come first, such as log_mel and spec_augment.
        width: features of a frame.
        depth: number of stacked layers.
        heads: number of attention heads; must divide width.
        expansion: hidden features of the two linear layers, per feature of a frame.
        halvings: number of convolutions before the layers, each of which halves the length; 0: one
            convolution that keeps it.
        position: kind of position encoding.
        activation: after the convolutions, and between the two linear layers.
        norm: normalization of each frame.
        pool: how frames are pooled, see masked_pool.
        dropout: probability of zeroing attention weights, hidden features, each branch and a pooled
            feature.
        dropout_kind: how features and branches are dropped.
    """
    drop = {"dropout": dropout, "dropout_kind": dropout_kind}
    stem = blocks.maker(
        "masked_conv1d",
        channels=width,
        stride=2 if halvings else 1,
        activation=activation,
        norm=norm,
    )
    layers = list(front)
    layers += [stem] * max(halvings, 1)
    if position != "none":
        transpose = blocks.maker("permute", axes=[1, 0])
        encoding = blocks.maker("position", position=position)
        layers.append(blocks.maker("masked", blocks=[transpose, encoding, transpose]))
    rest = {"heads": heads, "expansion": expansion, "activation": activation, "norm": norm}
    layers += [blocks.maker("masked_transformer", **rest, **drop)] * depth
    layers.append(blocks.maker("masked", blocks=[blocks.maker("norm", norm=norm)]))
    return pooled_model(in_shape, out_shape, layers, pool, dropout, dropout_kind)


def stage(
    convolution: str, channels: int, stride: int, rest: dict[str, Any], drop: dict[str, Any]
) -> list[Maker]:
    """Return a strided convolution and a residual one.

    Args:
        convolution: the name of the block.
        channels: output channels of both convolutions.
        stride: of the first convolution.
        rest: other settings of both convolutions.
        drop: settings of the dropout of the residual branch.
    """
    strided = blocks.maker(convolution, channels=channels, stride=stride, **rest)
    branch = blocks.maker(convolution, channels=channels, **rest, **drop)
    return [strided, blocks.maker("masked_residual", blocks=[branch])]


def pooled_model(
    in_shape: Shape,
    out_shape: Shape,
    layers: list[Block],
    pool: str,
    dropout: float,
    dropout_kind: Dropout,
) -> nn.Module:
    """Return a model of the layers, masked_pool, dropout and a linear head."""
    layers.append(blocks.maker("masked_pool", pool=pool))
    if dropout > 0:
        layers.append(blocks.maker("dropout", p=dropout, kind=dropout_kind))
    return models.build("stack", in_shape, out_shape, blocks=layers, head=heads.maker("class"))
