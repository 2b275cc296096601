"""Data sets that need no file: scikit-learn's digits, and points and functions made by a formula."""

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
    Range,
    Rate,
    datasets,
    memory,
    seeds,
)
from framework_plugins.datasets.readers.arrays import (
    ArrayData,
    as_batch_of,
    read_array,
    standardise,
)


@datasets.register("digits")
class Digits(ArrayData):
    """1,797 handwritten digits of 8x8 pixels, from 43 writers (Alpaydin and Kaynak 1998, UCI; in scikit-learn)."""

    def __init__(
        self,
        image: bool = False,
        size: PositiveInt | None = None,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        """Read the digits that come with scikit-learn; pixels are 0 to 16.

        Args:
            image: inputs of shape (1, 8, 8), for convolutions, in place of (64,).
            size: pictures are scaled to this height and width, inputs then being (1, size, size) with or without
                `image`: 28 for a model that was trained on Fashion-MNIST.
            val_fraction: share of the rows drawn for validation, in the proportions of the classes.
            test_fraction: share of the rows drawn for the test.
            split_seed: seed of the drawing.
            normalize: standardise by one mean and deviation over all pixels; otherwise divide by 16.
        """
        pixels, labels = read_digits()
        super().__init__(
            scaled(pixels, size) if size else pixels.reshape(-1, 1, 8, 8) if image else pixels,
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
        """Read pictures of 8x8 pixels from 0 to 16, or of the size that the model takes."""
        rows, wanted = read_array(path, facts.get("array")), facts["in_shape"]
        if math.prod(rows.shape[1:]) == 64 and math.prod(wanted) != 64:
            rows = scaled(rows, wanted[-1])
        return standardise(as_batch_of(rows, wanted, path), facts)


def scaled(pixels: Any, size: int) -> Tensor:
    """Return 8x8 pictures (rows, 64) as (rows, 1, size, size), pixels in between interpolated linearly."""
    pictures = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)
    memory.check_room(
        8 * len(pictures) * size**2, f"{len(pictures)} pictures of {size}x{size} pixels"
    )
    return F.interpolate(pictures, (size, size), mode="bilinear", align_corners=False)


def read_digits() -> tuple[Any, Any]:
    """Return the pixels, (1797, 64), and labels that scikit-learn holds."""
    import numpy

    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():  # its own reader says the same, after an import of 2 s
            rows = numpy.loadtxt(file, delimiter=",")
            return rows[:, :-1], rows[:, -1].astype(int)
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


@datasets.register("blobs")
class Blobs(ArrayData):
    """Normal clouds of points, one a class, about centres drawn uniformly from [-10, 10] in each feature."""

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
        """Draw the points.

        Args:
            samples: points in all, in classes of equal size.
            classes: number of clouds.
            features: dimensions of the space.
            noise: standard deviation of a cloud in each feature.
            seed: seed of centres, points and splits.
            val_fraction: share of the points for validation.
            test_fraction: share of the points for the test.
            normalize: standardise each feature.
        """
        memory.check_room(
            16 * (samples + classes) * features,
            f"blobs with samples={samples}, features={features}",
        )
        draw = seeds.generator(seed, "blobs")
        centres = torch.rand(classes, features, generator=draw) * 20 - 10
        labels = torch.arange(samples) % classes
        points = centres[labels] + noise * torch.randn(samples, features, generator=draw)
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
    """Interleaved spiral arms in the plane, one a class: linear models fail, small networks do not."""

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
        """Draw points at radius r in [0, 1] and angle 2π(turns r + class / classes), blurred by `noise`.

        Args:
            samples: points in all, in classes of equal size.
            classes: number of arms.
            turns: how often an arm winds about the centre.
            noise: standard deviation of a point from its arm, in radii of the whole.
            seed: seed of points and splits.
            val_fraction: share of the points for validation.
            test_fraction: share of the points for the test.
            normalize: standardise each feature.
        """
        memory.check_room(48 * samples, f"spirals with samples={samples}")
        draw = seeds.generator(seed, "spirals")
        labels = torch.arange(samples) % classes
        radius = torch.rand(
            samples, generator=draw
        ).sqrt()  # as many points near the rim as the length of arm there
        angle = 2 * math.pi * (turns * radius + labels / classes)
        arms = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        super().__init__(
            arms + noise * torch.randn(samples, 2, generator=draw),
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
    """A regression with interactions, curves and features that do not matter (Friedman 1991, MARS)."""

    def __init__(
        self,
        samples: PositiveInt = 2000,
        features: Annotated[int, Range("[5, inf)")] = 10,
        noise: NonNegativeFloat = 1.0,
        seed: int = 0,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        normalize: bool = True,
    ):
        """Draw inputs uniformly from [0, 1]; the target is `friedman1` of them plus normal noise.

        Args:
            samples: rows in all.
            features: inputs, of which the first five matter.
            noise: standard deviation of the target about the formula.
            seed: seed of inputs, noise and splits.
            val_fraction: share of the rows for validation.
            test_fraction: share of the rows for the test.
            normalize: standardise each feature; the target stays as it is.
        """
        memory.check_room(
            16 * samples * features, f"friedman1 with samples={samples}, features={features}"
        )
        draw = seeds.generator(seed, "friedman1")
        inputs = torch.rand(samples, features, generator=draw)
        super().__init__(
            inputs,
            friedman1(inputs) + noise * torch.randn(samples, generator=draw),
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=seed,
            normalize=normalize,
            target="value",
            name="friedman1",
        )


def friedman1(inputs: Tensor) -> Tensor:
    """Return 10 sin(π x₁ x₂) + 20 (x₃ - 0.5)² + 10 x₄ + 5 x₅ of each row (Friedman 1991)."""
    x1, x2, x3, x4, x5 = inputs[:, :5].unbind(1)
    return 10 * torch.sin(math.pi * x1 * x2) + 20 * (x3 - 0.5).square() + 10 * x4 + 5 * x5
