"""A callback that shows the filters of the first convolution."""

import math

import torch
from torch import Tensor, nn

from framework import (
    Context,
    Every,
    PositiveInt,
    SettingError,
    callbacks,
    dtensors,
)
from framework.contracts.periodic_callback import PeriodicCallback

PIXELS = 32  # mean side of an enlarged filter
WIDTH = 280  # pixels of the image, about
LINE = 2  # pixels between filters
MOST_CHANNELS = 16  # of a filter, side by side


@callbacks.register("filters")
class Filters(PeriodicCallback):
    """Shows the kernels of the first convolution as one image, first before the training.

    Gray is 0, white the largest weight and black its negative. Filters of images with three
    channels are shown in color, other filters as a row with an image for each channel. The filter
    of a 1-d convolution is one image: a row for each channel, a column for each position.

    Args:
        count: number of filters.
        every: how often to show them.
    """

    def __init__(self, count: PositiveInt = 64, every: Every = "1epoch"):
        super().__init__(every)
        self.count = count

    def on_fit_start(self, trainer: Context) -> None:
        if first_convolution(trainer.model) is None:
            raise SettingError("callbacks.filters: the model has no 1-d or 2-d convolution")
        if trainer.state.step == 0:
            self.show_once(trainer)

    def on_step_end(self, trainer: Context) -> None:
        self.show_if_due(trainer)

    def show(self, trainer: Context) -> None:
        convolution = first_convolution(trainer.model)
        assert convolution is not None
        weight = dtensors.full_tensor(convolution.weight.detach()).float().cpu()
        image = filters_image(weight[: self.count])
        for logger in trainer.loggers:
            logger.images("filters", image[None], trainer.state.step)


def first_convolution(model: nn.Module) -> nn.Conv1d | nn.Conv2d | None:
    """Return the first 1-d or 2-d convolution with more than one weight per channel, or None."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d) and math.prod(module.kernel_size) > 1:
            return module
    return None


def filters_image(weight: Tensor) -> Tensor:
    """Return kernels (filters, channels, length) or (filters, channels, H, W) as one image."""
    largest = weight.abs().nan_to_num(0).max().clamp(min=1e-12)
    shades = 0.5 + weight / (2 * largest)
    columns = None
    if weight.ndim == 3:
        shades = shades[:, None]
    elif weight.shape[1] not in (1, 3):
        shades = shades[:, :MOST_CHANNELS]
        columns = shades.shape[1]
        shades = shades.flatten(0, 1)[:, None]
    height, width = shades.shape[-2:]
    factor = math.ceil(PIXELS / math.sqrt(height * width))
    enlarged = shades.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return tiled(enlarged, columns or max(1, WIDTH // (width * factor + LINE)))


def tiled(images: Tensor, max_columns: int) -> Tensor:
    """Return images (N, C, H, W) as one image, in rows; the space between them is white."""
    columns = min(len(images), max_columns)
    missing = -len(images) % columns
    padded = torch.cat([images, images.new_ones(missing, *images.shape[1:])])
    framed = nn.functional.pad(padded, (0, LINE, 0, LINE), value=1.0)
    rows = [torch.cat(list(row), 2) for row in framed.split(columns)]
    return torch.cat(rows, 1)
