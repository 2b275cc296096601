"""Blocks for sequences of floats of unequal length (the models made of them are in `models/sequence.py`).

The convention: a sample is (channels + 1, length), filled up with zeros at the end, and its last channel is the mask:
1 where a frame is real, 0 where it is padding. A block here takes such a sample and gives one, with the channels of the
padding at zero; what it says of the real frames does not depend on how many of padding follow (norms over the batch,
which count them in training, apart). `masked_pool` ends the sequence: (channels + 1, length) -> (features,).

For 2-d convolutions `as_picture` makes a picture of a sequence, (maps + 1, bands, length), its last map being the mask,
and `as_sequence` a sequence of a picture.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from framework import (
    Activation,
    Block,
    BuildError,
    Dropout,
    Fraction,
    Norm,
    PositiveFloat,
    PositiveInt,
    Rate,
    Shape,
    blocks,
    shapes,
)

FORM, PICTURE = "(C+1, L)", "(C+1, H, L)"
Pooling = Literal["mean", "max", "statistics", "attention"]


def take_apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the channels (batch, channels, ..., length) and the mask (batch, 1, ..., length), which is 0 or 1."""
    return x[:, :-1], (x[:, -1:] > 0).to(x.dtype)


def put_together(values: Tensor, mask: Tensor) -> Tensor:
    """Return the channels, zero in the padding, with the mask as the last one."""
    return torch.cat([values * mask, mask], dim=1)


def expect_masked(in_shape: Shape, who: str, forms: str = FORM) -> Shape:
    """Return the shape of a sample without its mask. Raises BuildError for another shape than `forms` allow."""
    channels, *axes = shapes.expect(in_shape, forms, who)
    if channels < 2:
        raise BuildError(
            f"{who} expects {forms}, the last channel being the mask; {tuple(in_shape)} has no other"
        )
    return channels - 1, *axes


@blocks.register("masked")
class Masked(nn.Module):
    """Blocks over the channels of a sequence or picture, its mask kept beside them: (C + 1, L) -> (C' + 1, L').

    What is left where the blocks shorten an axis is real when what was in its middle was.
    """

    def __init__(self, in_shape: Shape, blocks: list[Block] = ()):
        """Build the blocks and see what they make of the axes.

        Args:
            blocks: what the channels go through, (C, L) or (C, H, L); they must give as many axes again, each a whole
                part of what it was.
        """
        super().__init__()
        channels, *axes = expect_masked(in_shape, "masked", f"{FORM} or {PICTURE}")
        modules, out_shape = shapes.build_chain(blocks, (channels, *axes))
        self.body = nn.Sequential(*modules)
        form = f"blocks that give ({', '.join('CHL' if len(axes) == 2 else 'CL')})"
        self.strides = find_strides(axes, shapes.expect(out_shape, form, "masked")[1:])

    def forward(self, x: Tensor) -> Tensor:
        values, mask = take_apart(x)
        values = self.body(values * mask)
        return put_together(values, thinned(mask, self.strides, values.shape))


def find_strides(axes: Sequence[int], shortened: Sequence[int]) -> list[int]:
    return [find_stride(*pair) for pair in zip(axes, shortened, strict=True)]


