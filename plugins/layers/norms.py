"""Norms, for features (D,), the last axis of (..., D), and for channels-first (C, L), (C, H, W) and (C, D, H, W).

One that has no meaning for a shape raises BuildError. All have a scale and a shift for each channel (`affine`).
"""

from torch import Tensor, nn

from framework import BuildError, DataError, Fraction, PositiveFloat, PositiveInt, Shape, norms

BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
INSTANCE = {2: nn.InstanceNorm1d, 3: nn.InstanceNorm2d, 4: nn.InstanceNorm3d}


@norms.register("batch", aliases=["batch_norm"])
def batch(
    in_shape: Shape, eps: PositiveFloat = 1e-5, momentum: Fraction | None = 0.1, affine: bool = True
) -> nn.Module:
    """Normalise each channel over the batch and its positions (Ioffe & Szegedy 2015, arXiv:1502.03167).

    Args:
        eps: added to the variance.
        momentum: weight of the newest batch in the running mean and variance; null averages over all batches.
        affine: learn a scale and a shift for each channel.
    """
    check_rank(in_shape, "batch")
    return BATCH.get(len(in_shape), FeatureBatchNorm)(in_shape[0], eps, momentum, affine)


@norms.register("layer", aliases=["layer_norm"])
def layer(
    in_shape: Shape, eps: PositiveFloat = 1e-5, affine: bool = True, bias: bool = True
) -> nn.Module:
    """Normalise over the channels, at each position by itself (Ba et al. 2016, arXiv:1607.06450).

    For channels-first shapes this is ConvNeXt's variant (Liu et al. 2022, arXiv:2201.03545, section 2.6); for one mean
    over channels and positions together use `group` with groups=1.

    Args:
        eps: added to the variance.
        affine: learn a scale and a shift for each channel.
        bias: with the shift; false leaves the scale alone.
    """
    check_rank(in_shape, "layer")
    check_several(in_shape, "layer")
    return ChannelsLast.when(in_shape, nn.LayerNorm(in_shape[0], eps, affine, bias))


@norms.register("rms", aliases=["rms_norm"])
def rms(in_shape: Shape, eps: PositiveFloat | None = None, affine: bool = True) -> nn.Module:
    """Divide by the root mean square over the channels, at each position (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        eps: added to the mean square; null is the smallest step of the input's type.
        affine: learn a scale for each channel.
    """
    check_rank(in_shape, "rms")
    check_several(in_shape, "rms")
    return ChannelsLast.when(in_shape, nn.RMSNorm(in_shape[0], eps, affine))


@norms.register("group", aliases=["group_norm"])
def group(
    in_shape: Shape,
    groups: PositiveInt | None = None,
    eps: PositiveFloat = 1e-5,
    affine: bool = True,
) -> nn.Module:
    """Normalise over each group of channels and all its positions (Wu & He 2018, arXiv:1803.08494).

    Args:
        groups: how many; must divide the channels. null: as many as 32, with 4 or more channels each.
        eps: added to the variance.
        affine: learn a scale and a shift for each channel.
    """
    check_rank(in_shape, "group")
    channels = in_shape[0]
    groups = groups or default_groups(channels)
    if channels % groups:
        divisors = ", ".join(str(n) for n in range(1, channels + 1) if channels % n == 0)
        raise BuildError(
            f"{groups} groups do not divide {channels} channels of in_shape {in_shape}; use one of {divisors}"
        )
    if len(in_shape) > 1:
        return nn.GroupNorm(groups, channels, eps, affine)
    check_several((channels // groups,), "group")
    return FeatureGroupNorm(groups, channels, eps, affine)


@norms.register("instance", aliases=["instance_norm"])
def instance(in_shape: Shape, eps: PositiveFloat = 1e-5, affine: bool = True) -> nn.Module:
    """Normalise each channel of each sample over its positions (Ulyanov et al. 2016, arXiv:1607.08022).

    Args:
        eps: added to the variance.
        affine: learn a scale and a shift for each channel.
    """
    check_rank(in_shape, "instance")
    if len(in_shape) == 1:
        raise BuildError(
            f"instance norm averages over positions; in_shape {in_shape} has none. Use layer, rms or batch"
        )
    return INSTANCE[len(in_shape)](in_shape[0], eps, affine=affine)


class ChannelsLast(nn.Module):
    """Applies a norm of the last axis to the channel axis of (N, C, ...)."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    @classmethod
    def when(cls, in_shape: Shape, norm: nn.Module) -> nn.Module:
        """Wrap the norm for channels-first shapes only."""
        return norm if len(in_shape) == 1 else cls(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class FeatureBatchNorm(nn.BatchNorm1d):
    """Batch norm of the last axis, over all others. Raises DataError for a training batch of one row."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.training and len(rows) == 1:
            raise DataError(
                "batch norm needs 2 or more rows in a training batch, this one has 1; leave out a last small batch "
                "(drop_last), choose another batch_size, or use layer norm"
            )
        return super().forward(rows).reshape(x.shape)


class FeatureGroupNorm(nn.GroupNorm):
    """Group norm of the last axis, each row by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def default_groups(channels: int) -> int:
    """The largest divisor of the channels up to 32 that leaves 4 or more in a group; 1 when there is none."""
    return max(n for n in range(1, 33) if n == 1 or (channels % n == 0 and channels // n >= 4))


def check_rank(in_shape: Shape, name: str) -> None:
    if not 1 <= len(in_shape) <= 4:
        raise BuildError(
            f"{name} norm takes (D,), (C, L), (C, H, W) or (C, D, H, W), not in_shape {tuple(in_shape)}"
        )


def check_several(in_shape: Shape, name: str) -> None:
    """Raise BuildError for a single channel: centred on itself, it would be zero whatever the input."""
    if in_shape[0] == 1:
        raise BuildError(
            f"{name} norm over a single channel leaves at most the sign of the input; use batch or no norm"
        )
