"""Norms for features (D,) and for channels-first (C, L), (C, H, W) and (C, D, H, W).

For features, a norm acts on the last axis of (..., D). A norm that is not defined for a shape
raises BuildError. `affine` adds a learned scale and shift for each channel.
"""

from torch import Tensor, nn

from framework import BuildError, DataError, Fraction, PositiveFloat, PositiveInt, Shape, norms

BATCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
INSTANCE = {2: nn.InstanceNorm1d, 3: nn.InstanceNorm2d, 4: nn.InstanceNorm3d}


@norms.register("batch", aliases=["batch_norm"])
def batch(
    in_shape: Shape, eps: PositiveFloat = 1e-5, momentum: Fraction | None = 0.1, affine: bool = True
) -> nn.Module:
    """Normalize each channel over batch and positions (Ioffe & Szegedy 2015, arXiv:1502.03167).

    Args:
        eps: added to the variance.
        momentum: weight of the newest batch in the running mean and variance; null: average over
            all batches.
        affine: learn a scale and a shift for each channel.
    """
    check_rank(in_shape, "batch")
    return BATCH.get(len(in_shape), FeatureBatchNorm)(in_shape[0], eps, momentum, affine)


@norms.register("layer", aliases=["layer_norm"])
def layer(
    in_shape: Shape, eps: PositiveFloat = 1e-5, affine: bool = True, bias: bool = True
) -> nn.Module:
    """Normalize over the channels at each position (Ba et al. 2016, arXiv:1607.06450).

    For channels-first shapes this is the variant of ConvNeXt (Liu et al. 2022, arXiv:2201.03545,
    section 2.6). For a mean over channels and positions together, use `group` with groups=1.

    Args:
        eps: added to the variance.
        affine: learn a scale and a shift for each channel.
        bias: learn a shift; false: only a scale.
    """
    check_rank(in_shape, "layer")
    check_several(in_shape, "layer")
    return ChannelsLast.when(in_shape, nn.LayerNorm(in_shape[0], eps, affine, bias))


@norms.register("rms", aliases=["rms_norm"])
def rms(in_shape: Shape, eps: PositiveFloat | None = None, affine: bool = True) -> nn.Module:
    """Divide by the root mean square over the channels at each position.

    Zhang & Sennrich 2019, arXiv:1910.07467.

    Args:
        eps: added to the mean square; null: the machine epsilon of the data type.
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
    """Normalize over each group of channels and all positions (Wu & He 2018, arXiv:1803.08494).

    Args:
        groups: number of groups; must divide the channels. null: at most 32, with at least 4
            channels each.
        eps: added to the variance.
        affine: learn a scale and a shift for each channel.
    """
    check_rank(in_shape, "group")
    channels = in_shape[0]
    groups = groups or default_groups(channels)
    if channels % groups:
        divisors = ", ".join(str(n) for n in range(1, channels + 1) if channels % n == 0)
        raise BuildError(
            f"group norm: groups={groups} does not divide the {channels} channels of in_shape"
            f" {in_shape}; use one of {divisors}"
        )
    if len(in_shape) > 1:
        return nn.GroupNorm(groups, channels, eps, affine)
    check_several((channels // groups,), "group")
    return FeatureGroupNorm(groups, channels, eps, affine)


@norms.register("instance", aliases=["instance_norm"])
def instance(in_shape: Shape, eps: PositiveFloat = 1e-5, affine: bool = True) -> nn.Module:
    """Normalize each channel of each sample over its positions.

    Ulyanov et al. 2016, arXiv:1607.08022.

    Args:
        eps: added to the variance.
        affine: learn a scale and a shift for each channel.
    """
    check_rank(in_shape, "instance")
    if len(in_shape) == 1:
        raise BuildError(
            f"instance norm averages over positions, but in_shape {in_shape} has none;"
            " use layer, rms or batch"
        )
    return INSTANCE[len(in_shape)](in_shape[0], eps, affine=affine)


class ChannelsLast(nn.Module):
    """Apply a norm over the last axis to the channel axis of (N, C, ...)."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    @classmethod
    def when(cls, in_shape: Shape, norm: nn.Module) -> nn.Module:
        """Wrap the norm for channels-first shapes; return it unchanged for features."""
        return norm if len(in_shape) == 1 else cls(norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class FeatureBatchNorm(nn.BatchNorm1d):
    """Batch norm of the last axis, over all other axes.

    Raises:
        DataError: a training batch has one row.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.normalize(x.reshape(-1, x.shape[-1])).reshape(x.shape)

    def normalize(self, rows: Tensor) -> Tensor:
        """Return the result for rows (rows, features)."""
        if self.training and len(rows) == 1:
            raise DataError(
                "batch norm: expected at least 2 rows in a training batch, got 1; drop the last"
                " small batch (drop_last), change batch_size, or use layer norm"
            )
        return super().forward(rows)


class FeatureGroupNorm(nn.GroupNorm):
    """Group norm of the last axis, for each row separately."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).reshape(x.shape)


def default_groups(channels: int) -> int:
    """Return the largest divisor up to 32 that leaves 4 or more channels in a group, or 1."""
    for groups in range(32, 1, -1):
        if channels % groups == 0 and channels // groups >= 4:
            return groups
    return 1


def check_rank(in_shape: Shape, name: str) -> None:
    """Raise BuildError unless the shape has 1 to 4 axes."""
    if not 1 <= len(in_shape) <= 4:
        raise BuildError(
            f"{name} norm: expected in_shape (D,), (C, L), (C, H, W) or (C, D, H, W),"
            f" got {tuple(in_shape)}"
        )


def check_several(in_shape: Shape, name: str) -> None:
    """Raise BuildError for a single channel, which minus its own mean is always zero."""
    if in_shape[0] == 1:
        raise BuildError(
            f"{name} norm over a single channel keeps at most the sign of the input;"
            " use batch or no norm"
        )