def thinned(x: Tensor, strides: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return each so many-th position of every axis, as many as `size` says."""
    return x[
        :, :, *(slice(0, end * step, step) for end, step in zip(size[2:], strides, strict=True))
    ]


def find_stride(length: int, shortened: int) -> int:
    """Return the step between frames that makes `shortened`, rounded up or down, of a length."""
    for stride in (-(-length // shortened), length // shortened):
        if stride and shortened in (-(-length // stride), length // stride):
            return stride
    raise BuildError(
        f"masked cannot follow its mask from {length} frames to {shortened}; pad so that none is lost"
    )


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
    settings = {
        "channels": channels,
        "kernel_size": kernel_size,
        "stride": stride,
        "dilation": dilation,
    }
    settings |= {"activation": activation, "norm": norm}
    return masked_convolution("conv1d", in_shape, settings, dropout, dropout_kind)


def masked_convolution(
    name: str, in_shape: Shape, settings: dict[str, Any], dropout: float, dropout_kind: Dropout
) -> nn.Module:
    """Return the convolution of that name within `masked`, and a dropout after it."""
    if settings["kernel_size"] % 2 == 0:
        raise BuildError(
            f"masked_{name} needs an odd kernel_size, with a middle, not {settings['kernel_size']}"
        )
    layers = [blocks.maker(name, **settings)]
    if dropout > 0:
        layers.append(blocks.maker("dropout", p=dropout, kind=dropout_kind))
    return blocks.build("masked", in_shape, blocks=layers)


@blocks.register("masked_conv2d")
def masked_conv2d(
    in_shape: Shape,
    channels: PositiveInt = 32,
    kernel_size: PositiveInt = 3,
    stride: PositiveInt = 1,
    activation: Activation | None = "relu",
    norm: Norm | None = "layer",
    dropout: Rate = 0.0,
    dropout_kind: Dropout = "dropout",
) -> nn.Module:
    """2-d convolution over a picture with its mask: (C + 1, H, L) -> (channels + 1, H / stride, L / stride).

    Args:
        channels: output channels, without the mask.
        kernel_size: height and width of the kernel, an odd number.
        stride: step between outputs in both directions; what does not divide is rounded up.
        activation: what follows the norm; null for none.
        norm: what follows the convolution; null for none. layer looks at one place; batch counts padding in training.
        dropout: probability of zeroing an output.
        dropout_kind: how outputs are dropped.
    """
    expect_masked(in_shape, "masked_conv2d", PICTURE)
    settings = {"channels": channels, "kernel_size": kernel_size, "stride": stride}
    settings |= {"activation": activation, "norm": norm}
    return masked_convolution("conv2d", in_shape, settings, dropout, dropout_kind)


@blocks.register("as_picture")
class AsPicture(nn.Module):
    """A sequence as a picture of one map, its channels being the rows: (C + 1, L) -> (1 + 1, C, L)."""

    def __init__(self, in_shape: Shape):
        super().__init__()
        expect_masked(in_shape, "as_picture")

    def forward(self, x: Tensor) -> Tensor:
        values, mask = take_apart(x)
        return torch.stack([values * mask, mask.expand_as(values)], dim=1)


@blocks.register("as_sequence")
class AsSequence(nn.Module):
    """A picture as a sequence of its columns: (C + 1, H, L) -> (C · H + 1, L)."""

    def __init__(self, in_shape: Shape):
        super().__init__()
        expect_masked(in_shape, "as_sequence", PICTURE)

    def forward(self, x: Tensor) -> Tensor:
        values, mask = take_apart(x)
        return put_together((values * mask).flatten(1, 2), mask.amax(2))


@blocks.register("masked_residual")
class MaskedResidual(nn.Module):
    """Skip connection around masked blocks: skip(x) + blocks(x) in the channels, with the mask of the blocks.

    Where the blocks change the channels or an axis, the skip is a convolution of size 1, strided.
    """

    def __init__(self, in_shape: Shape, blocks: list[Block] = ()):
        """Build the branch.

        Args:
            blocks: the residual branch, of blocks that keep a mask.
        """
        super().__init__()
        channels, *axes = expect_masked(in_shape, "masked_residual", f"{FORM} or {PICTURE}")
        modules, out_shape = shapes.build_chain(blocks, tuple(in_shape))
        self.body = nn.Sequential(*modules)
        form = PICTURE if len(axes) == 2 else FORM
        out_channels, *shortened = expect_masked(
            out_shape, "masked_residual around its blocks", form
        )
        strides = find_strides(axes, shortened)
        same = out_channels == channels and set(strides) == {1}
        layer = nn.Conv2d if len(axes) == 2 else nn.Conv1d
        self.skip = nn.Identity() if same else layer(channels, out_channels, 1, strides, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch, mask = take_apart(self.body(x))
        skip = self.skip(x[:, :-1])
        return put_together(thinned(skip, [1] * (x.ndim - 2), branch.shape) + branch, mask)


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
        return put_together(
            centred * (variance + self.eps).rsqrt() if self.scale else centred, mask
        )


@blocks.register("masked_batch_norm")
class MaskedBatchNorm(nn.Module):
    """Batch norm (Ioffe & Szegedy 2015, arXiv:1502.03167) over the real frames: padding counts for nothing."""

    def __init__(
        self,
        in_shape: Shape,
        eps: PositiveFloat = 1e-5,
        momentum: Fraction = 0.1,
        affine: bool = True,
    ):
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
            with (
                torch.no_grad()
            ):  # the running variance is the unbiased one, as in torch's batch norm
                unbiased = variance * frames / (frames - 1).clamp(min=1)
                for running, new in ((self.running_mean, mean), (self.running_variance, unbiased)):
                    running.mul_(1 - self.momentum).add_(new, alpha=self.momentum)
        values = (values - mean) * (variance + self.eps).rsqrt()
        return put_together(
            values if self.scale is None else values * self.scale + self.shift, mask
        )


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
            self.score = nn.Sequential(
                nn.Conv1d(channels, width, 1), nn.Tanh(), nn.Conv1d(width, 1, 1, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        values, mask = take_apart(x)
        if self.pool == "max":
            return torch.where(
                mask.amax(2) > 0, values.masked_fill(mask == 0, -torch.inf).amax(2), 0.0
            )
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
            raise BuildError(
                f"masked_transformer cannot split {channels} channels into {heads} heads of one size"
            )
        self.heads, self.p = heads, dropout
        self.norm = norm((channels,))
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)
        self.dropout = dropout_kind(dropout) if dropout > 0 else nn.Identity()
        rest = {
            "activation": activation,
            "norm": norm,
            "dropout": dropout,
            "dropout_kind": dropout_kind,
        }
        self.feed_forward = blocks.build(
            "residual_mlp", (length, channels), width=expansion * channels, **rest
        )

    def forward(self, x: Tensor) -> Tensor:
        values, mask = take_apart(x)
        frames = values.transpose(1, 2)
        frames = frames + self.dropout(self.attend(self.norm(frames), mask.unsqueeze(2) > 0))
        return put_together(self.feed_forward(frames).transpose(1, 2), mask)

    def attend(self, frames: Tensor, real: Tensor) -> Tensor:
        """Return what each frame gathers; `real` is (batch, 1, 1, L). Where nothing is real, all is looked at."""
        split = (
            self.query_key_value(frames).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        p = self.p if self.training else 0.0
        seen = real | ~real.any(3, keepdim=True)
        mixed = scaled_dot_product_attention(*split.unbind(0), attn_mask=seen, dropout_p=p)
        return self.output(mixed.transpose(1, 2).flatten(2))
