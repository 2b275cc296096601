"""Blocks for signals (C, L) and images (C, H, W): convolutions, residual blocks, pooling."""

from typing import Literal

from torch import Tensor, nn

from framework import (
    Activation,
    BuildError,
    Maker,
    NonNegativeInt,
    Norm,
    PositiveInt,
    Rate,
    Shape,
    blocks,
    shapes,
)

Padding = Literal["same"] | NonNegativeInt
SIGNALS = "(C, L) or (C, H, W)"


@blocks.register("conv1d")
def conv1d(
    in_shape: Shape,
    channels: PositiveInt = 32,
    kernel_size: PositiveInt = 3,
    stride: PositiveInt = 1,
    padding: Padding = "same",
    dilation: PositiveInt = 1,
    groups: PositiveInt = 1,
    activation: Activation | None = "relu",
    norm: Norm | None = None,
    bias: bool = True,
) -> nn.Sequential:
    """1-d convolution, then norm and activation: (C, L) -> (channels, L').

    Args:
        channels: output channels.
        kernel_size: length of the kernel.
        stride: step between outputs.
        padding: zeros at each end; same: L' is L / stride, rounded up for an odd kernel_size.
        dilation: distance between kernel elements.
        groups: number of groups of connected channels; must divide both numbers of channels.
        activation: after the norm; null for none.
        norm: after the convolution; null for none.
        bias: add a learned bias.
    """
    in_channels, _ = shapes.expect(in_shape, "(C, L)", "conv1d")
    check_groups("conv1d", in_channels, channels, groups)
    zeros = same_padding(kernel_size, stride, dilation) if padding == "same" else padding
    layer = nn.Conv1d(in_channels, channels, kernel_size, stride, zeros, dilation, groups, bias)
    return convolution(layer, in_shape, activation, norm)


@blocks.register("conv2d", aliases=["conv"])
def conv2d(
    in_shape: Shape,
    channels: PositiveInt = 32,
    kernel_size: PositiveInt = 3,
    stride: PositiveInt = 1,
    padding: Padding = "same",
    dilation: PositiveInt = 1,
    groups: PositiveInt = 1,
    activation: Activation | None = "relu",
    norm: Norm | None = None,
    bias: bool = True,
) -> nn.Sequential:
    """2-d convolution, then norm and activation: (C, H, W) -> (channels, H', W').

    Args:
        channels: output channels.
        kernel_size: height and width of the kernel.
        stride: step between outputs.
        padding: zeros at each side; same: H' is H / stride, rounded up for an odd kernel_size.
        dilation: distance between kernel elements.
        groups: number of groups of connected channels; must divide both numbers of channels.
        activation: after the norm; null for none.
        norm: after the convolution; null for none.
        bias: add a learned bias.
    """
    in_channels, _, _ = shapes.expect(in_shape, "(C, H, W)", "conv2d")
    check_groups("conv2d", in_channels, channels, groups)
    zeros = same_padding(kernel_size, stride, dilation) if padding == "same" else padding
    layer = nn.Conv2d(in_channels, channels, kernel_size, stride, zeros, dilation, groups, bias)
    return convolution(layer, in_shape, activation, norm)


def check_groups(name: str, in_channels: int, channels: int, groups: int) -> None:
    """Raise BuildError if the groups do not divide both numbers of channels."""
    if in_channels % groups or channels % groups:
        raise BuildError(
            f"{name}: groups={groups} does not divide {in_channels} input and {channels} output"
            " channels"
        )


def same_padding(kernel_size: int, stride: int, dilation: int) -> int | str:
    """Return the padding for torch such that the output has size / stride.

    An even effective kernel needs uneven padding, which torch offers as "same" for stride 1 only.
    """
    total = dilation * (kernel_size - 1)
    return "same" if stride == 1 and total % 2 else total // 2


def convolution(
    layer: nn.Module, in_shape: Shape, activation: Activation | None, norm: Norm | None
) -> nn.Sequential:
    """Return the convolution, then a norm and an activation unless they are None."""
    layers = nn.Sequential()
    layers.add_module("conv", layer)
    if norm is not None:
        layers.add_module("norm", norm(shapes.output_shape(layer, in_shape)))
    if activation is not None:
        layers.add_module("activation", activation())
    return layers


