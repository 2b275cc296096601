"""Common networks, each a stack of registered blocks with a head."""

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
    """Return a stack of `layers` with the head of that name and its settings."""
    head_maker = heads.maker(head, **settings)
    return models.build("stack", in_shape, out_shape, blocks=layers, head=head_maker)


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
        width: features of each hidden layer; a list has one number per layer and replaces depth.
        depth: number of hidden layers, if width is one number.
        activation: after the norm of each hidden layer.
        norm: after each hidden layer; null for none.
        dropout: probability of zeroing a hidden feature.
        dropout_kind: how hidden features are dropped.
    """
    widths = [width] * depth if isinstance(width, int) else width
    layers = []
    if len(in_shape) != 1:
        layers.append(blocks.maker("flatten"))
    for features in widths:
        layer = blocks.maker(
            "linear",
            width=features,
            activation=activation,
            norm=norm,
            dropout=dropout,
            dropout_kind=dropout_kind,
        )
        layers.append(layer)
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
    """Small convolutional network: convolutions that each halve the image, then a hidden layer.

    Inputs are images (C, H, W). Pooling comes before norm and activation, which then process a
    quarter of the values.

    Args:
        channels: output channels of each convolution.
        kernel_size: height and width of the kernels.
        width: features of the hidden layer.
        activation: after each norm, and after the hidden layer.
        norm: after each pooling; null for none.
        pooling: how 2x2 pixels are reduced to one.
        dropout: probability of zeroing a feature of the hidden layer.
        dropout_kind: how hidden features are dropped.
    """
    _, high, wide = shapes.expect(in_shape, "images (C, H, W)", "cnn")
    most = min(high, wide).bit_length() - 1
    if len(channels) > most:
        raise BuildError(
            f"cnn: each of the {len(channels)} `channels` halves the image, but {tuple(in_shape)}"
            f" can be halved only {most} times"
        )
    layers = []
    for count in channels:
        convolution = blocks.maker(
            "conv2d", channels=count, kernel_size=kernel_size, activation=None, bias=norm is None
        )
        layers.append(convolution)
        layers.append(blocks.maker(f"{pooling}_pool"))
        if norm is not None:
            layers.append(blocks.maker("norm", norm=norm))
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
    """Residual network on images (C, H, W); the default is ResNet-20 (He et al. 2016).

    arXiv:1512.03385. ResNet-18: depths=[2,2,2,2] channels=[64,128,256,512] stem=large. ResNet-50:
    block=bottleneck depths=[3,4,6,3] channels=[64,128,256,512] stem=large.

    Args:
        block: basic: two 3x3 convolutions; bottleneck: 1x1, 3x3 and 1x1 convolutions, the last one
            with four times the channels.
        depths: number of blocks of each stage; every stage but the first halves the image.
        channels: channels of each stage.
        stem: small: a 3x3 convolution; large: a 7x7 convolution and pooling, each of which halves
            the image.
        activation: after the norm of each convolution, and after each sum.
        norm: after each convolution; null for none.
        drop_path: stochastic depth: probability of leaving the last block's branch out, for each
            sample; it rises to that in equal steps from block to block (Huang et al. 2016,
            arXiv:1603.09382, equation 4).
    """
    shapes.expect(in_shape, "images (C, H, W)", "resnet")
    if len(depths) != len(channels):
        raise BuildError(
            f"resnet: expected as many depths as channels, got {len(depths)} depths {list(depths)}"
            f" and {len(channels)} channels {list(channels)}"
        )
    rest = {"activation": activation, "norm": norm}
    name = {"basic": "basic_block", "bottleneck": "bottleneck"}[block]
    layers = resnet_stem(stem, channels[0], activation, norm)
    number = 0
    for stage, (depth, count) in enumerate(zip(depths, channels, strict=True)):
        for position in range(depth):
            number += 1
            stride = 2 if stage > 0 and position == 0 else 1
            skipped = drop_path * number / sum(depths)
            layers.append(
                blocks.maker(name, channels=count, stride=stride, drop_path=skipped, **rest)
            )
    return stack(in_shape, out_shape, layers, "class", pool="mean")


def resnet_stem(stem: str, channels: int, activation: Activation, norm: Norm | None) -> list[Maker]:
    """Return the blocks before the first stage."""
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
        depth: number of stacked layers.
        bidirectional: read the sequence in both directions.
        pool: input of the head: the last hidden state, the mean over time, or none: the head is
            applied at every position.
        vocabulary: number of token ids; for inputs (T,) only.
        embedding: features of the vector of a token.
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
    """Transformer encoder over a sequence (T, D), image patches (C, H, W), or token ids (T,).

    Norms come first (Xiong et al. 2020, arXiv:2002.04745), and one follows the last layer. With an
    image and pool=class_token, this is a Vision Transformer (Dosovitskiy et al. 2021,
    arXiv:2010.11929); with tokens, causal=true and pool=none, it is a GPT.

    Args:
        width: features of a position.
        depth: number of stacked layers.
        heads: number of attention heads; must divide width.
        expansion: hidden features of the two linear layers, per feature of a position.
        patch: height and width of a patch; for images only.
        vocabulary: number of token ids; for inputs (T,) only.
        position: kind of position encoding.
        pool: input of the head: the mean, the vector of a class token, the last position, or none:
            the head is applied at every position.
        causal: each position attends only to itself and to earlier positions.
        activation: between the two linear layers.
        norm: normalization of each position.
        dropout: probability of zeroing attention weights, hidden features and each branch.
        dropout_kind: how hidden features and branches are dropped.
    """
    if causal and pool == "class_token":
        raise BuildError(
            "transformer: pool=class_token has no effect with causal=true, since the class token is"
            " first and attends only to itself; use pool=last"
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
    layer = blocks.maker(
        "transformer_encoder",
        heads=heads,
        expansion=expansion,
        activation=activation,
        norm=norm,
        causal=causal,
        **drop,
    )
    layers += [layer] * depth
    layers.append(blocks.maker("norm", norm=norm, features="last"))
    return stack(in_shape, out_shape, layers, **readout(pool))


def token_layers(name: str, in_shape: Shape, vocabulary: int | None, width: int) -> list[Maker]:
    """Return the embedding of token ids (T,), or no block for (T, D) and (C, H, W).

    Raises:
        BuildError: the shape is another one.
    """
    ranks = (2, 3) if vocabulary is None else (1,)
    if len(in_shape) not in ranks:
        forms = "(T, D) or images (C, H, W), or with a `vocabulary` token ids (T,)"
        raise shapes.shape_error(name, forms, in_shape)
    if vocabulary is None:
        return []
    return [blocks.maker("embedding", vocabulary=vocabulary, width=width)]


def readout(pool: str) -> dict[str, str]:
    """Return the head for `pool` and its setting, as arguments of `stack`."""
    if pool == "none":
        return {"head": "token"}
    return {"head": "class", "pool": "first" if pool == "class_token" else pool}
