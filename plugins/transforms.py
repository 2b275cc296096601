"""Transforms of training batches: each sample is changed by a draw of its own, all samples of a batch at once.

Inputs are images (C, H, W) as the data set gives them, usually standardised, so that 0 is the mean of all pixels.
Those that mix samples mix their targets too: of classes they make class probabilities.
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


def each(draws: Tensor, like: Tensor) -> Tensor:
    """Return one number a sample, shape (batch,), so that it broadcasts against `like`, (batch, ...)."""
    return draws.reshape(-1, *[1] * (like.ndim - 1))


def chosen(p: float, like: Tensor) -> Tensor:
    """Draw with probability p for each sample whether it is changed, shape (batch,)."""
    return torch.rand(len(like), device=like.device) < p


def within(first: Tensor, last: Tensor, size: int) -> Tensor:
    """Return a mask (batch, size), true from `first` up to but without `last`, each of shape (batch,)."""
    places = torch.arange(size, device=first.device)
    return (places >= first[:, None]) & (places < last[:, None])


def boxes(tops: Tensor, bottoms: Tensor, lefts: Tensor, rights: Tensor, like: Tensor) -> Tensor:
    """Return a mask (batch, 1, H, W) of one box in each image."""
    rows, columns = within(tops, bottoms, like.shape[-2]), within(lefts, rights, like.shape[-1])
    return (rows[:, :, None] & columns[:, None, :])[:, None]


@transforms.register("flip", aliases=["horizontal_flip"])
class Flip(Transform):
    """Mirrors images, left to right or upside down.

    Args:
        p: probability for each image.
        axis: horizontal: left and right change places; vertical: top and bottom.
    """

    def __init__(
        self,
        in_shape: Shape,
        p: Fraction = 0.5,
        axis: Literal["horizontal", "vertical"] = "horizontal",
    ):
        shapes.expect(in_shape, IMAGES, "flip")
        self.p, self.axis = p, {"horizontal": -1, "vertical": -2}[axis]

    def __call__(self, batch: Batch) -> Batch:
        images, *rest = batch
        return (
            torch.where(each(chosen(self.p, images), images), images.flip(self.axis), images),
            *rest,
        )


@transforms.register("crop", aliases=["random_crop"])
class Crop(Transform):
    """Pads images on all sides and cuts out as much as they were, anywhere: a shift by up to `padding` pixels.

    Args:
        padding: pixels on each side.
        fill: what is padded: edge: the outermost pixels again; reflect: the picture mirrored; zero: the mean.
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
                f"crop cannot mirror {padding} pixels of {tuple(in_shape)}; fill=edge can pad so many"
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
        cut = padded.gather(2, rows.expand(count, channels, high, padded.shape[3]))
        return (cut.gather(3, columns.expand(count, channels, high, wide)), *rest)


@transforms.register("resized_crop", aliases=["random_resized_crop"])
class ResizedCrop(Transform):
    """Cuts a box out of each image and scales it to the size of the whole (Szegedy et al. 2015, arXiv:1409.4842, 6).

    The box lies anywhere inside the image; between its pixels it is interpolated linearly.

    Args:
        smallest: the box has a share of the image's area between this and 1, each as likely.
        ratio: how many times as wide as high, or as high as wide, a box of a square image is at most; the logarithm
            is uniform, as far as the box's share of the area leaves room.
    """

    def __init__(
        self,
        in_shape: Shape,
        smallest: Annotated[float, Range("(0, 1]")] = 0.2,
        ratio: Annotated[float, Range("[1, inf)")] = 4 / 3,
    ):
        shapes.expect(in_shape, IMAGES, "resized_crop")
        self.smallest, self.ratio = smallest, ratio

    def __call__(self, batch: Batch) -> Batch:
        images, *rest = batch
        if not images.is_floating_point():
            raise SettingError(
                f"resized_crop: the inputs are {images.dtype}, which cannot be interpolated"
            )
        share, stretch, left, top = torch.rand(4, len(images), device=images.device)
        share = 1 - (1 - self.smallest) * share
        widest = (-share.log()).clamp(
            max=math.log(self.ratio)
        )  # with more it would be wider than the image
        stretch = ((2 * stretch - 1) * widest).exp()
        wide, high = (share * stretch).sqrt(), (share / stretch).sqrt()
        none = torch.zeros_like(share)
        x, y = (
            (2 * left - 1) * (1 - wide),
            (2 * top - 1) * (1 - high),
        )  # of the middle; the image goes from -1 to 1
        maps = torch.stack([wide, none, x, none, high, y], 1).reshape(-1, 2, 3)
        grid = F.affine_grid(maps, list(images.shape), align_corners=False)
        cut = F.grid_sample(
            images, grid.to(images.dtype), padding_mode="border", align_corners=False
        )
        return (cut, *rest)


@transforms.register("cutout", aliases=["random_erasing"])
class Cutout(Transform):
    """Sets a square of each image to 0, the mean; its centre is any pixel (DeVries and Taylor 2017, arXiv:1708.04552).

    Args:
        size: side of the square in pixels; what lies outside the image is cut off.
        p: probability for each image.
    """

    def __init__(self, in_shape: Shape, size: PositiveInt = 8, p: Fraction = 1.0):
        shapes.expect(in_shape, IMAGES, "cutout")
        self.size, self.p = size, p

    def __call__(self, batch: Batch) -> Batch:
        images, *rest = batch
        tops = (
            torch.randint(0, images.shape[-2], (len(images),), device=images.device)
            - self.size // 2
        )
        lefts = (
            torch.randint(0, images.shape[-1], (len(images),), device=images.device)
            - self.size // 2
        )
        erased = boxes(tops, tops + self.size, lefts, lefts + self.size, images) & each(
            chosen(self.p, images), images
        )
        return (images.masked_fill(erased, 0.0), *rest)


