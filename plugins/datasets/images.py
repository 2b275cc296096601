"""Pictures in files, a folder for each class."""

import struct
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from framework import Data, DataError, PositiveInt, Rate, datasets, did_you_mean
from framework_plugins.datasets.readers.arrays import (
    moments,
    read_batch,
    split_rows,
    standard_facts,
    standardise,
)
from framework_plugins.datasets.readers.data_files import (
    UNREADABLE,
    check_memory,
    one_line,
    open_data,
)

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
BYTES_OF_A_PIXEL = 6  # while a picture is read: three channels, and those that were in the file
MEASURED = 256  # pictures that the mean and deviation of pixels are taken from


class PictureFiles(torch.utils.data.Dataset):
    """Picture files with the number of their class, decoded when they are read (by whichever worker reads them)."""

    def __init__(self, files: Sequence[Path], labels: Tensor, facts: dict[str, Any]):
        self.files, self.labels, self.facts = files, labels, facts

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return standardise(read_picture(self.files[index], self.facts), self.facts), self.labels[
            index
        ]

    def content(self) -> Any:
        """Return the files and labels, by which the data is the same at another path."""
        return [list(self.files), self.labels]

    def subset(self, rows: Tensor) -> "PictureFiles":
        """Return the part with these row numbers."""
        return PictureFiles(
            [self.files[row] for row in rows.tolist()], self.labels[rows], self.facts
        )


