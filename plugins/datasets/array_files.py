"""Data sets in files of arrays: NumPy's .npz, and the IDX format of MNIST, with Fashion-MNIST as Debian packages it."""

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from framework import DataError, PositiveInt, Rate, datasets, did_you_mean
from framework_plugins.datasets.readers.arrays import (
    ArrayData,
    AutoScaling,
    as_batch_of,
    cache_folder,
    fetching,
    load_arrays,
    numbers,
    standardise,
)
from framework_plugins.datasets.readers.data_files import read_bytes


@datasets.register("npz")
class Npz(ArrayData):
    """Inputs and targets from one .npz file: arrays `x` and `y`, or `x_train`, `y_train`, `x_test`, `y_test`."""

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
        """Read the file; official parts (`x_val`, `x_test`) are kept, the other ones are drawn.

        Args:
            path: the .npz file; it must hold numbers (and texts, as classes), never objects.
            inputs: name of the array of inputs, or what stands before _train, _val and _test.
            targets: name of the array of targets, likewise.
            shape: bring each input to this shape, e.g. [1,28,28].
            target_kind: null infers it: texts and at most 20 different integers are classes.
            val_fraction: share of the rows drawn for validation, if the file has no x_val.
            test_fraction: share of the rows drawn for the test, if the file has no x_test.
            split_seed: seed of the drawing.
            normalize: standardise each feature (of pictures, each channel) by the training split.
            scale_target: train on values that are standardised, also after their logarithm; metrics
                and predictions are in the target's own unit. auto: only centre values that are more
                than 1,000 standard deviations from 0, and standardise those of a deviation below
                1e-6 or above 1e6.
        """
        path = path.expanduser()
        arrays = load_arrays(path)
        ending = "" if inputs in arrays else "_train"
        pairs = {
            part: (
                shaped(find(arrays, inputs + end, path), shape, path),
                find(arrays, targets + end, path),
            )
            for part, end in (("train", ending), ("val", "_val"), ("test", "_test"))
            if part == "train" or inputs + end in arrays
        }
        self.array = inputs + ending
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
        """Name the array of inputs too, for files to predict from."""
        return super().facts() | {"array": self.array}


def find(arrays: Mapping[str, Any], name: str, path: Path) -> Any:
    if name not in arrays:
        raise DataError(f"{path} has no array {name!r}; {did_you_mean(name, arrays)}")
    return arrays[name]


def shaped(array: Any, shape: Sequence[int] | None, path: Path) -> Any:
    if shape is None:
        return array
    if array.ndim == 0 or math.prod(array.shape[1:]) != math.prod(shape):
        raise DataError(
            f"{path}: rows of shape {array.shape[1:]} cannot be brought to shape {list(shape)}"
        )
    return array.reshape(len(array), *shape)


@datasets.register("idx", aliases=["mnist_files"])
class Idx(ArrayData):
    """A folder of IDX files, named as MNIST's: train- and t10k-, -images-idx3-ubyte and -labels-idx1-ubyte, or .gz."""

    def __init__(
        self,
        path: Path,
        classes: list[str] | None = None,
        val_fraction: Rate = 0.1,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        """Read the folder; t10k- is the test set, and a part of train- is drawn for validation.

        Args:
            path: the folder.
            classes: names of the labels 0, 1, ...; null: the labels themselves.
            val_fraction: share of train- drawn for validation, in the proportions of the classes.
            split_seed: seed of the drawing.
            normalize: standardise by the training pixels; otherwise divide them by 255.
        """
        path = path.expanduser()
        train, test = (
            (read_idx(idx_file(path, f"{part}-images")), read_idx(idx_file(path, f"{part}-labels")))
            for part in ("train", "t10k")
        )
        super().__init__(
            as_pictures(train[0]),
            train[1],
            test=(as_pictures(test[0]), test[1]),
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
        """Read pictures from an IDX file, or from .npy and .npz, with pixels from 0 to 255."""
        if path.suffix in (".npy", ".npz"):
            return super().read_inputs(path, facts)
        pictures = numbers(as_pictures(read_idx(path)), str(path))
        return standardise(as_batch_of(pictures, facts["in_shape"], path), facts)


DEBIAN_FOLDER = Path(
    "/usr/share/datasets/fashion-mnist"
)  # where the package dataset-fashion-mnist puts it
FASHION = [
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
    """60,000 + 10,000 pictures of clothes, 28x28, grey, in 10 classes (Xiao, Rasul and Vollgraf, arXiv:1708.07747)."""

    def __init__(
        self,
        path: Path | None = None,
        val_fraction: Rate = 0.1,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        """Read the files that `scripts/fetch_data fashion_mnist` puts in place.

        Args:
            path: the folder of the four files; null: where Debian or scripts/fetch_data puts them.
            val_fraction: share of the training pictures drawn for validation.
            split_seed: seed of the drawing.
            normalize: standardise by the training pixels; otherwise divide them by 255.
        """
        folders = [path.expanduser()] if path else [DEBIAN_FOLDER, cache_folder() / "fashion-mnist"]
        found = next((folder for folder in folders if folder.is_dir()), None)
        if found is None:
            looked = " and ".join(map(str, folders))
            raise DataError(
                f"Fashion-MNIST is not in {looked}; fetch it (31 MB) with: {fetching('fashion_mnist')} "
                "(data=digits data.image=true needs no file)"
            )
        super().__init__(found, list(FASHION), val_fraction, split_seed, normalize)


MOST_AXES = 32  # of any file that was made on purpose; NumPy stops at 64
IDX_TYPES = {
    8: "u1",
    9: "i1",
    11: ">i2",
    12: ">i4",
    13: ">f4",
    14: ">f8",
}  # the third byte of the file


def idx_file(folder: Path, part: str) -> Path:
    """Return the file of a part ("train-images"), gzipped or not. Raises DataError naming what was looked for."""
    ending = "-idx3-ubyte" if part.endswith("images") else "-idx1-ubyte"
    files = [folder / f"{part}{ending}", folder / f"{part}{ending}.gz"]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise DataError(f"{folder} has no file {files[0].name} or {files[1].name}")
    return found


def read_idx(path: Path) -> Any:
    """Read an IDX file: 0, 0, type, number of axes; their sizes as big-endian uint32; the values (LeCun's MNIST page).

    Raises DataError when the file is missing, is no IDX file, or is shorter or longer than it says.
    """
    import numpy

    content = read_bytes(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise DataError(
            f"{path} is no IDX file: it begins with {content[:4].hex(' ') or 'nothing'}"
        )
    if content[3] > MOST_AXES:
        raise DataError(f"{path} is no IDX file: it says that it has {content[3]} axes")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path} ends within its header; fetch it again")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    kind = numpy.dtype(IDX_TYPES[content[2]])
    expected = math.prod(shape) * kind.itemsize
    if len(content) - start != expected:
        raise DataError(
            f"{path} holds {len(content) - start} bytes of values, but {expected} for shape {shape}; fetch it again"
        )
    return numpy.frombuffer(content, kind, offset=start).reshape(shape)


def as_pictures(array: Any) -> Any:
    """Return (rows, height, width) with an axis for the one channel."""
    return array[:, None] if array.ndim == 3 else array
