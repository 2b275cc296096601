"""Data sets in array files: NumPy's .npz, the IDX format of MNIST, and Fashion-MNIST."""

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from framework import DataError, PositiveInt, Rate, datasets, did_you_mean

from .array_data import ArrayData
from .readers.arrays import Arrays, as_batch_of, numbers
from .readers.data_files import read_bytes
from .readers.fetched import cache_folder, fetch_command
from .readers.scaling import AutoScaling, standardize


@datasets.register("npz")
class Npz(ArrayData):
    """Inputs and targets from one .npz file.

    The file has the arrays `x` and `y`, or `x_train`, `y_train`, `x_test`, `y_test`. Official parts
    (`x_val`, `x_test`) are kept; the others are drawn at random.

    Args:
        path: the .npz file, with arrays of numbers, or of texts as classes; never of objects.
        inputs: name of the array of inputs, or its name before _train, _val and _test.
        targets: name of the array of targets, likewise.
        shape: reshape each input to this shape, e.g. [1,28,28].
        target_kind: null infers it: texts and at most 20 different integers are classes.
        val_fraction: share of the rows for validation, if the file has no x_val.
        test_fraction: share of the rows for the test, if the file has no x_test.
        split_seed: seed of the draw.
        normalize: standardize each feature (of images, each channel) by the training split.
        scale_target: train on values that are standardized, with log after their logarithm;
            metrics and predictions are in the target's own unit. auto: only center values that
            are more than 1,000 standard deviations from 0, and standardize values with a
            deviation below 1e-6 or above 1e6.
    """

    def __init__(
        self,
        path: Path,
        inputs: str = "x",
        targets: str = "y",
        shape: list[PositiveInt] | None = None,
        target_kind: Literal["class", "value", "labels"] | None = None,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
        scale_target: AutoScaling = "auto",
    ):
        path = path.expanduser()
        arrays = Arrays(path)
        suffixes = {"train": "" if inputs in arrays else "_train", "val": "_val", "test": "_test"}
        pairs = {}
        for part, suffix in suffixes.items():
            if part == "train" or inputs + suffix in arrays:
                x = find_array(arrays, inputs + suffix, path)
                y = find_array(arrays, targets + suffix, path)
                pairs[part] = (x if shape is None else reshape(x, shape, path), y)
        self.array = inputs + suffixes["train"]
        super().__init__(
            *pairs["train"],
            val=pairs.get("val"),
            test=pairs.get("test"),
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            normalize=normalize,
            target=target_kind,
            scale_target=scale_target,
            name=str(path),
        )

    def facts(self) -> dict[str, Any]:
        """Return the facts of ArrayData and the name of the array of inputs."""
        return {**super().facts(), "array": self.array}


def find_array(arrays: Mapping[str, Any], name: str, path: Path) -> Any:
    """Return an array of a .npz file.

    Raises:
        DataError: the file does not have the array.
    """
    if name not in arrays:
        raise DataError(f"{path} has no array {name!r}; {did_you_mean(name, arrays)}")
    return arrays[name]


def reshape(array: Any, shape: Sequence[int], path: Path) -> Any:
    """Return an array as (rows, *shape).

    Raises:
        DataError: its rows have another size.
    """
    if array.ndim == 0 or math.prod(array.shape[1:]) != math.prod(shape):
        raise DataError(
            f"data.shape={list(shape)}: rows of shape {array.shape[1:]} cannot be reshaped ({path})"
        )
    return array.reshape(len(array), *shape)


