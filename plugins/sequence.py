"""Blocks and models for sequences of floats of unequal length.

The convention: a sample is (channels + 1, length), filled up with zeros at the end, and its last channel is the mask:
1 where a frame is real, 0 where it is padding. A block here takes such a sample and gives one, with the channels of the
padding at zero; what it says of the real frames does not depend on how many of padding follow (norms over the batch,
which count them in training, apart). `masked_pool` ends the sequence: (channels + 1, length) -> (features,).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from framework import (
    Activation,
    Block,
    Dropout,
    Fraction,
    NonNegativeInt,
    Norm,
    PositiveFloat,
    PositiveInt,
    Rate,
    Shape,
    blocks,
    heads,
    models,
)
from framework.errors import BuildError
from framework.shapes import chain, expect

FORM = "(C+1, L)"
Pooling = Literal["mean", "max", "statistics", "attention"]


def take_apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the channels (batch, channels, length) and the mask (batch, 1, length), which is 0 or 1."""
    return x[:, :-1], (x[:, -1:] > 0).to(x.dtype)


def put_together(values: Tensor, mask: Tensor) -> Tensor:
    """Return the channels, zero in the padding, with the mask as the last one."""
    return torch.cat([values * mask, mask], dim=1)


def expect_masked(in_shape: Shape, who: str) -> Shape:
    """Return (channels, length) of a sequence with its mask. Raises BuildError for another shape."""
    channels, length = expect(in_shape, FORM, who)
    if channels < 2:
        raise BuildError(f"{who} expects {FORM}, the last channel being the mask; {tuple(in_shape)} has no other")
    return channels - 1, length


@blocks.register("masked")
class Masked(nn.Module):
    """Blocks over the channels (C, L) of a sequence, its mask kept beside them: (C + 1, L) -> (C' + 1, L').

    A frame that is left where the blocks shorten the sequence is real when the frame in its middle was.
    """

    def __init__(self, in_shape: Shape, blocks: list[Block] = ()):
        """Build the blocks and see what they make of the length.

        Args:
            blocks: what the channels go through; they must give (C', L') again, with L' a whole part of L.
        """
        super().__init__()
        channels, length = expect_masked(in_shape, "masked")
        modules, out_shape = chain(blocks, (channels, length))
        self.body = nn.Sequential(*modules)
        self.stride = find_stride(length, expect(out_shape, "blocks that give (C, L)", "masked")[1])

    def forward(self, x: Tensor) -> Tensor:
        values, mask = take_apart(x)
        values = self.body(values * mask)
        return put_together(values, mask[:, :, :: self.stride][:, :, : values.shape[2]])


