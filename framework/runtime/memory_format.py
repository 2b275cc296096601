"""The order of the numbers of images in memory: channels first or channels last."""

from typing import Literal, NamedTuple

from torch import Tensor, nn

from .batch import Batch, map_tensors

ChannelsLast = Literal["auto"] | bool


def channels_last(tensor: Tensor) -> Tensor:
    """Return images with the channels of a pixel side by side in memory.

    Values and shape stay the same. Convolutions return their outputs in the same format.

    Args:
        tensor: images (samples, channels, height, width); any other tensor is returned unchanged.
    """
    if tensor.ndim != 4:
        return tensor
    _, channels, height, width = tensor.shape
    pixels = tensor.permute(0, 2, 3, 1).contiguous()
    # `contiguous(memory_format=torch.channels_last)` keeps the strides of images of one channel.
    strides = (channels * height * width, 1, width * channels, channels)
    return pixels.as_strided(tensor.shape, strides)


class MemoryFormat(NamedTuple):
    """The memory format for the images of a model.

    Attributes:
        channels_last: whether images are converted with `channels_last`.
        description: for the description of a loader, such as ", channels last"; may be empty.
    """

    channels_last: bool
    description: str

    def convert(self, batch: Batch) -> Batch:
        """Return a batch in this format."""
        return map_tensors(channels_last, batch) if self.channels_last else batch


def choose_memory_format(setting: ChannelsLast, model: nn.Module | None = None) -> MemoryFormat:
    """Return the memory format for the images of a model.

    A convolution is faster with channels last. But the format has to be changed back once, often
    after the last convolution, if only in the backward pass of a mean over all positions. This is
    cheap if the images have become smaller by then, so auto looks for strides and pooling.

    Args:
        setting: True, False, or auto to choose by the layers of the model.
        model: the model that reads the images; None with auto leaves the images as they are.
    """
    if setting != "auto":
        return MemoryFormat(setting, ", channels last" if setting else "")
    layers = [] if model is None else list(model.modules())
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in layers)
    if convolutions < 2:
        return MemoryFormat(False, "")
    if any(map(overruns_memory, layers)):
        reason = "1x1 convolution with a stride and fewer than 8 input channels"
        return MemoryFormat(False, f", channels first ({reason})")
    found = f"{convolutions} convolutions"
    if makes_images_smaller(layers):
        return MemoryFormat(True, f", channels last ({found}, images become smaller)")
    return MemoryFormat(False, f", channels first ({found}, images keep their size)")


def overruns_memory(layer: nn.Module) -> bool:
    """Return whether the backward pass of a layer writes past a buffer if images are channels last.

    oneDNN's kernel for processors with AVX2 but without AVX-512 does so, as of torch 2.13: the
    process crashes.
    """
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        return False
    return layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.in_channels < 8


def makes_images_smaller(layers: list[nn.Module]) -> bool:
    """Return whether a convolution or pooling after the first one has a stride.

    The first one may cut an image into patches, which the others leave at the same size.
    """
    kinds = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d
    strides = [layer.stride for layer in layers if isinstance(layer, kinds)]
    return any(stride not in (1, (1, 1)) for stride in strides[1:])
