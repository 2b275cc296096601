"""Arrays as a data set needs them: numbers read and checked, targets numbered, rows split, inputs standardised.

`ArrayData` makes a data set of two arrays.
"""

import math
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from framework import Data, DataError, Scale, SettingError, Shape, Target, TensorSplit, paths, seeds

from .data_files import UNREADABLE, check_member, check_memory, one_line, open_data

Pair = tuple[Tensor, Tensor]

Scaling = Literal["standard", "log", "none"]
AutoScaling = Literal["auto", "standard", "log", "none"]
# So many standard deviations from 0, float32 keeps 1e-4 of a deviation: arithmetic in it will do.
FAR = 1000
# So much of a standard deviation may be lost in float32 where nothing is standardised.
LOST = 0.01
MOST_CLASSES = (
    20  # integers with more different values than this are taken for amounts, not for classes
)


@dataclass(frozen=True)
class Texts:
    """A column of texts: cell i is `known[codes[i]]`; the code -1 is an empty cell."""

    codes: Tensor
    known: list[str]

    def __getitem__(self, rows: Tensor) -> "Texts":
        return Texts(self.codes[rows], self.known)


class Targets(NamedTuple):
    """Targets as a tensor (see `Data.target`), their kind and the names of the classes."""

    tensor: Tensor
    kind: Target
    classes: list[str]

    @property
    def out_shape(self) -> Shape:
        return (len(self.classes),) if self.kind == "class" else tuple(self.tensor.shape[1:])


def as_targets(
    values: Any, kind: Target | None = None, classes: Sequence[str] = (), name: str = "the data"
) -> Targets:
    """Return targets of the given kind.

    Without a kind, a text, a truth value or one of at most 20 different integers a row is a class; other numbers are
    values. Classes are numbered in the sorted order of their labels, or as in `classes`, where the labels are 0, 1, ...
    Values are float32, or float64 where float32 would lose digits of them (see `needs_float64`).

    Raises DataError for NaN, for targets that cannot be of that kind, and for fewer than two classes.
    """
    import numpy

    if isinstance(values, Texts):
        return text_targets(values, name)
    values = numpy.asarray(values)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dtype.kind == "f" and not numpy.isfinite(values).all():
        row = int(numpy.argwhere(~numpy.isfinite(values))[0, 0])
        raise DataError(
            f"{name}: the target of row {row + 1} is {values[row]}; drop the row or fill it in"
        )
    if kind is None:
        kind = "class" if looks_like_classes(values) else "value"
    if kind == "class":
        return class_targets(values, classes, name)
    tensor = numbers(values, f"{name}: the targets")
    if kind == "value" and needs_float64(tensor):
        check_integers(tensor, f"{name}: the targets")
        tensor = tensor.double()
    else:
        tensor = tensor.float()
    if kind == "labels" and not ((tensor == 0) | (tensor == 1)).all():
        raise DataError(f"{name}: targets that are labels must be 0 or 1, one column a label")
    names = (
        list(classes) or [str(column) for column in range(tensor.shape[1])]
        if kind == "labels"
        else []
    )
    return Targets(tensor, kind, names)


def looks_like_classes(values: Any) -> bool:
    if values.ndim != 1 or values.dtype.kind == "f":
        return False
    return values.dtype.kind not in "iu" or len(set(values.tolist())) <= MOST_CLASSES


def class_targets(labels: Any, classes: Sequence[str], name: str) -> Targets:
    import numpy

    if labels.ndim != 1 or labels.dtype.kind not in "USbiuf":
        raise DataError(
            f"{name}: a class is one number or text a row, not {labels.dtype} of shape {labels.shape[1:]}"
        )
    found, indices = numpy.unique(labels, return_inverse=True)
    if len(found) < 2:
        raise DataError(
            f"{name}: every target is {''.join(map(str, found))!r}; classes to tell apart are two or more"
        )
    if not classes:
        whole = found.dtype.kind == "f" and (found == found.round()).all()
        names = [str(label) for label in (found.astype(int) if whole else found).tolist()]
        return Targets(torch.from_numpy(indices.reshape(-1)), "class", names)
    if found.dtype.kind not in "iu" or found[0] < 0 or found[-1] >= len(classes):
        raise DataError(
            f"{name}: labels go from {found[0]} to {found[-1]}, but {len(classes)} classes are named"
        )
    return Targets(torch.from_numpy(labels.astype(numpy.int64)), "class", list(classes))


