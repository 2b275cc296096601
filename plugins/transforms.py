"""Transforms of training batches, with an independent random draw for each sample.

Inputs are images (C, H, W) as the data set returns them, usually standardized, so that 0 is the
mean of all pixels. Transforms that mix samples also mix their targets: class indices become class
probabilities.
"""

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framework import (
    Batch,
    BuildError,
    Context,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Range,
    SettingError,
    Shape,
    Transform,
    shapes,
    transforms,
)

IMAGES = "images (C, H, W)"


def per_sample(draws: Tensor, like: Tensor) -> Tensor:
    """Reshape one number per sample, (batch,), to broadcast against `like`, (batch, ...)."""
    return draws.reshape(-1, *[1] * (like.ndim - 1))


def draw_mask(p: float, like: Tensor) -> Tensor:
    """Draw True with probability p for each sample, (batch,)."""
    return torch.rand(len(like), device=like.device) < p


def within(first: Tensor, last: Tensor, size: int) -> Tensor:
    """Return a mask (batch, size), true from `first` to before `last`, each of shape (batch,)."""
    positions = torch.arange(size, device=first.device)
    return (positions >= first[:, None]) & (positions < last[:, None])


def boxes(tops: Tensor, bottoms: Tensor, lefts: Tensor, rights: Tensor, like: Tensor) -> Tensor:
    """Return a mask (batch, 1, H, W) of one box in each image."""
    rows = within(tops, bottoms, like.shape[-2])
    columns = within(lefts, rights, like.shape[-1])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def check_floating_point(inputs: Tensor, name: str) -> None:
    """Raise SettingError for inputs of another type."""
    if not inputs.is_floating_point():
        raise SettingError(f"{name}: expected floating-point inputs, got {inputs.dtype}")


@transforms.register("flip", aliases=["horizontal_flip"])
class Flip(Transform):
    """Mirror images, left to right or upside down.

    Args:
        p: probability for each image.
        axis: horizontal: swap left and right; vertical: swap top and bottom.
    """

    def __init__(
        self,
        in_shape: Shape,
        p: Fraction = 0.5,
        axis: Literal["horizontal", "vertical"] = "horizontal",
    ):
        shapes.expect(in_shape, IMAGES, "flip")
        self.p = p
        self.axis = {"horizontal": -1, "vertical": -2}[axis]

    def __call__(self, batch: Batch) -> Batch:
        images, *rest = batch
        flipped = per_sample(draw_mask(self.p, images), images)
        return (torch.where(flipped, images.flip(self.axis), images), *rest)


@transforms.register("crop", aliases=["random_crop"])
class Crop(Transform):
    """Pad images and crop them to their size at a random position: a shift by up to `padding`.

    Args:
        padding: pixels on each side.
        fill: values of the padding: edge: the outermost pixels; reflect: the mirrored image; zero:
            0, the mean.
    """

    def __init__(
        self,
        in_shape: Shape,
        padding: PositiveInt = 2,
        fill: Literal["edge", "reflect", "zero"] = "edge",
    ):
        _, high, wide = shapes.expect(in_shape, IMAGES, "crop")
        if fill == "reflect" and padding >= min(high, wide):
            raise BuildError(
                f"crop: padding={padding}: fill=reflect needs less than the height and width "
                f"of {tuple(in_shape)}; fill=edge has no limit"
            )
        self.padding = padding
        self.mode = {"edge": "replicate", "reflect": "reflect", "zero": "constant"}[fill]

    def __call__(self, batch: Batch) -> Batch:
        images, *rest = batch
        count, channels, high, wide = images.shape
        padded = F.pad(images, [self.padding] * 4, mode=self.mode)
        tops, lefts = torch.randint(0, 2 * self.padding + 1, (2, count), device=images.device)
        rows = (tops[:, None] + torch.arange(high, device=images.device))[:, None, :, None]
        columns = (lefts[:, None] + torch.arange(wide, device=images.device))[:, None, None, :]
        cropped = padded.gather(2, rows.expand(count, channels, high, padded.shape[3]))
        cropped = cropped.gather(3, columns.expand(count, channels, high, wide))
        return (cropped, *rest)