@blocks.register("basic_block")
def basic_block(
    in_shape: Shape,
    channels: PositiveInt = 64,
    stride: PositiveInt = 1,
    activation: Activation = "relu",
    norm: Norm | None = "batch",
    drop_path: Rate = 0.0,
) -> nn.Module:
    """Two 3x3 convolutions with a skip connection (He et al. 2016, arXiv:1512.03385, figure 2).

    (C, H, W) -> (channels, H / stride, W / stride), rounded up.

    Args:
        channels: output channels.
        stride: of the first convolution, and of the projection.
        activation: after the first convolution, and after the sum.
        norm: after each convolution; null for none.
        drop_path: probability of skipping the branch for a sample (Huang et al. 2016,
            arXiv:1603.09382).
    """
    shapes.expect(in_shape, "(C, H, W)", "basic_block")
    rest = {"norm": norm, "bias": norm is None}
    first = blocks.maker("conv2d", channels=channels, stride=stride, activation=activation, **rest)
    second = blocks.maker("conv2d", channels=channels, activation=None, **rest)
    branch = [first, second, *drop_path_blocks(drop_path)]
    return blocks.build("residual", in_shape, blocks=branch, activation=activation, norm=norm)


def drop_path_blocks(probability: float) -> list[Maker]:
    """Return the drop_path block that ends a residual branch, or no block for probability 0."""
    return [blocks.maker("dropout", p=probability, kind="drop_path")] if probability else []


@blocks.register("bottleneck")
def bottleneck(
    in_shape: Shape,
    channels: PositiveInt = 64,
    stride: PositiveInt = 1,
    expansion: PositiveInt = 4,
    activation: Activation = "relu",
    norm: Norm | None = "batch",
    drop_path: Rate = 0.0,
) -> nn.Module:
    """1x1, 3x3 and 1x1 convolutions with a skip connection.

    (C, H, W) -> (expansion * channels, H / stride, W / stride), rounded up (He et al. 2016,
    arXiv:1512.03385, figure 5). The 3x3 convolution has the stride: a strided 1x1 convolution
    ignores most of its input.

    Args:
        channels: channels of the 3x3 convolution.
        stride: of the 3x3 convolution, and of the projection.
        expansion: output channels per channel of the 3x3 convolution.
        activation: after the first two convolutions, and after the sum.
        norm: after each convolution; null for none.
        drop_path: probability of skipping the branch for a sample (Huang et al. 2016,
            arXiv:1603.09382).
    """
    shapes.expect(in_shape, "(C, H, W)", "bottleneck")
    rest = {"norm": norm, "bias": norm is None}
    branch = [
        blocks.maker("conv2d", channels=channels, kernel_size=1, activation=activation, **rest),
        blocks.maker("conv2d", channels=channels, stride=stride, activation=activation, **rest),
        blocks.maker(
            "conv2d", channels=expansion * channels, kernel_size=1, activation=None, **rest
        ),
        *drop_path_blocks(drop_path),
    ]
    return blocks.build("residual", in_shape, blocks=branch, activation=activation, norm=norm)


@blocks.register("depthwise_separable")
def depthwise_separable(
    in_shape: Shape,
    channels: PositiveInt = 64,
    kernel_size: PositiveInt = 3,
    stride: PositiveInt = 1,
    activation: Activation = "relu",
    norm: Norm | None = "batch",
) -> nn.Module:
    """A convolution of each channel separately, then one of size 1.

    Howard et al. 2017, arXiv:1704.04861, section 3.1.

    Args:
        channels: output channels.
        kernel_size: height and width of the first kernel.
        stride: of the first convolution.
        activation: after each convolution.
        norm: after each convolution; null for none.
    """
    in_channels, _, _ = shapes.expect(in_shape, "(C, H, W)", "depthwise_separable")
    rest = {"activation": activation, "norm": norm, "bias": norm is None}
    depthwise = blocks.build(
        "conv2d",
        in_shape,
        channels=in_channels,
        groups=in_channels,
        kernel_size=kernel_size,
        stride=stride,
        **rest,
    )
    shape = shapes.output_shape(depthwise, in_shape)
    pointwise = blocks.build("conv2d", shape, channels=channels, kernel_size=1, **rest)
    return nn.Sequential(depthwise, pointwise)