@datasets.register("image_folder")
class ImageFolder(Data):
    """Pictures in ROOT/CLASS/*.png, or in ROOT/train/CLASS/ with val/ and test/ beside it; decoded as they are read."""

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
        """List the files. Parts that have a folder of their own are kept, the others are drawn from train.

        Args:
            path: ROOT; the classes are its sub-folders (or those of ROOT/train), in sorted order.
            size: height and width in pixels: the middle square of a picture is scaled to it.
            color: three channels, or one.
            val_fraction: share of the training pictures drawn for validation, if there is no folder for it.
            test_fraction: share of the training pictures drawn for the test, if there is no folder for it.
            split_seed: seed of the drawing.
            normalize: standardise each channel, by 256 pictures of the training split; otherwise divide by 255.
        """
        pillow()
        folders = part_folders(path.expanduser())
        self.classes = class_names(folders["train"])
        self.in_shape, self.out_shape = (
            (3 if color == "rgb" else 1, size, size),
            (len(self.classes),),
        )
        self.mean, self.std = 0.0, 255.0
        given = {part: self.list_files(folder) for part, folder in folders.items()}
        shares = {"val": val_fraction, "test": test_fraction} | dict.fromkeys(given, 0.0)
        rows = split_rows(given["train"].labels, shares["val"], shares["test"], split_seed)
        every: list[Path] = []
        for part, files in given.items():
            rows.setdefault(part, torch.arange(len(every), len(every) + len(files)))
            every += files.files
        labels = torch.cat([files.labels for files in given.values()])
        self.learn(PictureFiles(every, labels, self.facts()), normalize, rows)

    def learn(self, whole: PictureFiles, normalize: bool, rows: Mapping[str, Tensor]) -> None:
        """Measure the training pictures, and set the splits; rows: the pictures of each."""
        self.rows = rows
        self.refit = partial(self.learn, whole, normalize)
        parts = {part: whole.subset(taken) for part, taken in rows.items()}
        if normalize:
            self.mean, self.std = measure(parts["train"])
        for part, files in parts.items():
            files.facts = self.facts()
            setattr(self, part, files)

    def list_files(self, folder: Path) -> PictureFiles:
        """Return the pictures of a folder of class folders. Raises DataError for an empty one and an unknown class."""
        files, labels = [], []
        for name in class_names(folder):
            if name not in self.classes:
                raise DataError(
                    f"{folder / name}: no such class in train; {did_you_mean(name, self.classes)}"
                )
            found = picture_files(folder / name)
            files += found
            labels += [self.classes.index(name)] * len(found)
        return PictureFiles(files, torch.tensor(labels), self.facts())

    def facts(self) -> dict[str, Any]:
        """Return how a picture becomes an input, and the classes."""
        return standard_facts(self)

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read a picture file, or those of a folder in the order of their names, or an array of pixels 0 to 255."""
        if path.suffix in (".npy", ".npz"):
            return read_batch(path, facts)
        if not path.exists():
            raise DataError(f"{path}: there is no such file or folder (looked from {Path.cwd()})")
        pillow()
        files = picture_files(path) if path.is_dir() else [path]
        return torch.stack([standardise(read_picture(file, facts), facts) for file in files])


def part_folders(root: Path) -> dict[str, Path]:
    """Return the folders of train, val and test; of a root without a train folder, itself as train."""
    if root.is_file():
        raise DataError(
            f"{root} is a file; data.path is the folder that has a folder for each class"
        )
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder (looked from {Path.cwd()})")
    found = {
        part: root / name
        for part, names in FOLDERS.items()
        for name in names
        if (root / name).is_dir()
    }
    return found if "train" in found else {"train": root}


def class_names(folder: Path) -> list[str]:
    names = sorted(
        each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")
    )
    if not names:
        raise DataError(
            f"{folder} has no folders; put the pictures of each class into a folder named after it"
        )
    if len(names) == 1 and folder.name not in (*FOLDERS["val"], *FOLDERS["test"]):
        raise DataError(
            f"{folder} has one class only, {names[0]!r}; classes to tell apart are two or more"
        )
    return names


def picture_files(folder: Path) -> list[Path]:
    """Return the picture files in a folder, at any depth, sorted. Raises DataError for none and for an empty one."""
    named = [
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in ENDINGS and not file.name.startswith(".")
    ]
    files = sorted(file for file in named if not file.is_dir())
    if not files:
        raise DataError(f"{folder} has no pictures; known are {', '.join(sorted(ENDINGS))}")
    astray = next((file for file in files if not file.exists()), None)
    if astray is not None:
        raise DataError(
            f"{astray} is a link to what is not there; delete it or put the picture back"
        )
    hollow = next((file for file in files if file.stat().st_size == 0), None)
    if hollow is not None:
        raise DataError(f"{hollow} is an empty file; delete it or put the picture back")
    return files


def read_picture(file: Path, facts: dict[str, Any]) -> Tensor:
    """Return the middle square of a picture, scaled to facts["in_shape"], as uint8 (channels, height, width)."""
    import numpy
    from PIL import Image, ImageOps

    channels, *size = facts["in_shape"]
    ignore_pillow_warning()
    if not file.exists():
        raise DataError(f"{file}: there is no such picture any more")
    with open_data(file) as content:
        try:
            with Image.open(content) as opened:
                check_pixels(opened, file)
                upright = in_8_bits(ImageOps.exif_transpose(opened)).convert(
                    "RGB" if channels == 3 else "L"
                )
            pixels = numpy.array(ImageOps.fit(upright, size[::-1]))
        except (*UNREADABLE, SyntaxError, ValueError, TypeError, struct.error) as error:
            reason = one_line(error).replace(repr(content), "it")
            raise DataError(
                f"{file} cannot be read as a picture ({reason}); delete or replace it"
            ) from error
        except (Image.DecompressionBombError, MemoryError) as error:
            raise DataError(
                f"{file} has too many pixels ({one_line(error)}); delete or replace it"
            ) from error
    return torch.from_numpy(pixels).reshape(*size, channels).permute(2, 0, 1)


def ignore_pillow_warning() -> None:
    """Leave out Pillow's warning of large pictures, which does not name the file; `check_pixels` gives one."""
    from PIL import Image

    if all(
        category is not Image.DecompressionBombWarning for _, _, category, *_ in warnings.filters
    ):
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def check_pixels(picture: Any, file: Path) -> None:
    """Warn of a picture that Pillow takes for large, and raise DataError if there is no memory for its pixels."""
    from PIL import Image

    width, height = picture.size
    check_memory(BYTES_OF_A_PIXEL * width * height, file)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        warnings.warn(
            f"{file} has {width:,} x {height:,} pixels, which take long to decode", stacklevel=2
        )


def in_8_bits(picture: Any) -> Any:
    """Return a grey picture of 16 bits as one of 8, and others as they are: Pillow would make all of it white."""
    import numpy
    from PIL import Image

    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((numpy.asarray(picture).clip(0, 65535) // 257).astype(numpy.uint8))


def measure(files: PictureFiles) -> tuple[Any, Any]:
    """Return mean and deviation of each channel over at most 256 pictures, evenly spread over the files."""
    chosen = range(0, len(files), -(-len(files) // MEASURED))
    return moments(torch.stack([read_picture(files.files[row], files.facts) for row in chosen]))


def pillow() -> None:
    """Raise DataError unless Pillow is there."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError("pictures need Pillow: pip install 'framework[images]'") from error
