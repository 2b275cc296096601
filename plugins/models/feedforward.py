"""Whole networks, each a stack of registered blocks with a head."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from framework import (
    Activation,
    BuildError,
    Dropout,
    Maker,
    Norm,
    PositiveInt,
    Rate,
    Shape,
    blocks,
    heads,
    models,
    shapes,
)


def stack(
    in_shape: Shape, out_shape: Shape, layers: list[Maker], head: str, **settings
) -> nn.Module:
    return models.build(
        "stack", in_shape, out_shape, blocks=layers, head=heads.maker(head, **settings)
    )


@models.register("mlp")
def mlp(
    in_shape: Shape,
    out_shape: Shape,
    width: PositiveInt | list[PositiveInt] = 256,
    depth: PositiveInt = 2,
    activation: Activation = "relu",
    norm: Norm | None = None,
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
) -> nn.Module:
    """Multi-layer perceptron on the flattened input, of any shape.

    Args:
        width: features of each hidden layer; a list gives each layer its own, and their number.
        depth: number of hidden layers, where width is one number.
        activation: after each hidden layer's norm.
        norm: after each hidden layer; null for none.
        dropout: probability of zeroing a hidden feature.
        dropout_kind: how hidden features are dropped.
    """
    widths = [width] * depth if isinstance(width, int) else width
    rest = {
        "activation": activation,
        "norm": norm,
        "dropout": dropout,
        "dropout_kind": dropout_kind,
    }
    layers = [blocks.maker("linear", width=features, **rest) for features in widths]
    if len(in_shape) != 1:
        layers.insert(0, blocks.maker("flatten"))
    return stack(in_shape, out_shape, layers, "class")


@models.register("cnn")
def cnn(
    in_shape: Shape,
    out_shape: Shape,
    channels: Sequence[PositiveInt] = (32, 64),
    kernel_size: PositiveInt = 3,
    width: PositiveInt = 128,
    activation: Activation = "relu",
    norm: Norm | None = "batch",
    pooling: Literal["max", "avg"] = "max",
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
) -> nn.Module:
    """Convolutions that each halve the image (C, H, W), then a hidden layer: small, and quick on a CPU.

    The pooling comes before norm and activation, which then work on a quarter of the numbers.

    Args:
        channels: output channels of each convolution.
        kernel_size: height and width of the kernels.
        width: features of the hidden layer.
        activation: after each norm, and after the hidden layer.
        norm: after each pooling; null for none.
        pooling: how 2x2 cells become one.
        dropout: probability of zeroing a feature of the hidden layer.
        dropout_kind: how hidden features are dropped.
    """
    _, high, wide = shapes.expect(in_shape, "images (C, H, W)", "cnn")
    most = min(high, wide).bit_length() - 1
    if len(channels) > most:
        raise BuildError(
            f"cnn halves the image {len(channels)} times; {tuple(in_shape)} allows {most} `channels`"
        )
    layers = []
    for count in channels:
        layers.append(
            blocks.maker(
                "conv2d",
                channels=count,
                kernel_size=kernel_size,
                activation=None,
                bias=norm is None,
            )
        )
        layers.append(blocks.maker(f"{pooling}_pool"))
        layers += [] if norm is None else [blocks.maker("norm", norm=norm)]
        layers.append(blocks.maker("activation", activation=activation))
    rest = {"activation": activation, "dropout": dropout, "dropout_kind": dropout_kind}
    return stack(in_shape, out_shape, layers, "mlp", width=width, **rest)


@models.register("resnet")
def resnet(
    in_shape: Shape,
    out_shape: Shape,
    block: Literal["basic", "bottleneck"] = "basic",
    depths: Sequence[PositiveInt] = (3, 3, 3),
    channels: Sequence[PositiveInt] = (16, 32, 64),
    stem: Literal["small", "large"] = "small",
    activation: Activation = "relu",
    norm: Norm | None = "batch",
    drop_path: Rate = 0.0,
) -> nn.Module:
    """Residual network on images (C, H, W) (He et al. 2016, arXiv:1512.03385); the default is their ResNet-20.

    ResNet-18: depths=[2,2,2,2] channels=[64,128,256,512] stem=large; ResNet-50: block=bottleneck depths=[3,4,6,3] too.

    Args:
        block: two 3x3 convolutions, or 1x1, 3x3 and 1x1 with four times the channels at the end.
        depths: blocks of each stage; every stage but the first halves the image.
        channels: channels of each stage.
        stem: small: a 3x3 convolution; large: 7x7 and a pooling, which quarter the image.
        activation: after each convolution's norm, and after each sum.
        norm: after each convolution; null for none.
        drop_path: stochastic depth: probability of leaving the last block's branch out, for each sample; it rises to
            that in equal steps from block to block (Huang et al. 2016, arXiv:1603.09382, equation 4).
    """
    shapes.expect(in_shape, "images (C, H, W)", "resnet")
    if len(depths) != len(channels):
        raise BuildError(
            f"resnet has {len(depths)} depths {list(depths)} for {len(channels)} channels {list(channels)}"
        )
    rest = {"activation": activation, "norm": norm}
    name = {"basic": "basic_block", "bottleneck": "bottleneck"}[block]
    layers, built = resnet_stem(stem, channels[0], **rest), 0
    for stage, (depth, count) in enumerate(zip(depths, channels, strict=True)):
        for position in range(depth):
            stride, built = 2 if stage > 0 and position == 0 else 1, built + 1
            dropped = drop_path * built / sum(depths)
            layers.append(
                blocks.maker(name, channels=count, stride=stride, drop_path=dropped, **rest)
            )
    return stack(in_shape, out_shape, layers, "class", pool="mean")


def resnet_stem(stem: str, channels: int, activation: Activation, norm: Norm | None) -> list[Maker]:
    rest = {"channels": channels, "activation": activation, "norm": norm, "bias": norm is None}
    if stem == "small":
        return [blocks.maker("conv2d", **rest)]
    pool = blocks.maker("max_pool", kernel_size=3, stride=2, padding=1)
    return [blocks.maker("conv2d", kernel_size=7, stride=2, **rest), pool]


@models.register("rnn")
def rnn(
    in_shape: Shape,
    out_shape: Shape,
    cell: Literal["lstm", "gru"] = "lstm",
    width: PositiveInt = 128,
    depth: PositiveInt = 1,
    bidirectional: bool = False,
    pool: Literal["last", "mean", "none"] = "last",
    vocabulary: PositiveInt | None = None,
    embedding: PositiveInt = 64,
    dropout: Rate = 0.0,
) -> nn.Module:
    """Recurrent network over a sequence (T, D), the rows of an image (C, H, W), or token ids (T,).

    Args:
        cell: the recurrent layer.
        width: features of its hidden state, for each direction.
        depth: layers on top of each other.
        bidirectional: read the sequence in both directions.
        pool: what is read out: the last hidden state, the mean over time, or none: every position has its outputs.
        vocabulary: how many token ids there are; for inputs (T,) only.
        embedding: features of a token's vector.
        dropout: probability of zeroing an output between layers.
    """
    layers = token_layers("rnn", in_shape, vocabulary, embedding)
    if len(in_shape) == 3:
        channels, high, wide = in_shape
        rows = blocks.maker("reshape", shape=[high, channels * wide])
        layers += [blocks.maker("permute", axes=[1, 0, 2]), rows]
    outputs = "last" if pool == "last" else "all"
    rest = {"width": width, "depth": depth, "bidirectional": bidirectional, "dropout": dropout}
    layers.append(blocks.maker(cell, outputs=outputs, **rest))
    return stack(in_shape, out_shape, layers, **readout(pool))


@models.register("transformer")
def transformer(
    in_shape: Shape,
    out_shape: Shape,
    width: PositiveInt = 64,
    depth: PositiveInt = 2,
    heads: PositiveInt = 4,
    expansion: PositiveInt = 4,
    patch: PositiveInt = 4,
    vocabulary: PositiveInt | None = None,
    position: Literal["learned", "sinusoidal", "none"] = "learned",
    pool: Literal["mean", "class_token", "last", "none"] = "mean",
    causal: bool = False,
    activation: Activation = "gelu",
    norm: Norm = "layer",
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
) -> nn.Module:
    """Transformer encoder over a sequence (T, D), the patches of an image (C, H, W), or token ids (T,).

    Norms come first (Xiong et al. 2020, arXiv:2002.04745), and one follows the last layer. With an image and
    pool=class_token, the Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929); with tokens, causal=true and
    pool=none, a GPT.

    Args:
        width: features of a position.
        depth: layers on top of each other.
        heads: attentions side by side; must divide width.
        expansion: hidden features of a layer's two linear maps, per feature of a position.
        patch: height and width of a patch; for images only.
        vocabulary: how many token ids there are; for inputs (T,) only.
        position: how a position is told from others.
        pool: what is read out: the mean, an extra token's vector, the last, or none: every position has its outputs.
        causal: a position sees itself and those before it.
        activation: between a layer's two linear maps.
        norm: of each position.
        dropout: probability of zeroing attention weights, hidden features and each branch.
        dropout_kind: how hidden features and branches are dropped.
    """
    if causal and pool == "class_token":
        raise BuildError(
            "transformer puts the class token first, where it sees nothing when causal; use pool=last"
        )
    layers = token_layers("transformer", in_shape, vocabulary, width)
    if len(in_shape) == 3:
        layers.append(blocks.maker("patch_embedding", patch=patch, width=width))
    elif len(in_shape) == 2:
        layers.append(blocks.maker("linear", width=width, activation=None))
    if pool == "class_token":
        layers.append(blocks.maker("class_token"))
    drop = {"dropout": dropout, "dropout_kind": dropout_kind}
    if position != "none":
        layers.append(blocks.maker("position", position=position, **drop))
    rest = {
        "heads": heads,
        "expansion": expansion,
        "activation": activation,
        "norm": norm,
        "causal": causal,
    }
    layers += [blocks.maker("transformer_encoder", **rest, **drop) for _ in range(depth)]
    layers.append(blocks.maker("norm", norm=norm, features="last"))
    return stack(in_shape, out_shape, layers, **readout(pool))


def token_layers(who: str, in_shape: Shape, vocabulary: int | None, width: int) -> list[Maker]:
    """Return the embedding of token ids (T,), or nothing for (T, D) and (C, H, W). Raises BuildError for the rest."""
    if len(in_shape) not in ((2, 3) if vocabulary is None else (1,)):
        forms = "(T, D) or images (C, H, W), or with a `vocabulary` token ids (T,)"
        raise BuildError(f"{who} expects {forms}, gets {tuple(in_shape)}")
    return (
        []
        if vocabulary is None
        else [blocks.maker("embedding", vocabulary=vocabulary, width=width)]
    )


def readout(pool: str) -> dict[str, str]:
    """Return the head that reads out so, with its setting, as arguments of `stack`."""
    if pool == "none":
        return {"head": "token"}
    return {"head": "class", "pool": "first" if pool == "class_token" else pool}
