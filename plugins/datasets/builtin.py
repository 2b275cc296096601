"""Data sets that need no file: scikit-learn's digits, and synthetic points and functions."""

import importlib.util
import math
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from framework import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Preparation,
    Range,
    Rate,
    Shape,
    Shown,
    datasets,
    memory,
    seeds,
)

from .array_data import ArrayData
from .preparations.arrays import Enlarge, Standardize
from .readers.arrays import as_batch_of, read_array
from .readers.scaling import standardize


@datasets.register("digits")
class Digits(ArrayData):
    """1,797 handwritten digits of 8x8 pixels by 43 writers (Alpaydin and Kaynak 1998, UCI).

    The data set is part of scikit-learn. Pixels are 0 to 16.

    Args:
        image: inputs of shape (1, 8, 8), for convolutions, instead of (64,).
        size: scale the images to this height and width; inputs have shape (1, size, size) with
            or without `image`: 28 for a model that was trained on Fashion-MNIST.
        val_fraction: share of the rows for validation, with the same share of each class.
        test_fraction: share of the rows for the test.
        split_seed: seed of the draw of the splits.
        normalize: standardize by one mean and deviation of all pixels; otherwise divide by 16.
    """

    max_pixel = 16.0

    def __init__(
        self,
        image: bool = False,
        size: PositiveInt | None = None,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        pixels, labels = load_digits()
        if size:
            pixels = resize(pixels, size)
        elif image:
            pixels = pixels.reshape(-1, 1, 8, 8)
        super().__init__(
            pixels,
            labels,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            normalize=normalize,
            per="all",
            unit=16.0,
            name="digits",
        )

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read images of 8x8 pixels from 0 to 16, or of the size that the model takes."""
        images = read_array(path, facts.get("array"))
        in_shape = facts["in_shape"]
        if math.prod(images.shape[1:]) == 64 and math.prod(in_shape) != 64:
            images = resize(images, in_shape[-1])
        return standardize(as_batch_of(images, in_shape, path), facts)

    @classmethod
    def preparation(cls, facts: dict[str, Any], in_shape: Shape) -> Preparation | None:
        if math.prod(in_shape) == 64:
            return Standardize(facts, in_shape)
        return Enlarge(facts, in_shape)

    @classmethod
    def show(cls, inputs: Tensor, facts: dict[str, Any]) -> Shown:
        """Return inputs as images, also those of shape (64,)."""
        return super().show(inputs.reshape(-1, 1, 8, 8) if inputs.ndim == 2 else inputs, facts)


def resize(pixels: Any, size: int) -> Tensor:
    """Return 8x8 images (rows, 64) as (rows, 1, size, size), interpolated bilinearly."""
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    memory.check_room(8 * len(images) * size**2, f"{len(images)} images of {size}x{size} pixels")
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def load_digits() -> tuple[Any, Any]:
    """Return pixels, shape (1797, 64), and labels."""
    import numpy

    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():  # the same as scikit-learn's function, whose import takes 2 s
            rows = numpy.loadtxt(file, delimiter=",")
            return rows[:, :-1], rows[:, -1].astype(int)
    import sklearn.datasets

    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    return pixels, labels


@datasets.register("blobs")
class Blobs(ArrayData):
    """Normally distributed points, a cloud for each class.

    The centers are drawn uniformly from [-10, 10] in each feature.

    Args:
        samples: number of points, in classes of equal size.
        classes: number of clouds.
        features: dimensions of the space.
        noise: standard deviation of a cloud in each feature.
        seed: seed of centers, points and splits.
        val_fraction: share of the points for validation.
        test_fraction: share of the points for the test.
        normalize: standardize each feature.
    """

    def __init__(
        self,
        samples: PositiveInt = 1500,
        classes: Annotated[int, Range("[2, inf)")] = 3,
        features: PositiveInt = 2,
        noise: NonNegativeFloat = 1.0,
        seed: int = 0,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        normalize: bool = True,
    ):
        memory.check_room(
            16 * (samples + classes) * features,
            f"blobs with samples={samples}, features={features}",
        )
        generator = seeds.generator(seed, "blobs")
        centers = torch.rand(classes, features, generator=generator) * 20 - 10
        labels = torch.arange(samples) % classes
        points = centers[labels] + noise * torch.randn(samples, features, generator=generator)
        super().__init__(
            points,
            labels,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=seed,
            normalize=normalize,
            target="class",
            name="blobs",
        )


@datasets.register("spirals")
class Spirals(ArrayData):
    """Interleaved spiral arms in the plane, one for each class.

    Linear models cannot separate them, small networks can. Points have radius r in [0, 1] and angle
    2π(turns r + class / classes), plus noise.

    Args:
        samples: number of points, in classes of equal size.
        classes: number of arms.
        turns: turns of an arm about the center.
        noise: standard deviation of the points from their arm; the arms have radius 1.
        seed: seed of points and splits.
        val_fraction: share of the points for validation.
        test_fraction: share of the points for the test.
        normalize: standardize each feature.
    """

    def __init__(
        self,
        samples: PositiveInt = 1500,
        classes: Annotated[int, Range("[2, inf)")] = 3,
        turns: PositiveFloat = 1.0,
        noise: NonNegativeFloat = 0.02,
        seed: int = 0,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        normalize: bool = True,
    ):
        memory.check_room(48 * samples, f"spirals with samples={samples}")
        generator = seeds.generator(seed, "spirals")
        labels = torch.arange(samples) % classes
        # The square root makes points near the rim as dense as points near the center.
        radius = torch.rand(samples, generator=generator).sqrt()
        angle = 2 * math.pi * (turns * radius + labels / classes)
        arms = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        super().__init__(
            arms + noise * torch.randn(samples, 2, generator=generator),
            labels,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=seed,
            normalize=normalize,
            target="class",
            name="spirals",
        )


@datasets.register("friedman1")
class Friedman1(ArrayData):
    """Regression with interactions, curves and irrelevant features (Friedman 1991, MARS).

    Inputs are drawn uniformly from [0, 1]; the target is `friedman1` of them plus normal noise.
    Outliers imitate errors of recording: a training target ten times too large.

    Args:
        samples: number of rows.
        features: number of inputs, of which the first five are relevant.
        noise: standard deviation of the noise.
        outliers: share of the training targets that are ten times too large.
        seed: seed of inputs, noise, outliers and splits.
        val_fraction: share of the rows for validation.
        test_fraction: share of the rows for the test.
        normalize: standardize each feature; the target is not scaled.
    """

    def __init__(
        self,
        samples: PositiveInt = 2000,
        features: Annotated[int, Range("[5, inf)")] = 10,
        noise: NonNegativeFloat = 1.0,
        outliers: Rate = 0.0,
        seed: int = 0,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        normalize: bool = True,
    ):
        memory.check_room(
            16 * samples * features, f"friedman1 with samples={samples}, features={features}"
        )
        generator = seeds.generator(seed, "friedman1")
        inputs = torch.rand(samples, features, generator=generator)
        super().__init__(
            inputs,
            friedman1(inputs) + noise * torch.randn(samples, generator=generator),
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=seed,
            normalize=normalize,
            target="value",
            name="friedman1",
        )
        if outliers:
            targets = self.train.tensors[-1]
            targets[torch.rand(len(targets), generator=generator) < outliers] *= 10


def friedman1(inputs: Tensor) -> Tensor:
    """Return 10 sin(π x₁ x₂) + 20 (x₃ - 0.5)² + 10 x₄ + 5 x₅ of each row (Friedman 1991)."""
    x1, x2, x3, x4, x5 = inputs[:, :5].unbind(1)
    return 10 * torch.sin(math.pi * x1 * x2) + 20 * (x3 - 0.5).square() + 10 * x4 + 5 * x5