@transforms.register("noise", aliases=["gaussian_noise"])
class Noise(Transform):
    """Adds normal noise to each number of the inputs, of any shape.

    Args:
        std: its standard deviation, in units of the inputs as the model gets them.
    """

    def __init__(self, std: PositiveFloat = 0.1):
        self.std = std

    def __call__(self, batch: Batch) -> Batch:
        inputs, *rest = batch
        if not inputs.is_floating_point():
            raise SettingError(
                f"noise: the inputs are {inputs.dtype}, which are no amounts to add noise to"
            )
        return (inputs + self.std * torch.randn_like(inputs), *rest)


@transforms.register("brightness_contrast")
class BrightnessContrast(Transform):
    """m + (1 + c)(x - m) + b with m the mean of an image, and b and c drawn for each image.

    Args:
        brightness: b is uniform between minus this and this, in units of the inputs as the model gets them.
        contrast: c is uniform between minus this and this.
    """

    def __init__(
        self, in_shape: Shape, brightness: NonNegativeFloat = 0.2, contrast: Fraction = 0.2
    ):
        shapes.expect(in_shape, IMAGES, "brightness_contrast")
        self.brightness, self.contrast = brightness, contrast

    def __call__(self, batch: Batch) -> Batch:
        images, *rest = batch
        shift, stretch = 2 * torch.rand(2, len(images), device=images.device) - 1
        mean = images.mean((1, 2, 3), keepdim=True)
        changed = mean + (1 + self.contrast * each(stretch, images)) * (images - mean)
        return (changed + self.brightness * each(shift, images), *rest)


class Mixing(Transform):
    """Base of transforms that mix each sample with another of the batch, and their targets in the same shares."""

    def __init__(self, who: str, out_shape: Shape, alpha: float, p: float):
        self.who, self.classes, self.alpha, self.p = who, out_shape[0], alpha, p
        self.criterion: Any = None

    def on_fit_start(self, trainer: Context) -> None:
        self.criterion = trainer.task.criterion

    def draw(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each sample the share that it keeps, from Beta(alpha, alpha), and with which one it is mixed."""
        share = torch.distributions.Beta(self.alpha, self.alpha).sample((len(inputs),)).to(inputs)
        share = torch.where(chosen(self.p, inputs), share, 1.0)
        return share, torch.randperm(len(inputs), device=inputs.device)

    def mixed(self, targets: Tensor, share: Tensor, other: Tensor) -> Tensor:
        """Return the targets, mixed; of class indices the probabilities of classes, (batch, classes)."""
        if not targets.is_floating_point():
            self.check(targets)
            try:
                targets = F.one_hot(targets.long(), self.classes).to(share)
            except RuntimeError as error:
                last = self.classes - 1
                said = f"{self.who}: a target is no class from 0 to {last}: {error}"
                raise SettingError(said) from error
        kept = each(share, targets)
        return kept * targets + (1 - kept) * targets[other]

    def check(self, targets: Tensor) -> None:
        """Raise SettingError where class probabilities would be taken for something else."""
        if self.criterion is not None and not isinstance(self.criterion, nn.CrossEntropyLoss):
            loss = type(self.criterion).__name__
            raise SettingError(
                f"{self.who} makes class probabilities of targets, which the loss {loss} does not take; "
                "cross_entropy does"
            )
        ignored = None if self.criterion is None else self.criterion.ignore_index
        if ignored is not None and 0 <= ignored < self.classes:
            raise SettingError(
                f"{self.who} mixes all classes, also those that the loss ignores: ignore_index={ignored}"
            )
        if targets.ndim != 1:
            raise SettingError(
                f"{self.who} mixes one class a sample, not targets of shape {tuple(targets.shape)}"
            )


@transforms.register("mixup")
class Mixup(Mixing):
    """λ x + (1 - λ) x' of two samples of a batch, and of their targets (Zhang et al. 2018, arXiv:1710.09412, eq. 1).

    λ is drawn for each sample. Metrics in training then count the likelier class of the two.

    Args:
        alpha: of the Beta distribution of λ: the larger, the more even the mixture.
        p: probability for each sample.
    """

    def __init__(self, out_shape: Shape, alpha: PositiveFloat = 0.2, p: Fraction = 1.0):
        super().__init__("mixup", out_shape, alpha, p)

    def __call__(self, batch: Batch) -> Batch:
        inputs, targets, *rest = batch
        if not inputs.is_floating_point():
            raise SettingError(f"mixup: the inputs are {inputs.dtype}, which cannot be mixed")
        share, other = self.draw(inputs)
        kept = each(share, inputs)
        return (
            kept * inputs + (1 - kept) * inputs[other],
            self.mixed(targets, share, other),
            *rest,
        )


@transforms.register("cutmix")
class CutMix(Mixing):
    """Puts a box of another image into each image; targets are mixed by area (Yun et al. 2019, arXiv:1905.04899, 3.1).

    The box has the share 1 - λ of the area, λ from Beta(alpha, alpha), about any pixel; what lies outside is cut off,
    and λ becomes the share that is really kept.

    Args:
        alpha: of the Beta distribution of λ; 1: every share is as likely.
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
        return (torch.where(inside, images[other], images), self.mixed(targets, kept, other), *rest)

    @staticmethod
    def side(share: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Return first and last of a box's pixels along an axis, before anything is cut off."""
        length = (size * (1 - share).sqrt()).long()
        first = torch.randint(0, size, (len(share),), device=share.device) - length // 2
        return first, first + length