def find_stride(length: int, shortened: int) -> int:
    """Return the step between frames that makes `shortened`, rounded up or down, of a length."""
    for stride in (-(-length // shortened), length // shortened):
        if stride and shortened in (-(-length // stride), length // stride):
            return stride
    raise BuildError(f"masked cannot follow its mask from {length} frames to {shortened}; pad so that none is lost")


@blocks.register("masked_conv1d")
def masked_conv1d(
    in_shape: Shape,
    channels: PositiveInt = 64,
    kernel_size: PositiveInt = 5,
    stride: PositiveInt = 1,
    dilation: PositiveInt = 1,
    activation: Activation | None = "relu",
    norm: Norm | None = "layer",
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
) -> nn.Module:
    """1-d convolution over a sequence with its mask: (C + 1, L) -> (channels + 1, L / stride, rounded up).

    Args:
        channels: output channels, without the mask.
        kernel_size: taps, an odd number.
        stride: step between output frames.
        dilation: distance of the taps.
        activation: what follows the norm; null for none.
        norm: what follows the convolution; null for none. layer looks at one frame; batch counts padding in training.
        dropout: probability of zeroing an output.
        dropout_kind: how outputs are dropped.
    """
    if kernel_size % 2 == 0:
        raise BuildError(f"masked_conv1d needs an odd kernel_size, with a middle, not {kernel_size}")
    convolution = {"channels": channels, "kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    layers = [blocks.maker("conv1d", **convolution, activation=activation, norm=norm)]
    if dropout > 0:
        layers.append(blocks.maker("dropout", p=dropout, kind=dropout_kind))
    return blocks.build("masked", in_shape, blocks=layers)


@blocks.register("masked_residual")
class MaskedResidual(nn.Module):
    """Skip connection around masked blocks: skip(x) + blocks(x) in the channels, with the mask of the blocks.

    Where the blocks change the channels or the length, the skip is a convolution of size 1, strided.
    """

    def __init__(self, in_shape: Shape, blocks: list[Block] = ()):
        """Build the branch.

        Args:
            blocks: the residual branch, of blocks that keep a mask.
        """
        super().__init__()
        channels, length = expect_masked(in_shape, "masked_residual")
        modules, out_shape = chain(blocks, tuple(in_shape))
        self.body = nn.Sequential(*modules)
        out_channels, out_length = expect_masked(out_shape, "masked_residual around its blocks")
        same, stride = out_channels == channels, find_stride(length, out_length)
        self.skip = nn.Identity() if same and stride == 1 else nn.Conv1d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch, mask = take_apart(self.body(x))
        return put_together(self.skip(x[:, :-1])[:, :, : branch.shape[2]] + branch, mask)


@blocks.register("masked_norm")
class MaskedNorm(nn.Module):
    """(x - mean) / deviation of each channel over the real frames of each sample.

    On features of speech: cepstral mean and variance normalisation by utterance (Viikki & Laurila 1998), which takes
    away what microphone and line add.
    """

    def __init__(self, in_shape: Shape, scale: bool = True, eps: PositiveFloat = 1e-5):
        """Keep the settings.

        Args:
            scale: divide by the deviation; false: take the mean away, no more.
            eps: added to the variance.
        """
        super().__init__()
        expect_masked(in_shape, "masked_norm")
        self.scale, self.eps = scale, eps

    def forward(self, x: Tensor) -> Tensor:
        values, mask = take_apart(x)
        mean, variance = masked_moments(values, mask)
        centred = values - mean
        return put_together(centred * (variance + self.eps).rsqrt() if self.scale else centred, mask)


@blocks.register("masked_batch_norm")
class MaskedBatchNorm(nn.Module):
    """Batch norm (Ioffe & Szegedy 2015, arXiv:1502.03167) over the real frames: padding counts for nothing."""

    def __init__(self, in_shape: Shape, eps: PositiveFloat = 1e-5, momentum: Fraction = 0.1, affine: bool = True):
        """Begin with mean 0 and variance 1.

        Args:
            eps: added to the variance.
            momentum: weight of the newest batch in the running mean and variance, which evaluation uses.
            affine: learn a scale and a shift for each channel.
        """
        super().__init__()
        channels, _ = expect_masked(in_shape, "masked_batch_norm")
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(channels, 1))
        self.register_buffer("running_variance", torch.ones(channels, 1))
        self.scale = nn.Parameter(torch.ones(channels, 1)) if affine else None
        self.shift = nn.Parameter(torch.zeros(channels, 1)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        values, mask = take_apart(x)
        mean, variance = self.running_mean, self.running_variance
        if self.training:
            frames = mask.sum().clamp(min=1)
            mean = (values * mask).sum((0, 2)).unsqueeze(1) / frames
            variance = ((values - mean).square() * mask).sum((0, 2)).unsqueeze(1) / frames
            with torch.no_grad():  # the running variance is the unbiased one, as in torch's batch norm
                unbiased = variance * frames / (frames - 1).clamp(min=1)
                for running, new in ((self.running_mean, mean), (self.running_variance, unbiased)):
                    running.mul_(1 - self.momentum).add_(new, alpha=self.momentum)
        values = (values - mean) * (variance + self.eps).rsqrt()
        return put_together(values if self.scale is None else values * self.scale + self.shift, mask)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel over its real frames, (batch, C, 1); 0 where there is none."""
    frames = mask.sum(2, keepdim=True).clamp(min=1)
    mean = (values * mask).sum(2, keepdim=True) / frames
    return mean, ((values - mean).square() * mask).sum(2, keepdim=True) / frames


@blocks.register("masked_pool")
class MaskedPool(nn.Module):
    """One number or two of each channel, over the real frames: (C + 1, L) -> (C,), or (2C,) for statistics.

    statistics: mean and deviation (Snyder et al. 2018, "X-vectors", section 2); attention: the mean weighted by
    softmax(vᵀ tanh(W x + b)) over time (Okabe et al. 2018, arXiv:1803.10963, section 2.3).
    """

    def __init__(self, in_shape: Shape, pool: Pooling = "mean", width: PositiveInt = 64):
        """Build the attention, where there is one.

        Args:
            pool: what is taken of the frames.
            width: hidden features of the attention.
        """
        super().__init__()
        channels, _ = expect_masked(in_shape, "masked_pool")
        self.pool = pool
        if pool == "attention":
            self.score = nn.Sequential(nn.Conv1d(channels, width, 1), nn.Tanh(), nn.Conv1d(width, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        values, mask = take_apart(x)
        if self.pool == "max":
            return torch.where(mask.amax(2) > 0, values.masked_fill(mask == 0, -torch.inf).amax(2), 0.0)
        if self.pool == "attention":
            score = self.score(values).masked_fill(mask == 0, torch.finfo(values.dtype).min)
            return (score.softmax(2) * values * mask).sum(2)
        mean, variance = masked_moments(values, mask)
        if self.pool == "mean":
            return mean.squeeze(2)
        return torch.cat([mean, (variance + 1e-5).sqrt()], dim=1).squeeze(2)


@blocks.register("masked_transformer")
class MaskedTransformer(nn.Module):
    """One layer of a transformer encoder over the real frames of a sequence: (C + 1, L) -> (C + 1, L).

    Self-attention, then two linear layers, each on its normed input and added to it (Vaswani et al. 2017,
    arXiv:1706.03762; norms first: Xiong et al. 2020, arXiv:2002.04745). No frame looks at padding.
    """

    def __init__(
        self,
        in_shape: Shape,
        heads: PositiveInt | None = None,
        expansion: PositiveInt = 4,
        activation: Activation = "gelu",
        norm: Norm = "layer",
        dropout: Rate = 0.0,
        dropout_kind: Dropout = "dropout",
    ):
        """Build the two branches.

        Args:
            heads: attentions side by side; must divide C. null: as many as 4.
            expansion: hidden features of the two linear layers, per channel.
            activation: between the two linear layers.
            norm: of each frame, before each branch.
            dropout: probability of zeroing attention weights, hidden features and each branch.
            dropout_kind: how hidden features and branches are dropped.
        """
        super().__init__()
        channels, length = expect_masked(in_shape, "masked_transformer")
        heads = heads or math.gcd(channels, 4)
        if channels % heads:
            raise BuildError(f"masked_transformer cannot split {channels} channels into {heads} heads of one size")
        self.heads, self.p = heads, dropout
        self.norm = norm((channels,))
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)
        self.dropout = dropout_kind(dropout) if dropout > 0 else nn.Identity()
        rest = {"activation": activation, "norm": norm, "dropout": dropout, "dropout_kind": dropout_kind}
        self.feed_forward = blocks.build("residual_mlp", (length, channels), width=expansion * channels, **rest)

    def forward(self, x: Tensor) -> Tensor:
        values, mask = take_apart(x)
        frames = values.transpose(1, 2)
        frames = frames + self.dropout(self.attend(self.norm(frames), mask.unsqueeze(2) > 0))
        return put_together(self.feed_forward(frames).transpose(1, 2), mask)

    def attend(self, frames: Tensor, real: Tensor) -> Tensor:
        """Return what each frame gathers; `real` is (batch, 1, 1, L). Where nothing is real, all is looked at."""
        split = self.query_key_value(frames).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        p = self.p if self.training else 0.0
        seen = real | ~real.any(3, keepdim=True)
        mixed = scaled_dot_product_attention(*split.unbind(0), attn_mask=seen, dropout_p=p)
        return self.output(mixed.transpose(1, 2).flatten(2))


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
    stem = blocks.maker("masked_conv1d", channels=width, stride=2 if halvings else 1, activation=activation, norm=norm)
    layers = [*front, *[stem] * max(halvings, 1)]
    if position != "none":
        turn = blocks.maker("permute", axes=[1, 0])
        layers.append(blocks.maker("masked", blocks=[turn, blocks.maker("position", position=position), turn]))
    rest = {"heads": heads, "expansion": expansion, "activation": activation, "norm": norm}
    layers += [blocks.maker("masked_transformer", **rest, **drop) for _ in range(depth)]
    layers.append(blocks.maker("masked", blocks=[blocks.maker("norm", norm=norm)]))
    return read_out(in_shape, out_shape, layers, pool, dropout, dropout_kind)


def read_out(
    in_shape: Shape, out_shape: Shape, layers: list, pool: str, dropout: float, dropout_kind: Dropout
) -> nn.Module:
    """Return the layers with the pooling and a linear head."""
    layers.append(blocks.maker("masked_pool", pool=pool))
    if dropout > 0:
        layers.append(blocks.maker("dropout", p=dropout, kind=dropout_kind))
    return models.build("stack", in_shape, out_shape, blocks=layers, head=heads.maker("class"))
