"""Blocks for sequences of floats of unequal length (`models/sequence.py` has models of them).

A sample is (channels + 1, length), zero-padded at the end. Its last channel is the mask: 1 for a
real frame, 0 for padding. Each block maps such a sample to another one with channels of zero in
the padding. Its output for the real frames does not depend on the amount of padding (except for
norms over the batch that count padding in training). `masked_pool` ends the sequence:
(channels + 1, length) -> (features,).

For 2-d convolutions, `as_picture` turns a sequence into an image (maps + 1, bands, length), the
last map being the mask, and `as_sequence` turns an image into a sequence.
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
from framework_plugins.sequence_helpers import check_heads, dropout_or_identity

FORM = "(C+1, L)"
PICTURE = "(C+1, H, L)"
Pooling = Literal["mean", "max", "statistics", "attention"]


def split_mask(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the channels (batch, C, ..., length) and the 0/1 mask (batch, 1, ..., length)."""
    return x[:, :-1], (x[:, -1:] > 0).to(x.dtype)


def join_mask(values: Tensor, mask: Tensor) -> Tensor:
    """Return the channels, zeroed in the padding, with the mask as the last channel."""
    return torch.cat([values * mask, mask], dim=1)


def expect_masked(in_shape: Shape, name: str, forms: str = FORM) -> Shape:
    """Return the shape of a sample without its mask.

    Raises:
        BuildError: the shape has none of the `forms`, or no channel besides the mask.
    """
    channels, *axes = shapes.expect(in_shape, forms, name)
    if channels < 2:
        raise BuildError(
            f"{name} expects {forms} with the mask as last channel, got {tuple(in_shape)}, "
            "which is the mask only"
        )
    return channels - 1, *axes


@blocks.register("masked")
class Masked(nn.Module):
    """Apply blocks to the channels of a sequence or image with a mask: (C + 1, L) -> (C' + 1, L').

    If the blocks shorten an axis, the mask is subsampled with the same stride.

    Args:
        blocks: blocks for the channels (C, L) or (C, H, L); they must keep the number of axes,
            and shorten an axis by an integer factor only.
    """

    def __init__(self, in_shape: Shape, blocks: list[Block] = ()):
        super().__init__()
        channels, *axes = expect_masked(in_shape, "masked", f"{FORM} or {PICTURE}")
        modules, out_shape = shapes.build_chain(blocks, (channels, *axes))
        self.body = nn.Sequential(*modules)
        letters = "CHL" if len(axes) == 2 else "CL"
        form = f"blocks that give ({', '.join(letters)})"
        self.strides = find_strides(axes, shapes.expect(out_shape, form, "masked")[1:])

    def forward(self, x: Tensor) -> Tensor:
        values, mask = split_mask(x)
        values = self.body(values * mask)
        return join_mask(values, subsample(mask, self.strides, values.shape))


def find_strides(axes: Sequence[int], shortened: Sequence[int]) -> list[int]:
    """Return the stride of each axis."""
    return [find_stride(*pair) for pair in zip(axes, shortened, strict=True)]