@transforms.register("resized_crop", aliases=["random_resized_crop"])
class ResizedCrop(Transform):
    """Crop a random box of each image and resize it to the size of the image.

    The box is inside the image; its pixels are interpolated linearly (Szegedy et al. 2015,
    arXiv:1409.4842, section 6).

    Args:
        smallest: the area of the box, as a fraction of the area of the image, is uniform between
            this and 1.
        ratio: largest aspect ratio of the box for a square image, wide or high; its logarithm is
            uniform, within the limits that the area of the box sets.
    """

    def __init__(
        self,
        in_shape: Shape,
        smallest: Annotated[float, Range("(0, 1]")] = 0.2,
        ratio: Annotated[float, Range("[1, inf)")] = 4 / 3,
    ):
        shapes.expect(in_shape, IMAGES, "resized_crop")
        self.smallest = smallest
        self.ratio = ratio

    def __call__(self, batch: Batch) -> Batch:
        images, *rest = batch
        check_floating_point(images, "resized_crop")
        area, stretch, left, top = torch.rand(4, len(images), device=images.device)
        area = 1 - (1 - self.smallest) * area
        # A larger logarithm of the aspect ratio would make the box wider than the image.
        widest = (-area.log()).clamp(max=math.log(self.ratio))
        stretch = ((2 * stretch - 1) * widest).exp()
        wide = (area * stretch).sqrt()
        high = (area / stretch).sqrt()
        # The center of the box, in coordinates from -1 to 1 in each axis of the image.
        x = (2 * left - 1) * (1 - wide)
        y = (2 * top - 1) * (1 - high)
        zero = torch.zeros_like(area)
        maps = torch.stack([wide, zero, x, zero, high, y], 1).reshape(-1, 2, 3)
        grid = F.affine_grid(maps, list(images.shape), align_corners=False)
        cropped = F.grid_sample(
            images, grid.to(images.dtype), padding_mode="border", align_corners=False
        )
        return (cropped, *rest)


@transforms.register("cutout", aliases=["random_erasing"])
class Cutout(Transform):
    """Set a square at a random position of each image to 0, the mean (DeVries and Taylor 2017).

    arXiv:1708.04552. The center of the square is any pixel.

    Args:
        size: side of the square in pixels; the part outside the image is ignored.
        p: probability for each image.
    """

    def __init__(self, in_shape: Shape, size: PositiveInt = 8, p: Fraction = 1.0):
        shapes.expect(in_shape, IMAGES, "cutout")
        self.size = size
        self.p = p

    def __call__(self, batch: Batch) -> Batch:
        images, *rest = batch
        count, _, high, wide = images.shape
        tops = torch.randint(0, high, (count,), device=images.device) - self.size // 2
        lefts = torch.randint(0, wide, (count,), device=images.device) - self.size // 2
        erased = boxes(tops, tops + self.size, lefts, lefts + self.size, images)
        erased = erased & per_sample(draw_mask(self.p, images), images)
        return (images.masked_fill(erased, 0.0), *rest)


@transforms.register("noise", aliases=["gaussian_noise"])
class Noise(Transform):
    """Add Gaussian noise to inputs of any shape.

    Args:
        std: standard deviation, in the unit of the inputs of the model.
    """

    def __init__(self, std: PositiveFloat = 0.1):
        self.std = std

    def __call__(self, batch: Batch) -> Batch:
        inputs, *rest = batch
        check_floating_point(inputs, "noise")
        return (inputs + self.std * torch.randn_like(inputs), *rest)


@transforms.register("brightness_contrast")
class BrightnessContrast(Transform):
    """m + (1 + c)(x - m) + b, where m is the mean of the image, and b and c are random.

    Args:
        brightness: b is uniform in [-brightness, brightness], in the unit of the inputs of the
            model.
        contrast: c is uniform in [-contrast, contrast].
    """

    def __init__(
        self, in_shape: Shape, brightness: NonNegativeFloat = 0.2, contrast: Fraction = 0.2
    ):
        shapes.expect(in_shape, IMAGES, "brightness_contrast")
        self.brightness = brightness
        self.contrast = contrast

    def __call__(self, batch: Batch) -> Batch:
        images, *rest = batch
        shift, stretch = 2 * torch.rand(2, len(images), device=images.device) - 1
        mean = images.mean((1, 2, 3), keepdim=True)
        changed = mean + (1 + self.contrast * per_sample(stretch, images)) * (images - mean)
        return (changed + self.brightness * per_sample(shift, images), *rest)