@datasets.register("idx", aliases=["mnist_files"])
class Idx(ArrayData):
    """A folder of IDX files with the names of MNIST's.

    These are train- and t10k-, followed by images-idx3-ubyte and labels-idx1-ubyte, also with .gz.
    t10k- is the test split; the validation split is drawn from train-.

    Args:
        path: the folder.
        classes: names of the labels 0, 1, ...; null: the labels themselves.
        val_fraction: share of train- for validation, with the same share of each class.
        split_seed: seed of the draw.
        normalize: standardize by the training pixels; otherwise divide them by 255.
    """

    max_pixel = 255.0

    def __init__(
        self,
        path: Path,
        classes: list[str] | None = None,
        val_fraction: Rate = 0.1,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        path = path.expanduser()
        images, labels = read_idx_pair(path, "train")
        super().__init__(
            images,
            labels,
            test=read_idx_pair(path, "t10k"),
            val_fraction=val_fraction,
            split_seed=split_seed,
            normalize=normalize,
            unit=255.0,
            target="class",
            classes=classes or (),
            name=str(path),
        )

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read images from an IDX, .npy or .npz file, with pixels from 0 to 255."""
        if path.suffix in (".npy", ".npz"):
            return super().read_inputs(path, facts)
        images = numbers(with_channel_axis(read_idx(path)), str(path))
        return standardize(as_batch_of(images, facts["in_shape"], path), facts)


DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


@datasets.register("fashion_mnist")
class FashionMnist(Idx):
    """60,000 + 10,000 gray images of clothes, 28x28, in 10 classes.

    (Xiao, Rasul and Vollgraf, arXiv:1708.07747.) `scripts/fetch_data fashion_mnist` downloads the
    files.

    Args:
        path: the folder of the four files; null: where Debian or scripts/fetch_data puts them.
        val_fraction: share of the training images for validation.
        split_seed: seed of the draw.
        normalize: standardize by the training pixels; otherwise divide them by 255.
    """

    def __init__(
        self,
        path: Path | None = None,
        val_fraction: Rate = 0.1,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        folders = [path.expanduser()] if path else [DEBIAN_FOLDER, cache_folder() / "fashion-mnist"]
        found = [folder for folder in folders if folder.is_dir()]
        if not found:
            searched = " and ".join(map(str, folders))
            raise DataError(
                f"Fashion-MNIST is not in {searched}; fetch it (31 MB) with: "
                f"{fetch_command('fashion_mnist')} (data=digits data.image=true needs no file)"
            )
        super().__init__(found[0], list(FASHION_CLASSES), val_fraction, split_seed, normalize)


MAX_AXES = 32
IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
"""NumPy types by the third byte of an IDX file."""


def read_idx_pair(folder: Path, part: str) -> tuple[Any, Any]:
    """Return images with an axis for the channel, and labels, of a part such as "train"."""
    images = read_idx(idx_file(folder, f"{part}-images"))
    return with_channel_axis(images), read_idx(idx_file(folder, f"{part}-labels"))


def idx_file(folder: Path, part: str) -> Path:
    """Return the file of a part such as "train-images", gzipped or not.

    Raises:
        DataError: there is no such file.
    """
    axes = 3 if part.endswith("images") else 1
    name = f"{part}-idx{axes}-ubyte"
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise DataError(f"{folder} has no file {name} or {name}.gz")


def read_idx(path: Path) -> Any:
    """Read an IDX file (LeCun's MNIST page).

    The format: 0, 0, type, number of axes; the sizes of the axes as big-endian uint32; the values.

    Raises:
        DataError: the file is missing, not an IDX file, or its size contradicts its header.
    """
    import numpy

    content = read_bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise DataError(
            f"{path} is not an IDX file: it begins with {content[:4].hex(' ') or 'nothing'}"
        )
    axes = content[3]
    if axes > MAX_AXES:
        raise DataError(f"{path} is not an IDX file: its header says that it has {axes} axes")
    start = 4 + 4 * axes
    if len(content) < start:
        raise DataError(f"{path} ends within its header; fetch it again")
    shape = struct.unpack(f">{axes}I", content[4:start])
    dtype = numpy.dtype(IDX_TYPES[content[2]])
    expected = math.prod(shape) * dtype.itemsize
    if len(content) - start != expected:
        raise DataError(
            f"{path} has {len(content) - start} bytes of values, but shape {shape} needs "
            f"{expected}; fetch it again"
        )
    return numpy.frombuffer(content, dtype, offset=start).reshape(shape)


def with_channel_axis(images: Any) -> Any:
    """Return gray images (rows, height, width) as (rows, 1, height, width)."""
    return images[:, None] if images.ndim == 3 else images