@blocks.register("squeeze_excite")
class SqueezeExcite(nn.Module):
    """x · sigmoid(W₂ activation(W₁ mean(x))), a gate for each channel.

    Hu et al. 2018, arXiv:1709.01507, section 3.

    Args:
        reduction: channels per hidden feature.
        activation: between the two linear layers.
    """

    def __init__(
        self, in_shape: Shape, reduction: PositiveInt = 16, activation: Activation = "relu"
    ):
        super().__init__()
        channels = shapes.expect(in_shape, SIGNALS, "squeeze_excite")[0]
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Linear(channels, hidden)
        self.activation = activation()
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.squeeze(x.flatten(2).mean(2)))
        gate = self.excite(hidden).sigmoid()
        return x * gate.reshape(*gate.shape, *[1] * (x.ndim - 2))


@blocks.register("max_pool")
def max_pool(
    in_shape: Shape,
    kernel_size: PositiveInt = 2,
    stride: PositiveInt | None = None,
    padding: NonNegativeInt = 0,
) -> nn.Module:
    """The largest value of each window: (C, L) or (C, H, W), smaller by the stride.

    Args:
        kernel_size: length, or height and width, of the window.
        stride: step between windows; null: kernel_size (windows do not overlap).
        padding: positions added at each side, at most half of kernel_size.
    """
    check_window("max_pool", in_shape, kernel_size, padding)
    layer = {2: nn.MaxPool1d, 3: nn.MaxPool2d}[len(in_shape)]
    return layer(kernel_size, stride, padding)


@blocks.register("avg_pool")
def avg_pool(
    in_shape: Shape,
    kernel_size: PositiveInt = 2,
    stride: PositiveInt | None = None,
    padding: NonNegativeInt = 0,
) -> nn.Module:
    """The mean of each window: (C, L) or (C, H, W), smaller by the stride; padding counts as zeros.

    Args:
        kernel_size: length, or height and width, of the window.
        stride: step between windows; null: kernel_size (windows do not overlap).
        padding: positions added at each side, at most half of kernel_size.
    """
    check_window("avg_pool", in_shape, kernel_size, padding)
    layer = {2: nn.AvgPool1d, 3: nn.AvgPool2d}[len(in_shape)]
    return layer(kernel_size, stride, padding)


def check_window(name: str, in_shape: Shape, kernel_size: int, padding: int) -> None:
    """Raise BuildError for another shape than a signal or image, or for a window that is larger."""
    _, *sizes = shapes.expect(in_shape, SIGNALS, name)
    if kernel_size > min(sizes) + 2 * padding:
        raise BuildError(f"{name}: kernel_size={kernel_size} does not fit into {tuple(in_shape)}")


@blocks.register("adaptive_avg_pool")
def adaptive_avg_pool(in_shape: Shape, size: PositiveInt = 1) -> nn.Module:
    """The means of windows, chosen such that the output has a fixed size: (C, L) or (C, H, W).

    Args:
        size: output length, or height and width.
    """
    shapes.expect(in_shape, SIGNALS, "adaptive_avg_pool")
    layer = {2: nn.AdaptiveAvgPool1d, 3: nn.AdaptiveAvgPool2d}[len(in_shape)]
    return layer(size)


@blocks.register("adaptive_max_pool")
def adaptive_max_pool(in_shape: Shape, size: PositiveInt = 1) -> nn.Module:
    """The maxima of windows, chosen such that the output has a fixed size: (C, L) or (C, H, W).

    Args:
        size: output length, or height and width.
    """
    shapes.expect(in_shape, SIGNALS, "adaptive_max_pool")
    layer = {2: nn.AdaptiveMaxPool1d, 3: nn.AdaptiveMaxPool2d}[len(in_shape)]
    return layer(size)


@blocks.register("global_avg_pool")
class GlobalAvgPool(nn.Module):
    """The mean of each channel: (C, L) or (C, H, W) -> (C,)."""

    def __init__(self, in_shape: Shape):
        super().__init__()
        shapes.expect(in_shape, SIGNALS, "global_avg_pool")

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)