class Mixing(Transform):
    """Base of transforms that mix each sample with another one of the batch, and their targets.

    Args:
        name: the name of the transform, for messages.
        out_shape: (classes,) for class targets.
        alpha: both parameters of the Beta distribution of the share that a sample keeps.
        p: probability of mixing a sample.
    """

    def __init__(self, name: str, out_shape: Shape, alpha: float, p: float):
        self.name = name
        self.classes = out_shape[0]
        self.alpha = alpha
        self.p = p
        self.criterion: Any = None

    def on_fit_start(self, trainer: Context) -> None:
        self.criterion = trainer.task.criterion

    def draw(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the fraction that each sample keeps, from Beta(alpha, alpha), and its partner."""
        share = torch.distributions.Beta(self.alpha, self.alpha).sample((len(inputs),)).to(inputs)
        share = torch.where(draw_mask(self.p, inputs), share, 1.0)
        return share, torch.randperm(len(inputs), device=inputs.device)

    def mixed_targets(self, targets: Tensor, share: Tensor, other: Tensor) -> Tensor:
        """Mix targets; class indices become class probabilities (batch, classes)."""
        if not targets.is_floating_point():
            self.check(targets)
            try:
                targets = F.one_hot(targets.long(), self.classes).to(share)
            except RuntimeError as error:
                raise SettingError(
                    f"{self.name}: expected class targets from 0 to {self.classes - 1}: {error}"
                ) from error
        kept = per_sample(share, targets)
        return kept * targets + (1 - kept) * targets[other]

    def check(self, targets: Tensor) -> None:
        """Raise SettingError for a loss or targets that do not fit class probabilities."""
        if self.criterion is not None and not isinstance(self.criterion, nn.CrossEntropyLoss):
            loss = type(self.criterion).__name__
            raise SettingError(
                f"{self.name} turns class indices into probabilities, which the loss {loss} does"
                " not accept; use cross_entropy"
            )
        ignored = None if self.criterion is None else self.criterion.ignore_index
        if ignored is not None and 0 <= ignored < self.classes:
            raise SettingError(
                f"{self.name} mixes all classes, also the ignored one: loss.ignore_index={ignored}"
            )
        if targets.ndim != 1:
            raise SettingError(
                f"{self.name}: expected one class per sample, got targets of shape"
                f" {tuple(targets.shape)}"
            )


@transforms.register("mixup")
class Mixup(Mixing):
    """λ x + (1 - λ) x' for pairs of samples and for their targets (Zhang et al. 2018).

    arXiv:1710.09412, equation 1.

    λ is drawn for each sample. Metrics in training count the more probable of the two classes.

    Args:
        alpha: parameter of the Beta distribution of λ; larger values mix more evenly.
        p: probability for each sample.
    """

    def __init__(self, out_shape: Shape, alpha: PositiveFloat = 0.2, p: Fraction = 1.0):
        super().__init__("mixup", out_shape, alpha, p)

    def __call__(self, batch: Batch) -> Batch:
        inputs, targets, *rest = batch
        check_floating_point(inputs, "mixup")
        share, other = self.draw(inputs)
        kept = per_sample(share, inputs)
        mixed = kept * inputs + (1 - kept) * inputs[other]
        return (mixed, self.mixed_targets(targets, share, other), *rest)


@transforms.register("cutmix")
class CutMix(Mixing):
    """Replace a random box of each image by that of another image, and mix the targets by area.

    The box has the area fraction 1 - λ with λ from Beta(alpha, alpha), and any pixel as its center.
    The part outside the image is ignored: the targets are mixed by the fraction of pixels that are
    kept (Yun et al. 2019, arXiv:1905.04899, section 3.1).

    Args:
        alpha: parameter of the Beta distribution of λ; 1 is the uniform distribution.
        p: probability for each image.
    """

    def __init__(
        self, in_shape: Shape, out_shape: Shape, alpha: PositiveFloat = 1.0, p: Fraction = 1.0
    ):
        shapes.expect(in_shape, IMAGES, "cutmix")
        super().__init__("cutmix", out_shape, alpha, p)

    def __call__(self, batch: Batch) -> Batch:
        images, targets, *rest = batch
        share, other = self.draw(images)
        high, wide = images.shape[-2:]
        tops, bottoms = self.side(share, high)
        lefts, rights = self.side(share, wide)
        inside = boxes(tops, bottoms, lefts, rights, images)
        kept = 1 - inside.flatten(1).sum(1).to(share) / (high * wide)
        mixed = torch.where(inside, images[other], images)
        return (mixed, self.mixed_targets(targets, kept, other), *rest)

    @staticmethod
    def side(share: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return start and end of a box along an axis, which may lie outside the image."""
        length = (size * (1 - share).sqrt()).long()
        start = torch.randint(0, size, (len(share),), device=share.device) - length // 2
        return start, start + length