def text_targets(texts: Texts, name: str) -> Targets:
    """Return classes that are texts, in the sorted order of those that a row has."""
    used = texts.codes.unique().tolist()
    names = sorted(texts.known[code] for code in used)
    if len(names) < 2:
        raise DataError(
            f"{name}: every target is {''.join(names)!r}; classes to tell apart are two or more"
        )
    places = {text: place for place, text in enumerate(names)}
    indices = torch.tensor([places.get(text, -1) for text in texts.known])
    return Targets(indices[texts.codes], "class", names)


def split_rows(
    strata: Tensor, val_fraction: float, test_fraction: float, seed: int = 0
) -> dict[str, Tensor]:
    """Return row numbers of train, val and test (left out when its fraction is 0), each ascending.

    strata: the class of each row, shape (rows,); every class has its share in each part, to within a row, and at least
    one row in train. A pure function of its arguments. Raises SettingError when nothing is left to train on.
    """
    if val_fraction + test_fraction >= 1:
        raise SettingError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on; "
            "together they must be less than 1"
        )
    shuffled = torch.randperm(len(strata), generator=seeds.generator(seed, "split"))
    if len(strata) == 0 or (strata == strata[0]).all():
        rows = shuffled
    else:
        rows = shuffled[
            strata[shuffled].argsort(stable=True)
        ]  # class by class, at random within each
    first = torch.ones(len(rows), dtype=torch.bool)
    first[1:] = strata[rows][1:] != strata[rows][:-1]
    kept, rest = rows[first], rows[~first]
    parts = {}
    for part, fraction in (("test", test_fraction), ("val", val_fraction)):
        if fraction > 0:
            taken = evenly(len(rest), max(1, round(fraction * len(rows))))
            parts[part], rest = ascending(rest[taken], len(rows)), rest[~taken]
    if parts and min(map(len, parts.values())) == 0:
        raise DataError(
            f"{len(rows)} rows are too few for a validation and a test split; get more, or take none with "
            "data.val_fraction=0 and data.test_fraction=0"
        )
    return {"train": ascending(torch.cat([kept, rest]), len(rows)), **parts}


def ascending(rows: Tensor, count: int) -> Tensor:
    """Return different row numbers below `count` in ascending order."""
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[rows] = True
    return chosen.nonzero()[:, 0]


def learn_scale(amounts: Tensor, rows: Tensor, scaling: AutoScaling, name: str) -> Scale | None:
    """Return the scale that makes targets of amounts, by the moments of these rows; None leaves them as they are.

    auto does what is needed and no more: amounts that are too far from 0 for float32 are centred
    (see `needs_float64`); those of a deviation below 1e-6 or above 1e6, which few optimizers cope
    with, are standardised.

    Raises DataError for an amount that has no logarithm, and for amounts that must be scaled and
    are not.
    """
    if scaling == "auto":
        scale = standard_scale(amounts[rows])
        deviations = torch.as_tensor(scale.std)
        if ((deviations < 1e-6) | (deviations > 1e6)).any():
            return scale
        if amounts.dtype == torch.float64:
            return scale._replace(std=torch.ones_like(deviations).tolist())
        return None
    if scaling == "none":
        check_digits(amounts, f"{name}: the targets", "scale_target=standard")
        return None
    if scaling == "standard":
        return standard_scale(amounts[rows])
    if not (amounts > 0).all():
        row = int((amounts <= 0).nonzero()[0, 0])
        raise DataError(
            f"{name}: the target of row {row + 1} is {amounts[row].tolist()}, "
            "which has no logarithm; scale_target=standard"
        )
    return standard_scale(amounts[rows], log=True)


def standard_scale(amounts: Tensor, log: bool = False) -> Scale:
    """Return the scale that gives amounts, or their logarithms, mean 0 and deviation 1."""
    known = Scale(log=log).transform(amounts.double())
    several = known.ndim == 2 and known.shape[1] > 1
    # Several values by their own moments: by common ones the larger would hide the others.
    mean, std = mean_and_std(known, [0] if several else list(range(known.ndim)))
    return Scale(mean.tolist(), std.tolist(), log)


def scaled(amounts: Tensor, scale: Scale | None) -> Tensor:
    """Return amounts as float32 targets, centred in float64 where float32 would lose digits."""
    if scale is None:
        return amounts.float()
    mean, std = (torch.as_tensor(each, dtype=torch.float64) for each in (scale.mean, scale.std))
    far = bool((mean.abs() > FAR * std).any())
    return scale.transform(amounts.double() if far else amounts).float()


