"""The memory format of images."""

from typing import Literal

from torch import Tensor, nn


def channels_last(tensor: Tensor) -> Tensor:
    """Return images (samples, channels, height, width) with the channels of a pixel side by side in memory.

    The values and the shape are the same, and other tensors stay as they are. A convolution goes on in this format.
    """
    if tensor.ndim != 4:
        return tensor
    _, channels, height, width = tensor.shape
    pixels = tensor.permute(0, 2, 3, 1).contiguous()
    strides = (channels * height * width, 1, width * channels, channels)
    return pixels.as_strided(
        tensor.shape, strides
    )  # of one channel torch would leave the strides as they were


def overruns_memory(layer: nn.Module) -> bool:
    """Return whether the backward pass of a layer on `channels_last` images writes past the end of a buffer.

    oneDNN's kernel for processors with AVX2 but without AVX-512 does so, as of torch 2.13: the process crashes.
    """
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        return False
    return layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.in_channels < 8


def chosen_layout(wanted: bool | Literal["auto"], model: nn.Module | None) -> tuple[bool, str]:
    """Return whether a model's images are to be `channels_last`, and what to say of it; auto looks at its layers only.

    A convolution is faster so. A change of format costs, and behind the last convolution there often is one, if only
    in the backward pass (of a mean over all positions): it is cheap where the images have become smaller by then.
    """
    parts = [] if model is None else list(model.modules())
    convolutions = sum(isinstance(part, nn.Conv2d) for part in parts)
    if wanted != "auto" or convolutions < 2:
        return wanted is True, ", channels last" * (wanted is True)
    if any(map(overruns_memory, parts)):
        return (
            False,
            ", channels first (for a 1x1 convolution with a stride and fewer than 8 input channels)",
        )
    steps = [
        part.stride for part in parts if isinstance(part, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
    ]
    if any(step not in (1, (1, 1)) for step in steps[1:]):  # the first may cut patches
        return (
            True,
            f", channels last (for {convolutions} convolutions that go on to smaller images)",
        )
    return (
        False,
        f", channels first (for {convolutions} convolutions that do not go on to smaller images)",
    )