def find_stride(length: int, shortened: int) -> int:
    """Return the stride that turns `length` into `shortened`, rounded up or down."""
    for stride in (math.ceil(length / shortened), length // shortened):
        if stride and shortened in (math.ceil(length / stride), length // stride):
            return stride
    raise BuildError(
        f"masked: expected a block with padding that keeps all frames: no stride reduces {length} "
        f"frames to {shortened}"
    )


def subsample(x: Tensor, strides: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return every stride-th position of each axis after the second, `size` in number."""
    for axis, stride in enumerate(strides, 2):
        index = [slice(None)] * axis
        index.append(slice(0, size[axis] * stride, stride))
        x = x[tuple(index)]
    return x


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
    """1-d convolution over a sequence with a mask: (C + 1, L) -> (channels + 1, L / stride).

    L / stride is rounded up.

    Args:
        channels: output channels, without the mask.
        kernel_size: length of the kernel, an odd number.
        stride: step between output frames.
        dilation: distance between kernel elements.
        activation: after the norm; null for none.
        norm: after the convolution; null for none. layer normalizes each frame; batch counts
            padding in training.
        dropout: probability of zeroing an output.
        dropout_kind: how outputs are dropped.
    """
    settings = {
        "channels": channels,
        "kernel_size": kernel_size,
        "stride": stride,
        "dilation": dilation,
        "activation": activation,
        "norm": norm,
    }
    return masked_convolution("conv1d", in_shape, settings, dropout, dropout_kind)


def masked_convolution(
    name: str, in_shape: Shape, settings: dict[str, Any], dropout: float, dropout_kind: Dropout
) -> nn.Module:
    """Return the convolution `name` and a dropout within `masked`."""
    kernel_size = settings["kernel_size"]
    if kernel_size % 2 == 0:
        raise BuildError(f"masked_{name}: kernel_size={kernel_size}: expected an odd number")
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
    """2-d convolution over an image with a mask: (C + 1, H, L) -> (channels + 1, H', L').

    H' is H / stride and L' is L / stride, rounded up.

    Args:
        channels: output channels, without the mask.
        kernel_size: height and width of the kernel, an odd number.
        stride: step between outputs in both directions.
        activation: after the norm; null for none.
        norm: after the convolution; null for none. layer normalizes each position; batch counts
            padding in training.
        dropout: probability of zeroing an output.
        dropout_kind: how outputs are dropped.
    """
    expect_masked(in_shape, "masked_conv2d", PICTURE)
    settings = {
        "channels": channels,
        "kernel_size": kernel_size,
        "stride": stride,
        "activation": activation,
        "norm": norm,
    }
    return masked_convolution("conv2d", in_shape, settings, dropout, dropout_kind)


@blocks.register("as_picture")
class AsPicture(nn.Module):
    """Turn a sequence into an image of one map, a row per channel: (C + 1, L) -> (1 + 1, C, L)."""

    def __init__(self, in_shape: Shape):
        super().__init__()
        expect_masked(in_shape, "as_picture")

    def forward(self, x: Tensor) -> Tensor:
        values, mask = split_mask(x)
        return torch.stack([values * mask, mask.expand_as(values)], dim=1)


@blocks.register("as_sequence")
class AsSequence(nn.Module):
    """Turn an image into a sequence of its columns: (C + 1, H, L) -> (C · H + 1, L)."""

    def __init__(self, in_shape: Shape):
        super().__init__()
        expect_masked(in_shape, "as_sequence", PICTURE)

    def forward(self, x: Tensor) -> Tensor:
        values, mask = split_mask(x)
        return join_mask((values * mask).flatten(1, 2), mask.amax(2))


@blocks.register("masked_residual")
class MaskedResidual(nn.Module):
    """Skip connection around masked blocks: skip(x) + blocks(x), with the mask of the blocks.

    If the blocks change the channels or an axis, the skip is a strided convolution of size 1.

    Args:
        blocks: the residual branch: blocks that keep the mask, such as masked_conv1d.
    """

    def __init__(self, in_shape: Shape, blocks: list[Block] = ()):
        super().__init__()
        channels, *axes = expect_masked(in_shape, "masked_residual", f"{FORM} or {PICTURE}")
        modules, out_shape = shapes.build_chain(blocks, tuple(in_shape))
        self.body = nn.Sequential(*modules)
        form = PICTURE if len(axes) == 2 else FORM
        out_channels, *shortened = expect_masked(
            out_shape, "masked_residual around its blocks", form
        )
        strides = find_strides(axes, shortened)
        self.skip: nn.Module = nn.Identity()
        if out_channels != channels or set(strides) != {1}:
            layer: type[nn.Module] = nn.Conv2d if len(axes) == 2 else nn.Conv1d
            self.skip = layer(channels, out_channels, 1, strides, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch, mask = split_mask(self.body(x))
        skip = self.skip(x[:, :-1])
        skip = subsample(skip, [1] * (x.ndim - 2), branch.shape)
        return join_mask(skip + branch, mask)


@blocks.register("masked_norm")
class MaskedNorm(nn.Module):
    """(x - mean) / standard deviation of each channel over the real frames of each sample.

    For speech features this is cepstral mean and variance normalization per utterance (Viikki &
    Laurila 1998), which removes the effect of microphone and line.

    Args:
        scale: divide by the standard deviation; false: only subtract the mean.
        eps: added to the variance.
    """

    def __init__(self, in_shape: Shape, scale: bool = True, eps: PositiveFloat = 1e-5):
        super().__init__()
        expect_masked(in_shape, "masked_norm")
        self.scale = scale
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        values, mask = split_mask(x)
        mean, variance = masked_moments(values, mask)
        values = values - mean
        if self.scale:
            values = values * (variance + self.eps).rsqrt()
        return join_mask(values, mask)


@blocks.register("masked_batch_norm")
class MaskedBatchNorm(nn.Module):
    """Batch norm over the real frames; padding does not count.

    Ioffe & Szegedy 2015, arXiv:1502.03167.

    Args:
        eps: added to the variance.
        momentum: weight of the newest batch in the running mean and variance, which are used
            in evaluation.
        affine: learn a scale and a shift for each channel.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(
        self,
        in_shape: Shape,
        eps: PositiveFloat = 1e-5,
        momentum: Fraction = 0.1,
        affine: bool = True,
    ):
        super().__init__()
        channels, _ = expect_masked(in_shape, "masked_batch_norm")
        self.eps = eps
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(channels, 1))
        self.register_buffer("running_variance", torch.ones(channels, 1))
        self.scale = nn.Parameter(torch.ones(channels, 1)) if affine else None
        self.shift = nn.Parameter(torch.zeros(channels, 1)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        values, mask = split_mask(x)
        mean = self.running_mean
        variance = self.running_variance
        if self.training:
            frames = self.sum_over_batch(mask.sum()).clamp(min=1)
            total = self.sum_over_batch((values * mask).sum((0, 2)))
            mean = total.unsqueeze(1) / frames
            squares = self.sum_over_batch(((values - mean).square() * mask).sum((0, 2)))
            variance = squares.unsqueeze(1) / frames
            self.update_running(mean, variance, frames)
        values = (values - mean) * (variance + self.eps).rsqrt()
        if self.scale is not None and self.shift is not None:
            values = values * self.scale + self.shift
        return join_mask(values, mask)

    def sum_over_batch(self, sums: Tensor) -> Tensor:
        """Return the argument; see `BatchStatistics` for several processes."""
        return sums

    @torch.no_grad()
    def update_running(self, mean: Tensor, variance: Tensor, frames: Tensor) -> None:
        """Update the running mean and the running unbiased variance, as torch's batch norm does."""
        unbiased = variance * frames / (frames - 1).clamp(min=1)
        self.running_mean.mul_(1 - self.momentum).add_(mean, alpha=self.momentum)
        self.running_variance.mul_(1 - self.momentum).add_(unbiased, alpha=self.momentum)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel over its real frames, (batch, C, 1), else 0."""
    frames = mask.sum(2, keepdim=True).clamp(min=1)
    mean = (values * mask).sum(2, keepdim=True) / frames
    variance = ((values - mean).square() * mask).sum(2, keepdim=True) / frames
    return mean, variance


@blocks.register("masked_pool")
class MaskedPool(nn.Module):
    """Pool each channel over the real frames: (C + 1, L) -> (C,), or (2C,) for statistics.

    statistics: mean and standard deviation (Snyder et al. 2018, "X-vectors", section 2). attention:
    the mean weighted by softmax(vᵀ tanh(W x + b)) over time (Okabe et al. 2018, arXiv:1803.10963,
    section 2.3).

    Args:
        pool: the kind of pooling.
        width: hidden features of the attention.
    """

    def __init__(self, in_shape: Shape, pool: Pooling = "mean", width: PositiveInt = 64):
        super().__init__()
        channels, _ = expect_masked(in_shape, "masked_pool")
        self.pool = pool
        if pool == "attention":
            self.score = nn.Sequential(
                nn.Conv1d(channels, width, 1), nn.Tanh(), nn.Conv1d(width, 1, 1, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        values, mask = split_mask(x)
        if self.pool == "max":
            highest = values.masked_fill(mask == 0, -torch.inf).amax(2)
            return torch.where(mask.amax(2) > 0, highest, 0.0)
        if self.pool == "attention":
            score = self.score(values).masked_fill(mask == 0, torch.finfo(values.dtype).min)
            return (score.softmax(2) * values * mask).sum(2)
        mean, variance = masked_moments(values, mask)
        if self.pool == "mean":
            return mean.squeeze(2)
        return torch.cat([mean, (variance + 1e-5).sqrt()], dim=1).squeeze(2)


@blocks.register("masked_transformer")
class MaskedTransformer(nn.Module):
    """One layer of a transformer encoder over the real frames: (C + 1, L) -> (C + 1, L).

    Self-attention, then two linear layers, each as x + branch(norm(x)) (Vaswani et al. 2017,
    arXiv:1706.03762; norms first: Xiong et al. 2020, arXiv:2002.04745). Padding is masked.

    Args:
        heads: number of attention heads; must divide C. null: the greatest common divisor of
            C and 4.
        expansion: hidden features of the two linear layers, per channel.
        activation: between the two linear layers.
        norm: normalization of each frame before each branch.
        dropout: probability of zeroing attention weights, hidden features and each branch.
        dropout_kind: how hidden features and branches are dropped.
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
        super().__init__()
        channels, length = expect_masked(in_shape, "masked_transformer")
        heads = heads or math.gcd(channels, 4)
        check_heads(channels, heads, "masked_transformer")
        self.heads = heads
        self.p = dropout
        self.norm = norm((channels,))
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)
        self.dropout = dropout_or_identity(dropout_kind, dropout)
        self.feed_forward = blocks.build(
            "residual_mlp",
            (length, channels),
            width=expansion * channels,
            activation=activation,
            norm=norm,
            dropout=dropout,
            dropout_kind=dropout_kind,
        )

    def forward(self, x: Tensor) -> Tensor:
        values, mask = split_mask(x)
        frames = values.transpose(1, 2)
        frames = frames + self.dropout(self.attend(self.norm(frames), mask.unsqueeze(2) > 0))
        return join_mask(self.feed_forward(frames).transpose(1, 2), mask)

    def attend(self, frames: Tensor, real: Tensor) -> Tensor:
        """Return the attention output of each frame; `real` is (batch, 1, 1, L).

        A sample without real frames attends to its padding, since softmax over nothing is NaN.
        """
        projected = self.query_key_value(frames).unflatten(2, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
        p = self.p if self.training else 0.0
        visible = real | ~real.any(3, keepdim=True)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=p)
        return self.output(mixed.transpose(1, 2).flatten(2))