def cache_folder() -> Path:
    """Return where `scripts/fetch_data` puts what it fetches."""
    return paths.expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "framework"


def fetching(name: str) -> str:
    """Return the command that fetches a data set, by the script of a checkout or the installed copy."""
    here = Path(__file__).parents[2]
    script = here.parent / "scripts" / "fetch_data"
    if not script.is_file():
        return f"bash {paths.pasted(here / 'fetch_data')} {name}"
    return f"{paths.pasted(paths.shorter(script))} {name}"


def data_folder(name: str, size: str, fallback: str) -> Path:
    """Return where `scripts/fetch_data` puts a data set. Raises DataError with what to do when it is not there."""
    folder = cache_folder() / name
    if not folder.is_dir():
        raise DataError(
            f"{name} is not in {folder}; fetch it ({size}) with: {fetching(name)} ({fallback} needs no file)"
        )
    return folder


def evenly(size: int, count: int) -> Tensor:
    """Return a mask of `size` with `count` set, at even distances."""
    position = torch.arange(size + 1) * count // max(size, 1)
    return position[1:] > position[:-1]


def axes_of(inputs: Tensor, per: Literal["feature", "all"]) -> list[int]:
    """Return over which axes a mean is taken; see `moments`."""
    if per == "all":
        return list(range(inputs.ndim))
    if inputs.ndim > 3:
        return [0, *range(2, inputs.ndim)]
    return list(range(inputs.ndim - 1))


def moments(
    inputs: Tensor,
    per: Literal["feature", "all"] = "feature",
    float64: bool | None = None,
) -> tuple[Any, Any]:
    """Return mean and standard deviation as numbers or nested lists; 1 in place of the deviation of a constant.

    Per feature: of (rows, features) and (rows, time, features) over all but the last axis; of (rows, channels, ...)
    with two or more further axes for each channel.
    float64: compute in float64; None: if `needs_float64`.
    """
    if float64 is None:
        float64 = needs_float64(inputs, per)
    axes, keep = axes_of(inputs, per), per == "feature" and inputs.ndim > 3
    if float64:
        mean, std = mean_and_std(inputs.double(), axes, keep)
    else:
        variance, mean = torch.var_mean(inputs.float(), axes, correction=0, keepdim=keep)
        std = variance.sqrt().masked_fill(variance == 0, 1.0)
    if keep:
        mean = mean[0]
        std = std[0]
    return mean.tolist(), std.tolist()


