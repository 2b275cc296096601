"""Images in files, a folder for each class."""

import struct
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from framework import Data, DataError, PositiveInt, Preparation, Rate, Scale, Shape, datasets

from .preparations.arrays import Standardize
from .readers.arrays import read_batch
from .readers.class_folders import (
    LabelledFiles,
    find_classes,
    find_files,
    find_labelled_files,
    find_parts,
)
from .readers.data_files import READ_ERRORS, check_memory, one_line, open_data
from .readers.scaling import moments, standard_facts, standardize
from .readers.splits import split_parts

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""Formats of Pillow that are read; for others, such as EPS, it may run another program."""
BYTES_PER_PIXEL = 6  # while an image is read: three channels, and those of the file
MAX_MEASURED = 256  # images from which the mean and deviation of the pixels are computed


class ImageFiles(LabelledFiles):
    """Image files with the index of their class; an image is decoded when its sample is read."""

    def read(self, file: Path) -> Tensor:
        return standardize(read_image(file, self.facts), self.facts)


@datasets.register("image_folder")
class ImageFolder(Data):
    """Images in ROOT/CLASS/*.png, or in ROOT/train/CLASS/, ROOT/val/CLASS/ and ROOT/test/CLASS/.

    A part without a folder is drawn from train.

    Args:
        path: ROOT; the classes are its sub-folders (or those of ROOT/train), in sorted order.
        size: height and width in pixels, to which the central square of an image is scaled.
        color: three channels, or one.
        val_fraction: share of the training images for validation, if it has no folder.
        test_fraction: share of the training images for the test, if it has no folder.
        split_seed: seed of the draw.
        normalize: standardize each channel, by 256 images of the training split; otherwise
            divide by 255.
    """

    input_suffixes = tuple(sorted(SUFFIXES))
    single_input_suffixes = input_suffixes
    max_pixel = 255.0

    def __init__(
        self,
        path: Path,
        size: PositiveInt = 64,
        color: Literal["rgb", "gray"] = "rgb",
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        check_pillow()
        folders = find_parts(path.expanduser())
        self.classes = find_classes(folders["train"], "images")
        self.in_shape = (3 if color == "rgb" else 1, size, size)
        self.out_shape = (len(self.classes),)
        self.mean: Any = 0.0
        self.std: Any = 255.0
        files: list[Path] = []
        labels: list[Tensor] = []
        for folder in folders.values():
            found, classes = find_labelled_files(folder, self.classes, "images", find_images)
            files += found
            labels.append(classes)
        sizes = {part: len(classes) for part, classes in zip(folders, labels, strict=True)}
        rows = split_parts(labels[0], sizes, val_fraction, test_fraction, split_seed)
        self.fit(ImageFiles(files, torch.cat(labels), self.facts()), normalize, rows)

    def fit(self, files: ImageFiles, normalize: bool, rows: Mapping[str, Tensor]) -> None:
        """Measure the training images, and set the splits.

        Args:
            files: all images.
            normalize: standardize by the training images.
            rows: the numbers of the images of each split.
        """
        self.rows = rows
        self.refit = partial(self.fit, files, normalize)
        if normalize:
            self.mean, self.std = measure(files.subset(rows["train"]))
        for part, chosen in rows.items():
            split = files.subset(chosen)
            split.facts = self.facts()
            setattr(self, part, split)

    def facts(self) -> dict[str, Any]:
        """Return how an image becomes an input, and the classes."""
        return standard_facts(self)

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read an image file, the images of a folder (sorted), or an array of pixels 0 to 255."""
        if path.suffix in (".npy", ".npz"):
            return read_batch(path, facts)
        if not path.exists():
            raise DataError(f"{path}: no such file or folder (looked in {Path.cwd()})")
        check_pillow()
        files = find_images(path) if path.is_dir() else [path]
        return torch.stack([standardize(read_image(file, facts), facts) for file in files])

    @classmethod
    def read_labelled(
        cls,
        path: Path,
        facts: dict[str, Any],
        settings: Mapping[str, Any],
        scale: Scale | None = None,
    ) -> ImageFiles:
        """Return the images of PATH/CLASS/*.png; they are read when needed."""
        check_pillow()
        files, labels = find_labelled_files(path, facts["classes"], "images", find_images)
        return ImageFiles(files, labels, facts)

    @classmethod
    def preparation(cls, facts: dict[str, Any], in_shape: Shape) -> Preparation | None:
        return Standardize(facts, in_shape, pixels=True)


def find_images(folder: Path) -> list[Path]:
    """Return the image files in a folder, at any depth, sorted.

    Raises:
        DataError: there is no image, or one is empty or a broken link.
    """
    files = find_files(folder, SUFFIXES, "images")
    for file in files:
        if not file.exists():
            raise DataError(f"{file} is a broken link; delete it or restore the image")
        if file.stat().st_size == 0:
            raise DataError(f"{file} is an empty file; delete it or restore the image")
    return files


def read_image(file: Path, facts: dict[str, Any]) -> Tensor:
    """Return the central square of an image as uint8, scaled to facts["in_shape"]."""
    if not file.exists():
        raise DataError(f"{file}: the image no longer exists")
    with open_data(file) as content:
        return decode_image(content, str(file), facts)


def decode_image(content: IO[bytes], name: str, facts: dict[str, Any]) -> Tensor:
    """Return the central square of an image as uint8, scaled to facts["in_shape"].

    Args:
        content: the bytes of an image file.
        name: its name, for errors.
        facts: "in_shape", (3, height, width) or (1, height, width).
    """
    import numpy
    from PIL import Image, ImageOps

    channels, height, width = facts["in_shape"]
    ignore_pillow_warning()
    try:
        with Image.open(content, formats=FORMATS) as opened:
            check_pixels(opened, name)
            upright = in_8_bits(ImageOps.exif_transpose(opened))
            image = upright.convert("RGB" if channels == 3 else "L")
        pixels = numpy.array(ImageOps.fit(image, (width, height)))
    except (*READ_ERRORS, SyntaxError, ValueError, TypeError, struct.error) as error:
        reason = one_line(error).replace(repr(content), "it")
        raise DataError(
            f"{name} cannot be read as an image ({reason}); delete or replace it"
        ) from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise DataError(
            f"{name} has too many pixels ({one_line(error)}); delete or replace it"
        ) from error
    return torch.from_numpy(pixels).reshape(height, width, channels).permute(2, 0, 1)


def ignore_pillow_warning() -> None:
    """Ignore Pillow's warning about large images; the one of `check_pixels` names the file."""
    from PIL import Image

    for _, _, category, *_ in warnings.filters:
        if category is Image.DecompressionBombWarning:
            return
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def check_pixels(image: Any, name: str) -> None:
    """Warn about an image that is large to Pillow; raise DataError if it exceeds the memory."""
    from PIL import Image

    width, height = image.size
    check_memory(BYTES_PER_PIXEL * width * height, name)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        warnings.warn(
            f"{name} has {width:,} x {height:,} pixels, which are slow to decode", stacklevel=2
        )


def in_8_bits(image: Any) -> Any:
    """Return a 16-bit gray image as 8-bit; Pillow would turn all of its pixels white."""
    import numpy
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((numpy.asarray(image).clip(0, 65535) // 257).astype(numpy.uint8))


def measure(files: ImageFiles) -> tuple[Any, Any]:
    """Return mean and deviation of each channel over at most 256 images, evenly spaced."""
    step = -(-len(files) // MAX_MEASURED)
    images = [read_image(file, files.facts) for file in files.files[::step]]
    return moments(torch.stack(images))


def check_pillow() -> None:
    """Raise DataError if Pillow is not installed."""
    try:
        import PIL.Image  # noqa: F401  # only whether it can be imported
    except ImportError as error:
        raise DataError("images need Pillow: pip install 'framework[images]'") from error
