"""Models for sequences of floats of unequal length, made of the blocks of `layers/sequence.py`, by its convention."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from framework import (
    Activation,
    Block,
    Dropout,
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
    """1-d convolutions over a sequence with its mask (channels + 1, length), pooled over the real frames.

    Each stage is a strided convolution and a residual one.

    Args:
        front: blocks that come first, such as log_mel and spec_augment.
        channels: output channels of each stage.
        kernel_size: taps of each convolution, an odd number.
        stride: how many times shorter each stage makes the sequence.
        activation: after each norm.
        norm: after each convolution; null for none.
        pool: what is taken of the frames.
        dropout: probability of zeroing an output of the residual convolutions, and a pooled feature.
        dropout_kind: how outputs are dropped.
    """
    rest = {"kernel_size": kernel_size, "activation": activation, "norm": norm}
    drop = {"dropout": dropout, "dropout_kind": dropout_kind}
    layers = list(front)
    for width in channels:
        branch = blocks.maker("masked_conv1d", channels=width, **rest, **drop)
        layers.append(blocks.maker("masked_conv1d", channels=width, stride=stride, **rest))
        layers.append(blocks.maker("masked_residual", blocks=[branch]))
    return read_out(in_shape, out_shape, layers, pool, dropout, dropout_kind)


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
    """2-d convolutions over a sequence with its mask, seen as a picture (bands, frames), pooled over the real frames.

    Each stage is a strided convolution and a residual one; the bands that are left are features of a frame.

    Args:
        front: blocks that come first and give bands in their order, such as log_mel.
        channels: output channels of each stage.
        kernel_size: height and width of each kernel, an odd number.
        stride: how many times smaller each stage makes bands and frames.
        activation: after each norm.
        norm: after each convolution; null for none.
        pool: what is taken of the frames.
        dropout: probability of zeroing an output of the residual convolutions, and a pooled feature.
        dropout_kind: how outputs are dropped.
    """
    rest = {"kernel_size": kernel_size, "activation": activation, "norm": norm}
    drop = {"dropout": dropout, "dropout_kind": dropout_kind}
    layers = [*front, blocks.maker("as_picture")]
    for width in channels:
        branch = blocks.maker("masked_conv2d", channels=width, **rest, **drop)
        layers.append(blocks.maker("masked_conv2d", channels=width, stride=stride, **rest))
        layers.append(blocks.maker("masked_residual", blocks=[branch]))
    layers.append(blocks.maker("as_sequence"))
    return read_out(in_shape, out_shape, layers, pool, dropout, dropout_kind)


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
    """Transformer encoder over a sequence with its mask (channels + 1, length), pooled over the real frames.

    Args:
        front: blocks that come first, such as log_mel and spec_augment.
        width: features of a frame.
        depth: layers on top of each other.
        heads: attentions side by side; must divide width.
        expansion: hidden features of a layer's two linear maps, per feature of a frame.
        halvings: convolutions before the layers, each of which halves the length; 0: one that keeps it.
        position: how a frame is told from others.
        activation: after the convolutions, and between a layer's two linear maps.
        norm: of each frame.
        pool: what is taken of the frames.
        dropout: probability of zeroing attention weights, hidden features, each branch and a pooled feature.
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
    layers = [*front, *[stem] * max(halvings, 1)]
    if position != "none":
        turn = blocks.maker("permute", axes=[1, 0])
        layers.append(
            blocks.maker("masked", blocks=[turn, blocks.maker("position", position=position), turn])
        )
    rest = {"heads": heads, "expansion": expansion, "activation": activation, "norm": norm}
    layers += [blocks.maker("masked_transformer", **rest, **drop) for _ in range(depth)]
    layers.append(blocks.maker("masked", blocks=[blocks.maker("norm", norm=norm)]))
    return read_out(in_shape, out_shape, layers, pool, dropout, dropout_kind)


def read_out(
    in_shape: Shape,
    out_shape: Shape,
    layers: list,
    pool: str,
    dropout: float,
    dropout_kind: Dropout,
) -> nn.Module:
    """Return the layers with the pooling and a linear head."""
    layers.append(blocks.maker("masked_pool", pool=pool))
    if dropout > 0:
        layers.append(blocks.maker("dropout", p=dropout, kind=dropout_kind))
    return models.build("stack", in_shape, out_shape, blocks=layers, head=heads.maker("class"))