def mean_and_std(
    amounts: Tensor,
    axes: Sequence[int],
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over some axes; of a constant, itself and 1."""
    mean = amounts.mean(axes, keepdim)
    std = amounts.std(axes, correction=0, keepdim=keepdim)
    lowest = amounts.amin(axes, keepdim)
    # Not std == 0: the mean of a constant is rounded, and what is left of it is no deviation.
    constant = lowest == amounts.amax(axes, keepdim)
    return torch.where(constant, lowest, mean), std.masked_fill(constant, 1.0)


def needs_float64(inputs: Tensor, per: Literal["feature", "all"] = "feature") -> bool:
    """Whether numbers must be scaled in float64: float32 would lose what tells them apart.

    That is so where a feature is further from 0 than 1,000 of its deviations, or its squares are
    beyond float32. Others are computed in float32, as they always were, to the last bit.
    """
    if inputs.dtype in (torch.uint8, torch.bool):
        return False
    axes = axes_of(inputs, per)
    variance, mean = torch.var_mean(inputs.float(), axes, correction=0)
    low, high = inputs.amin(axes), inputs.amax(axes)
    largest, constant = torch.maximum(low.double().abs(), high.double().abs()), low == high
    std = torch.where(constant, 1.0, variance.double().sqrt())
    held = (largest <= FAR * std) & (largest < 1e15) & (std > 1e-15)
    return not bool((held | (constant & (mean.double() == low.double()))).all())


def check_integers(inputs: Tensor, where: str) -> None:
    """Raise DataError for integers beyond 2^53 that float64 does not tell apart."""
    if inputs.dtype != torch.int64 or max(-int(inputs.min()), int(inputs.max())) <= 2**53:
        return
    axes = axes_of(inputs, "feature")
    known = inputs.double()
    error = (inputs - inputs[:1]).double() - (known - known[:1])
    narrow = known.amax(axes) - known.amin(axes) <= 2**53
    lost = narrow & (error.abs().amax(axes) > LOST * known.std(axes, correction=0))
    if lost.any():
        largest = int(inputs.abs().max())
        raise DataError(
            f"{where}: float64 cannot hold integers up to {largest}; subtract an offset"
        )


def check_digits(inputs: Tensor, where: str, instead: str) -> None:
    """Raise DataError where float32 would lose what tells numbers apart. instead: what keeps it."""
    if inputs.dtype not in (torch.float64, torch.int64):
        return
    axes = axes_of(inputs, "feature")
    known = inputs.double()
    error = (known - known.float()).square().mean(axes).sqrt()
    std = known.std(axes, correction=0)
    lost = (known.amin(axes) != known.amax(axes)) & (error > LOST * std)
    if lost.any():
        place = int(lost.flatten().nonzero()[0, 0])
        largest = float(known.abs().amax(axes).flatten()[place])
        spread = float(std.flatten()[place])
        found = f"numbers up to {largest:.6g} with a deviation of {spread:.3g}"
        raise DataError(f"{where}: float32 cannot hold {found}; use {instead}")


def numbers(array: Any, where: str) -> Tensor:
    """Return an array as a tensor of uint8, bool, int64, float32 or float64, at least (rows, 1).

    Raises DataError for what is no number, not finite or beyond float32.
    """
    import numpy

    if isinstance(array, Tensor):
        array = array.detach().cpu().numpy()
    array = numpy.asarray(array)
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: {array.dtype} is no type of numbers; store an array of integers or floats"
        )
    if array.ndim == 0 or len(array) == 0:
        raise DataError(f"{where}: the array is empty")
    kept = array.dtype.kind == "b" or array.dtype == numpy.uint8
    if array.dtype == numpy.uint64 and array.max() >= 2**63:
        raise DataError(f"{where}: an integer beyond 2^63 cannot be held; subtract an offset")
    floats = numpy.float64 if array.dtype.itemsize >= 8 else numpy.float32
    wanted = array.dtype if kept else floats if array.dtype.kind == "f" else numpy.int64
    tensor = torch.from_numpy(numpy.array(array, dtype=wanted, order="C"))
    if tensor.is_floating_point() and not tensor.float().isfinite().all():
        row = int((~tensor.float().isfinite()).nonzero()[0, 0])
        raise DataError(f"{where}: row {row + 1} holds NaN or infinity; fill it in or drop the row")
    return tensor if tensor.ndim > 1 else tensor[:, None]


ZIP = b"PK"  # how a zip begins
MALFORMED = (ValueError, KeyError, TypeError, SyntaxError, RuntimeError, MemoryError, struct.error)


class Arrays(Mapping[str, Any]):
    """The arrays of a `.npz` file, or the one of a `.npy` file under the name "".

    An array is read when it is asked for, after its size was compared with that of the file and with the memory that
    is available. Nothing is unpickled.
    """

    def __init__(self, path: Path):
        """Look which arrays there are. Raises DataError."""
        if path.suffix not in (".npy", ".npz"):
            raise DataError(
                f"{path}: this data set reads .npy and .npz files, not {path.suffix or 'a file without suffix'}"
            )
        self.path = path
        self.members: dict[str, zipfile.ZipInfo | None] = {"": None}
        with open_data(path) as file, array_errors(path):
            if file.peek(2)[:2] != ZIP:  # type: ignore[attr-defined]
                return
            with zipfile.ZipFile(file) as archive:
                self.members = {
                    member.filename.removesuffix(".npy"): member for member in archive.infolist()
                }

    def __contains__(self, name: object) -> bool:
        return name in self.members

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, name: str) -> Any:
        member = self.members[name]
        with open_data(self.path) as file, array_errors(self.path):
            if member is None:
                return read_npy(file, os.fstat(file.fileno()).st_size, self.path)
            check_member(member, self.path)
            with zipfile.ZipFile(file) as archive, archive.open(member) as packed:
                return read_npy(packed, member.file_size, self.path)


@contextmanager
def array_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading an array into a DataError that names the file."""
    try:
        yield
    except (*UNREADABLE, *MALFORMED) as error:
        reason = one_line(error).replace(" when allow_pickle=False", "")
        raise DataError(
            f"{path} cannot be read as an array ({reason}); save it anew, as numbers"
        ) from error


def read_npy(file: Any, size: int, path: Path) -> Any:
    """Read an array in NumPy's format from a file of `size` bytes. Raises DataError if it says that it is larger."""
    import numpy

    version = numpy.lib.format.read_magic(file)
    if version > (2, 0):
        raise ValueError("the names of its fields are no ASCII")
    read = (
        numpy.lib.format.read_array_header_1_0
        if version == (1, 0)
        else numpy.lib.format.read_array_header_2_0
    )
    shape, _, kind = read(file)
    needed = math.prod(shape) * kind.itemsize
    if not kind.hasobject and needed > size:
        raise DataError(
            f"{path} is damaged: an array of shape {shape} has {needed:,} bytes, more than the file holds"
        )
    check_memory(needed, path)
    file.seek(0)
    return numpy.lib.format.read_array(file, allow_pickle=False)


def load_arrays(path: Path) -> Mapping[str, Any]:
    """Return the arrays of a `.npy` file (under the name "") or a `.npz` file. Raises DataError; never unpickles."""
    return Arrays(path)


def read_array(path: Path, name: str | None = None) -> Tensor:
    """Read numbers from `.npy`, or from `.npz` the array called `name`, `x` or `inputs`, or else its first one."""
    arrays = load_arrays(path)
    if not arrays:
        raise DataError(f"{path} holds no array")
    chosen = next((n for n in (name, "x", "inputs") if n in arrays), next(iter(arrays)))
    return numbers(arrays[chosen], f"{path}" + (f", array {chosen!r}" if chosen else ""))


def as_batch_of(inputs: Tensor, in_shape: Sequence[int], path: Path) -> Tensor:
    """Return inputs as (rows, *in_shape): as they are, one sample alone, or rows of another shape and the same size."""
    shape = tuple(in_shape)
    if tuple(inputs.shape[1:]) == shape:
        return inputs
    if math.prod(inputs.shape[1:]) == math.prod(shape):
        return inputs.reshape(-1, *shape)
    if inputs.numel() == math.prod(shape):
        return inputs.reshape(1, *shape)
    raise DataError(
        f"{path}: a row has shape {tuple(inputs.shape[1:])}, but the model takes {shape}"
    )


def standardise(inputs: Tensor, facts: dict[str, Any]) -> Tensor:
    """Return (inputs - mean) / std as new float32, with the facts' "mean" and "std".

    These are numbers or nested lists. It is computed in float64 if the facts have a true
    "float64", and else in float32.
    """
    dtype = torch.float64 if facts.get("float64") else torch.float32
    floats = inputs.to(dtype, copy=True)
    if "mean" not in facts:
        return floats.float()
    mean, std = (torch.as_tensor(facts[name], dtype=dtype) for name in ("mean", "std"))
    return floats.sub_(mean).div_(std).float()  # in place: a large set is held once


def read_batch(path: Path, facts: dict[str, Any]) -> Tensor:
    """Read `.npy`, or of `.npz` the array facts["array"], `x`, `inputs` or else the first, prepared as in training."""
    return standardise(
        as_batch_of(read_array(path, facts.get("array")), facts["in_shape"], path), facts
    )


class ArrayData(Data):
    """A data set in memory, of an array of inputs and an array of targets.

    Attributes:
        mean, std: what turns a raw input into an input of the model, (raw - mean) / std: numbers or nested lists.
        float64: whether that is computed in float64 (see `needs_float64`).
    """

    mean: Any
    std: Any
    float64: bool

    def __init__(
        self,
        inputs: Any,
        targets: Any,
        *,
        val: tuple[Any, Any] | None = None,
        test: tuple[Any, Any] | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
        per: Literal["feature", "all"] = "feature",
        unit: float = 1.0,
        target: Target | None = None,
        classes: Sequence[str] = (),
        scale_target: AutoScaling = "auto",
        name: str = "the data",
    ):
        """Draw the splits, number the classes and standardise the inputs by the moments of the training split.

        Args:
            inputs: numbers, shape (rows, *in_shape).
            targets: a number or a text a row, or numbers of shape (rows, values); `as_targets` says what is made of it.
            val: official validation inputs and targets; `val_fraction` is not used then.
            test: official test inputs and targets; `test_fraction` is not used then.
            val_fraction: share of the rows drawn for validation, in the proportions of the classes.
            test_fraction: share of the rows drawn for the test.
            split_seed: seed of the drawing.
            normalize: standardise the inputs; otherwise they are divided by `unit`.
            per: one mean and deviation for each feature (in pictures: for each channel), or one for all.
            unit: the raw value that stands for 1: 255 in pictures.
            target: the kind of target; None infers it.
            classes: names of the classes 0, 1, ...; none: the sorted labels themselves.
            scale_target: how values are scaled to train on (see `learn_scale`).
            name: what to call the data in an error.

        Raises DataError for lengths that differ, values that are no finite numbers and fewer than two classes.
        """
        given = {"train": (inputs, targets), "val": val, "test": test}
        parts, known = read_parts(
            {part: pair for part, pair in given.items() if pair}, target, classes, name
        )
        x, y = parts["train"]
        strata = y if known.kind == "class" else torch.zeros(len(x))
        rows = split_rows(
            strata, 0.0 if val else val_fraction, 0.0 if test else test_fraction, split_seed
        )
        start = 0
        for part, (inputs, _) in parts.items():
            rows.setdefault(part, torch.arange(start, start + len(inputs)))
            start += len(inputs)
        self.in_shape, self.out_shape = tuple(x.shape[1:]), known.out_shape
        self.target, self.classes = known.kind, known.classes
        self.strata = known.tensor if known.kind == "class" and known.tensor.ndim == 1 else None
        scaling = scale_target if known.kind == "value" else None
        read = list(parts.values())
        self.learn(read, per if normalize else None, unit, scaling, name, rows)

    def learn(
        self,
        read: Sequence[Pair],
        per: Literal["feature", "all"] | None,
        unit: float,
        scaling: AutoScaling | None,
        name: str,
        rows: Mapping[str, Tensor],
    ) -> None:
        """Measure the training rows, and set the splits.

        Args:
            read: inputs and targets as they were read, in one or more parts whose rows are numbered
                through.
            per: see `moments`; None divides the inputs by `unit` instead.
            unit: the raw value that stands for 1.
            scaling: of targets that are values; None for other targets.
            name: what to call the data in an error.
            rows: the numbers of the rows of each split.
        """
        self.rows = rows
        self.refit = partial(self.learn, read, per, unit, scaling, name)
        x, y = take_rows(read, rows["train"])
        self.float64 = False
        if per is None:
            check_digits(x, f"{name}: the inputs", "data.normalize=true")
            self.mean, self.std = 0.0, float(unit)
        else:
            check_integers(x, f"{name}: the inputs")
            self.float64 = needs_float64(x, per)
            self.mean, self.std = moments(x, per, self.float64)
        if scaling is not None:
            self.scale = learn_scale(y, torch.arange(len(y)), scaling, name)
        for part, taken in rows.items():
            x, y = take_rows(read, taken)
            answers = y if scaling is None else scaled(y, self.scale)
            setattr(self, part, TensorSplit(standardise(x, self.facts()), answers))

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        return read_batch(path, facts)

    def facts(self) -> dict[str, Any]:
        facts = standard_facts(self)
        if self.float64:
            facts["float64"] = True
        return facts


def take_rows(read: Sequence[Pair], rows: Tensor) -> Pair:
    """Return inputs and targets of some rows, which are numbered through all parts."""
    start = 0
    for inputs, targets in read:
        if len(rows) and start <= rows.min() and rows.max() < start + len(inputs):
            return inputs[rows - start], targets[rows - start]
        start += len(inputs)
    inputs, targets = (torch.cat(parts) for parts in zip(*read, strict=True))
    return inputs[rows], targets[rows]


def standard_facts(data: Any) -> dict[str, Any]:
    """Return how an input becomes what the model was trained on, and the classes, of a data set with a mean and std."""
    return {
        "in_shape": list(data.in_shape),
        "mean": data.mean,
        "std": data.std,
        "target": data.target,
        "classes": list(data.classes),
    }


def read_parts(
    given: Mapping[str, tuple[Any, Any]], target: Target | None, classes: Sequence[str], name: str
) -> tuple[dict[str, Pair], Targets]:
    """Return raw inputs and targets of each part as tensors; the classes are those of all parts together."""
    import numpy

    inputs = {part: numbers(x, f"{name}: the {part} inputs") for part, (x, _) in given.items()}
    for part, (_, y) in given.items():
        if len(y) != len(inputs[part]):
            raise DataError(f"{name}: {len(inputs[part])} {part} inputs, but {len(y)} targets")
        if inputs[part].shape[1:] != inputs["train"].shape[1:]:
            raise DataError(
                f"{name}: {part} inputs have shape {tuple(inputs[part].shape[1:])}, "
                f"those for training {tuple(inputs['train'].shape[1:])}"
            )
    known = as_targets(
        numpy.concatenate([numpy.asarray(y) for _, y in given.values()]), target, classes, name
    )
    pieces = known.tensor.split([len(x) for x in inputs.values()])
    return {part: (inputs[part], piece) for part, piece in zip(given, pieces, strict=True)}, known
