"""Data sets in Arrow files, which may be larger than the memory."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from framework import (
    Batch,
    Data,
    DataError,
    InputFile,
    InputRows,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Preparation,
    Rate,
    Scale,
    Shape,
    Shown,
    datasets,
    memory,
    paths,
)

from .arrow_splits import (
    MappedFields,
    MappedImages,
    MappedNumbers,
    MappedSequences,
    MappedSounds,
    MappedTexts,
    read_numbers,
)
from .audio import SoundData
from .images import MAX_MEASURED as MAX_MEASURED_IMAGES, ImageFolder, check_pillow
from .preparations.arrays import Standardize
from .preparations.columns import Columns
from .preparations.sequences import Waveforms
from .preparations.texts import Tokens
from .readers.arrays import read_batch
from .readers.arrow_files import (
    Layout,
    MappedColumn,
    MappedFile,
    MappedTable,
    is_binary,
    is_text,
    layout_of,
    read_column,
    require_name,
)
from .readers.class_folders import PART_FOLDERS
from .readers.hf_folders import (
    Features,
    class_names,
    feature_type,
    features_of,
    find_hf_parts,
)
from .readers.scaling import (
    AutoScaling,
    check_digits,
    check_integers,
    fit_scale,
    moments,
    needs_float64,
    scaled,
    scaled_as_before,
)
from .readers.splits import split_parts
from .readers.targets import Targets, as_targets, known_classes
from .readers.tokenizers import TokenizerPart, load_tokenizer
from .tables import target_cells
from .text import TextData, decode_texts

SUFFIXES = (".arrow", ".feather", ".ipc")
MAX_MEASURED = 10_000  # rows from which means and deviations are computed
MAX_MEASURED_BYTES = 2**26
MAX_FITTED_TEXTS = 20_000  # texts to which the tokenizer is fitted
SOUND_STARTS = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"\xff\xfb", b"\xff\xf3")

Coded = Literal["image", "audio"]
Rows = Mapping[str, Tensor]


@datasets.register("arrow")
class Arrow(Data):
    """Rows of memory-mapped Arrow files, which may be larger than the memory.

    The files are Arrow IPC files (Feather 2) or streams without compression; `framework data
    convert IN OUT` writes them. Only the columns in use are read. Inputs are read from the file
    when they are needed, in any order. The targets, and 24 bytes for each row, are in memory.

    Inputs are one of: columns of numbers or of lists of numbers of one shape; one column of lists
    of integers of unequal length, which are token ids (0 is padding); one column of texts; or one
    column of images or sounds, as the bytes of their files. Texts, images and sounds are decoded by
    the workers of the loader (`loader.workers`).

    With batch=dict, a batch has the inputs and the targets by the names of their columns, for a
    task with `inputs` and `target`. The inputs are columns of numbers, each a field of its own.
    Integers and booleans are int64 and are not standardized. Lists of integers of unequal length
    are padded with 0 to the longest list of their column in a batch.

    The checks of other data sets that read all inputs (NaN, infinity) are made only for the rows
    that are measured. A file must not be changed while a run reads it.

    Args:
        path: an Arrow file; or a folder of Arrow files (.arrow, .feather, .ipc). Files with the
            names train, val or test (also train-00000.arrow) are official parts.
        inputs: the columns to predict from; null: the only column of images, sounds or texts,
            otherwise all columns of numbers but the target.
        target: the column to predict.
        batch: tuple: a batch is (inputs, targets); dict: it has the columns by name.
        target_kind: null infers it: texts and at most 20 different integers are classes.
        val_path: a file or folder with the official validation set; val_fraction is not used then.
        test_path: a file or folder with the official test set; test_fraction is not used then.
        shape: reshape each input of numbers to this shape, e.g. [1,28,28].
        encoded: whether a column of bytes contains image or sound files; null: found by the
            first one.
        size: of images: height and width in pixels, to which the central square is scaled.
        color: of images: three channels, or one.
        sample_rate: of sounds: samples per second; another rate is an error without resample.
        seconds: of sounds: length of an input, to which sounds are cut or padded with zeros.
        resample: of sounds: convert other rates to sample_rate.
        tokenizer: of texts: converts text to ids; fitted to at most 20,000 training texts, evenly
            spaced.
        max_length: of texts and token ids: maximum number of tokens; the rest is cut off. With
            batch=dict, of all lists of unequal length.
        bucket: of token ids: number of batches that are sorted by length together; 0 for none.
        val_fraction: share of the rows for validation, with the same share of each class.
        test_fraction: share of the rows for the test.
        split_seed: seed of the draw.
        normalize: standardize each feature (of images, each channel) by at most 10,000 rows (256
            images) of the training split, evenly spaced.
        scale_target: train on values that are standardized, with log after their logarithm;
            metrics and predictions are in the target's own unit. auto: see data=npz.
    """

    input_suffixes = SUFFIXES

    def __init__(
        self,
        path: Path,
        inputs: list[str] | None = None,
        target: str = "label",
        batch: Literal["tuple", "dict"] = "tuple",
        target_kind: Literal["class", "value", "labels"] | None = None,
        val_path: Path | None = None,
        test_path: Path | None = None,
        shape: list[PositiveInt] | None = None,
        encoded: Coded | None = None,
        size: PositiveInt = 64,
        color: Literal["rgb", "gray"] = "rgb",
        sample_rate: PositiveInt = 16_000,
        seconds: PositiveFloat = 1.0,
        resample: bool = False,
        tokenizer: TokenizerPart = "word",
        max_length: PositiveInt = 256,
        bucket: NonNegativeInt = 16,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
        scale_target: AutoScaling = "auto",
    ):
        parts = self.find_parts(path.expanduser())
        for part, given in (("val", val_path), ("test", test_path)):
            if given is not None:
                parts[part] = self.find_parts(given.expanduser())["train"]
        files: list[Path] = []
        for found in parts.values():
            files += found
        first = MappedFile(files[0])
        features = features_of(first.schema)
        names = choose_inputs(first, inputs, target, features)
        chosen = paths.override("data.inputs", names) if inputs else "data.inputs=null"
        self.table = MappedTable(files, names, chosen)
        self.kind = "fields" if batch == "dict" else self.find_kind(features, encoded)
        self.target_name = target
        targets = self.read_targets(target, target_kind, features)
        self.target = targets.kind
        self.classes = targets.classes
        self.out_shape = targets.out_shape
        if targets.kind == "class":
            self.strata = targets.tensor
        self.mean: Any = 0.0
        self.std: Any = 1.0
        self.float64 = False
        self.max_length = max_length
        self.bucket = bucket
        self.make_tokenizer = tokenizer
        self.image_shape = (3 if color == "rgb" else 1, size, size)
        self.sounds = {"sample_rate": sample_rate, "resample": resample, "min_seconds": 0.0}
        if self.kind == "audio":
            sound = SoundData(self.classes, sample_rate, seconds, resample)
            self.in_shape = sound.in_shape
        else:
            self.prepare_inputs(shape)
        sizes = {}
        start = 0
        for part, found in parts.items():
            sizes[part] = sum(self.table.sizes[start : start + len(found)])
            start += len(found)
        train_size = sizes["train"]
        strata = torch.zeros(train_size) if self.strata is None else self.strata[:train_size]
        rows = split_parts(strata, sizes, val_fraction, test_fraction, split_seed)
        self.fit(targets.tensor, normalize, scale_target, rows)

    def find_parts(self, path: Path) -> dict[str, list[Path]]:
        """Return the files of train, val and test; a path without such parts is train."""
        return find_arrow_parts(path)

    def find_kind(self, features: Features, encoded: Coded | None) -> str:
        """Return the kind of the inputs: numbers, sequences, text, image or audio."""
        column = next(iter(self.table.columns.values()))
        is_bytes = [other.layout.is_bytes for other in self.table.columns.values()]
        if not any(is_bytes):
            return "numbers"  # or sequences: `prepare_inputs` reads their lengths
        if len(is_bytes) > 1:
            raise DataError(
                f"{paths.override('data.inputs', self.table.names)}: expected one column of texts, "
                f"images or sounds, or only columns of numbers ({self.table.name})"
            )
        if is_text(column.layout.leaf):
            return "text"
        kind = feature_type(features, column.name).lower()
        if encoded is None and kind in ("image", "audio"):
            encoded = "image" if kind == "image" else "audio"
        if encoded is None:
            is_sound = column.read_bytes(0).startswith(SOUND_STARTS)
            encoded = "audio" if is_sound else "image"
        if encoded == "image":
            check_pillow()
        return encoded

    def read_targets(self, target: str, kind: Any, features: Features) -> Targets:
        """Return the targets of all rows."""
        import pyarrow

        setting = paths.override("data.target", target)
        name = f"{self.table.name}, column {target!r}"
        cells = read_column(self.table.files, target, setting)
        layout = layout_of(cells.type)
        if layout.levels and layout.is_number:
            return as_targets(read_vectors(cells, name), kind, name=name)
        if not (layout.is_number or is_text(cells.type) or str(cells.type) == "uint64"):
            raise DataError(
                f"{setting}: expected numbers or texts in {name}, got the type {cells.type}"
            )
        if pyarrow.types.is_float16(cells.type):
            cells = cells.cast("float32")
        values = target_cells(cells, target, kind, Path(self.table.name))
        names = class_names(features, target) if kind in (None, "class") else []
        return as_targets(values, "class" if names else kind, names, name)

    def prepare_inputs(self, shape: Sequence[int] | None) -> None:
        """Set the shape of the inputs."""
        self.shapes: list[tuple[int, ...]] = []
        self.lengths: Tensor | None = None
        if self.kind == "image":
            self.in_shape = self.image_shape
            return
        if self.kind == "text":
            self.in_shape = (self.max_length,)
            return
        if self.kind == "fields":
            self.prepare_fields()
            return
        columns = list(self.table.columns.values())
        for column in columns:
            column_shape, self.lengths = self.shape_and_lengths(column)
            self.shapes.append(column_shape)
        if self.lengths is not None:
            self.kind = "sequences"
            self.in_shape = self.shapes[0]
            return
        count = sum(torch.Size(one).numel() for one in self.shapes)
        self.in_shape = self.shapes[0] if len(columns) == 1 else (count,)
        if shape is not None:
            if torch.Size(shape).numel() != count:
                raise DataError(
                    f"data.shape={list(shape)}: rows of {count} numbers cannot be reshaped "
                    f"({self.table.name})"
                )
            self.in_shape = tuple(shape)
        if self.in_shape == ():
            self.in_shape = (1,)

    def prepare_fields(self) -> None:
        """Set how each column becomes a field of a batch, and the shape of the first field."""
        self.fields: dict[str, dict[str, Any]] = {}
        self.lengths_of: dict[str, Tensor] = {}
        for name, column in self.table.columns.items():
            if not column.layout.is_number:
                raise DataError(
                    f"{paths.override('data.inputs', self.table.names)}: expected columns of "
                    f"numbers with data.batch=dict, got {column.layout.leaf} in column {name!r} "
                    f"({self.table.name})"
                )
            shape, lengths = self.shape_and_lengths(column)
            self.shapes.append(shape)
            self.fields[name] = {"shape": list(shape)}
            if not column.dtype.is_floating_point:
                self.fields[name]["integer"] = True
            if lengths is not None:
                same = (key for key, other in self.lengths_of.items() if lengths.equal(other))
                self.fields[name]["max_length"] = self.max_length
                self.fields[name]["lengths_of"] = next(same, name)
                self.lengths_of[name] = lengths
        self.in_shape = self.shapes[0] or (1,)

    def shape_and_lengths(self, column: MappedColumn) -> tuple[tuple[int, ...], Tensor | None]:
        """Return the shape of the values of a column, and of lists of unequal length the lengths.

        The shape of such lists is the length of the longest one. They are cut to `max_length`.
        """
        shape = column.fixed_shape
        if shape is not None:
            return shape, None
        if len(column.layout.levels) > 1:
            return column.shape_of(0), None
        lengths = column.lengths()
        shortest = int(lengths.min())
        longest = int(lengths.max())
        if shortest == longest:
            return (longest,), None
        may_be_ragged = self.kind == "fields" or len(self.table.columns) == 1
        if not column.layout.is_integer or not may_be_ragged:
            raise DataError(
                f"{paths.override('data.inputs', self.table.names)}: expected lists of one length "
                "(or integers as the only input or with data.batch=dict, which are token ids), got "
                f"lists of {shortest} to {longest} items in column {column.name!r} of "
                f"{self.table.name}"
            )
        if shortest == 0:
            raise DataError(f"{column.where(int(lengths.argmin()))} is empty; drop the row")
        lengths = lengths.clamp(max=self.max_length)
        return (int(lengths.max()),), lengths

    def fit(self, answers: Tensor, normalize: bool, scaling: AutoScaling, rows: Rows) -> None:
        """Measure the training rows, and set the splits.

        Args:
            answers: the targets of all rows.
            normalize: standardize the inputs by the training rows.
            scaling: how targets that are values are scaled.
            rows: the row numbers of each split.
        """
        self.rows = rows
        self.refit = partial(self.fit, answers, normalize, scaling)
        if self.target == "value":
            self.scale = fit_scale(answers, rows["train"], scaling, self.table.name)
            answers = scaled(answers, self.scale)
        if self.kind == "numbers":
            self.measure_numbers(rows["train"], normalize)
        elif self.kind == "fields":
            self.measure_fields(rows["train"], normalize)
        elif self.kind == "image":
            self.measure_images(rows["train"], normalize)
        elif self.kind == "text":
            self.fit_tokenizer(rows["train"])
        for part, chosen in rows.items():
            setattr(self, part, self.make_split(chosen, answers[chosen]))

    def measure_numbers(self, training: Tensor, normalize: bool) -> None:
        """Set mean and deviation of the inputs."""
        sample = measured_rows(training, self.in_shape)
        raw = read_numbers(self.table, sample, self.shapes, self.in_shape)
        found = self.measure(raw, sample, "the inputs", normalize)
        if found:
            self.mean = found["mean"]
            self.std = found["std"]
            self.float64 = "float64" in found

    def measure_fields(self, training: Tensor, normalize: bool) -> None:
        """Set mean and deviation of the columns that are not integers."""
        for name, facts in self.fields.items():
            column = self.table.columns[name]
            if name in self.lengths_of or not column.dtype.is_floating_point:
                continue
            sample = measured_rows(training, facts["shape"])
            raw = column.read(sample, facts["shape"] or [1])
            found = self.measure(raw, sample, f"column {name!r}", normalize)
            self.fields[name] = {"shape": facts["shape"]} | found

    def measure(self, raw: Tensor, rows: Tensor, name: str, normalize: bool) -> dict[str, Any]:
        """Return how numbers are standardized, see `standardize`; empty if they are not.

        Args:
            raw: the numbers of some training rows.
            rows: the numbers of these rows.
            name: what the numbers are, for errors.
            normalize: whether they are standardized.

        Raises:
            DataError: they are not finite, or float32 or float64 cannot hold them.
        """
        if raw.dtype == torch.float16:
            raw = raw.float()
        self.check_finite(raw, rows, name)
        where = f"{self.table.name}: {name}"
        if not normalize:
            check_digits(raw, where, "data.normalize=true")
            return {}
        check_integers(raw, where)
        float64 = needs_float64(raw)
        mean, std = moments(raw, "feature", float64)
        facts: dict[str, Any] = {"mean": mean, "std": std}
        if float64:
            facts["float64"] = True
        return facts

    def check_finite(self, raw: Tensor, rows: Tensor, name: str) -> None:
        """Raise DataError for NaN and infinity in the rows that are measured."""
        if not raw.is_floating_point():
            return
        is_bad = ~raw.float().isfinite().flatten(1).all(1)
        if is_bad.any():
            row = int(rows[is_bad.nonzero()[0, 0]])
            raise DataError(
                f"{self.table.name}: row {row + 1} has NaN or infinity (or a number beyond "
                f"float32) in {name}; fill it in or drop the row"
            )

    def measure_images(self, training: Tensor, normalize: bool) -> None:
        """Set mean and deviation of each channel, see `images.measure`."""
        if not normalize:
            self.std = 255.0
            return
        split = MappedImages(self.table, training, training, self.facts())
        rows = evenly_spaced(training, MAX_MEASURED_IMAGES).tolist()
        self.mean, self.std = moments(torch.stack([split.read_pixels(row) for row in rows]))

    def fit_tokenizer(self, training: Tensor) -> None:
        """Fit the tokenizer to training texts."""
        column = next(iter(self.table.columns.values()))
        self.tokenizer = self.make_tokenizer()
        rows = evenly_spaced(training, MAX_FITTED_TEXTS).tolist()
        self.tokenizer.fit(column.read_text(row) for row in rows)
        self.vocabulary = self.tokenizer.size

    def make_split(self, rows: Tensor, labels: Tensor) -> Any:
        """Return a split of some rows, with their targets."""
        facts = self.facts()
        if self.kind == "sequences":
            assert self.lengths is not None
            return MappedSequences(self.table, rows, labels, self.lengths[rows], self.bucket)
        if self.kind == "fields":
            lengths = {name: lengths[rows] for name, lengths in self.lengths_of.items()}
            name = self.target_name
            return MappedFields(self.table, rows, labels, name, self.fields, lengths, self.bucket)
        if self.kind == "image":
            return MappedImages(self.table, rows, labels, facts)
        if self.kind == "audio":
            return MappedSounds(self.table, rows, labels, facts)
        if self.kind == "text":
            split = MappedTexts(self.table, rows, labels, {"max_length": self.max_length})
            split.tokenizer = self.tokenizer
            return split
        return MappedNumbers(self.table, rows, labels, self.shapes, facts)

    def facts(self) -> dict[str, Any]:
        """Return how a row becomes an input, and the classes."""
        facts: dict[str, Any] = {
            "kind": self.kind,
            "inputs": self.table.names,
            "in_shape": list(self.in_shape),
            "target": self.target,
            "classes": list(self.classes),
        }
        if self.kind in ("numbers", "image"):
            facts["mean"] = self.mean
            facts["std"] = self.std
        if self.kind == "fields":
            facts["fields"] = self.fields
        if self.kind == "numbers":
            facts["shapes"] = [list(shape) for shape in self.shapes]
        if self.float64:
            facts["float64"] = True
        if self.kind == "audio":
            facts.update(self.sounds)
        if self.kind == "text":
            facts["tokenizer"] = self.make_tokenizer.entry.name
            facts["learned"] = self.tokenizer.state()
            facts["text"] = self.table.names[0]
        if self.kind in ("text", "sequences"):
            facts["max_length"] = self.max_length
        return facts

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Batch:
        """Read an Arrow file; or a file as data=npz, image_folder, audio_folder and text_table."""
        kind = facts["kind"]
        if path.suffix in SUFFIXES:
            return read_arrow_inputs(path, facts)
        if kind == "numbers":
            return read_batch(path, facts)
        if kind == "image":
            return ImageFolder.read_inputs(path, facts)
        if kind == "audio":
            return SoundData.read_inputs(path, facts)
        if kind == "text":
            return TextData.read_inputs(path, facts)
        raise DataError(f"{path}: expected a file with the suffix {', '.join(SUFFIXES)}")

    @classmethod
    def read_chunks(cls, file: InputFile, facts: dict[str, Any]) -> Iterator[InputRows]:
        """Yield the rows of an Arrow file, or the inputs of another file as `read_inputs`."""
        kind = facts["kind"]
        if file.path.suffix in SUFFIXES and file.stream is None:
            yield from read_arrow_chunks(file, facts)
        elif kind == "text":
            yield from TextData.read_chunks(file, facts)
        else:
            yield from super().read_chunks(file, facts)

    @classmethod
    def read_labelled(
        cls,
        path: Path,
        facts: dict[str, Any],
        settings: Mapping[str, Any],
        scale: Scale | None = None,
    ) -> Any:
        """Return the rows of an Arrow file with the columns of the training."""
        table = MappedTable([path], facts["inputs"])
        label = settings["target"]
        cells = read_column(table.files, label)
        name = f"{path}, column {label!r}"
        kind = facts["target"]
        layout = layout_of(cells.type)
        if layout.levels and layout.is_number:
            targets = as_targets(read_vectors(cells, name), kind, name=name).tensor
        else:
            values = target_cells(cells, label, kind, path)
            if kind == "class":
                targets = known_classes(values, facts["classes"], name)
            else:
                targets = as_targets(values, kind, name=name).tensor
        if kind == "value":
            targets = scaled_as_before(targets, scale, name)
        rows = torch.arange(len(table))
        if facts["kind"] == "sequences":
            column = next(iter(table.columns.values()))
            lengths = column.lengths().clamp(max=facts["max_length"])
            return MappedSequences(table, rows, targets, lengths, 0)
        if facts["kind"] == "fields":
            return fields_split(table, rows, targets, label, facts)
        return mapped_split(table, rows, targets, facts)

    @classmethod
    def preparation(cls, facts: dict[str, Any], in_shape: Shape) -> Preparation | None:
        kind = facts["kind"]
        if kind == "fields":
            return Columns(facts["fields"])
        if kind == "audio":
            return Waveforms(facts, in_shape)
        if kind in ("text", "sequences"):
            return Tokens(facts, in_shape[0], classifies=True)
        return Standardize(facts, in_shape, pixels=kind == "image")

    @classmethod
    def show(cls, inputs: Tensor, facts: dict[str, Any]) -> Shown:
        kind = facts["kind"]
        if kind in ("text", "sequences"):
            return Shown({"text": decode_texts(inputs, facts)})
        return ImageFolder.show(inputs, facts) if kind == "image" else super().show(inputs, facts)


@datasets.register("hf_dataset")
class HfDataset(Arrow):
    """A folder that Hugging Face `save_to_disk` writes, memory-mapped; see data=arrow.

    The package `datasets` is not needed. The splits train, val (valid, validation) and test of a
    `DatasetDict` are official parts. Features of the types Image, Audio and ClassLabel are known by
    the data set; sounds and images have to be stored in it, as `save_to_disk` does.
    """

    def find_parts(self, path: Path) -> dict[str, list[Path]]:
        return find_hf_parts(path)


def find_arrow_parts(path: Path) -> dict[str, list[Path]]:
    """Return the Arrow files of train, val and test; a path without such parts is train.

    Raises:
        DataError: the path does not exist, or is a folder without Arrow files.
    """
    if not path.is_dir():
        return {"train": [path]}
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        raise DataError(f"data.path={path} was written by `save_to_disk`; use data=hf_dataset")
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        raise DataError(f"data.path={path}: the folder has no files with {', '.join(SUFFIXES)}")
    parts: dict[str, list[Path]] = {}
    for part, names in PART_FOLDERS.items():
        found = [file for file in files if file.name.replace("-", ".").split(".")[0] in names]
        if found:
            parts[part] = found
    return parts if "train" in parts else {"train": files}


def choose_inputs(
    file: MappedFile, inputs: Sequence[str] | None, target: str, features: Features
) -> list[str]:
    """Return the names of the columns of inputs.

    Raises:
        DataError: there is no column that can be an input, or no target, or it is an input too.
    """
    if inputs:
        if target in inputs:
            raise DataError(
                f"{paths.override('data.inputs', list(inputs))}: {target!r} is the target and "
                "cannot be an input too"
            )
        return list(inputs)
    # a column of another name would be listed as a possible input
    require_name(file.schema, target, file.path, paths.override("data.target", target))
    encoded = []
    numbers = []
    for field in file.schema:
        layout: Layout = layout_of(field.type)
        if field.name == target:
            continue
        if is_text(layout.leaf) or is_binary(layout.leaf):
            encoded.append(field.name)
        elif layout.is_number:
            numbers.append(field.name)
    media = [name for name in encoded if feature_type(features, name) in ("Image", "Audio")]
    if len(media) == 1:
        return media
    if len(encoded) == 1 and not numbers:
        return encoded
    if encoded:
        options = paths.override("data.inputs", [*encoded, *numbers])
        raise DataError(
            f"data.inputs=null: {file.path} has several columns that can be inputs; name them, "
            f"out of {options}"
        )
    if not numbers:
        raise DataError(
            f"data.inputs=null: expected a column of numbers, texts or bytes besides {target!r} in "
            f"{file.path}, got none"
        )
    return numbers


def read_vectors(cells: Any, name: str) -> Any:
    """Return a column of lists of numbers as a NumPy array, shape (rows, values).

    Raises:
        DataError: a list has another length than the first one.
    """
    import numpy
    from pyarrow import compute

    length = len(cells[0].as_py() or [])
    lengths = compute.list_value_length(cells)
    if cells.null_count or not compute.all(compute.equal(lengths, length)).as_py():
        raise DataError(f"{name}: expected lists of one length as targets")
    flat = compute.list_flatten(cells)
    if flat.null_count:
        raise DataError(f"{name}: a target is empty; fill it in or drop the row")
    return numpy.asarray(flat).reshape(len(cells), length)


def measured_rows(training: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the training rows whose numbers are measured, for rows of a shape."""
    row_bytes = 8 * torch.Size(shape).numel()
    most = max(256, min(MAX_MEASURED, MAX_MEASURED_BYTES // row_bytes))
    return evenly_spaced(training, most)


def evenly_spaced(rows: Tensor, most: int) -> Tensor:
    """Return at most `most` of the rows, evenly spaced."""
    step = -(-len(rows) // most)
    return rows[::step].contiguous()


def read_arrow_inputs(path: Path, facts: dict[str, Any]) -> Batch:
    """Return all rows of an Arrow file as a batch of inputs."""
    table = MappedTable([path], facts["inputs"])
    shapes = [facts["in_shape"]]
    if facts["kind"] == "fields":
        shapes = [field["shape"] for field in facts["fields"].values()]
    size = sum(torch.Size(shape).numel() for shape in shapes)
    memory.check_room(8 * len(table) * size, f"{len(table)} rows of {path}")
    return read_arrow_rows(table, torch.arange(len(table)), facts)


def read_arrow_chunks(file: InputFile, facts: dict[str, Any]) -> Iterator[InputRows]:
    """Yield the rows of an Arrow file in chunks."""
    table = MappedTable([file.path], facts["inputs"])
    ids = {name: read_column(table.files, name, f"--id {name}") for name in file.ids}
    for start in range(0, len(table), file.rows):
        rows = torch.arange(start, min(start + file.rows, len(table)))
        cells = {name: column[start : start + len(rows)] for name, column in ids.items()}
        names = {name: column.to_pylist() for name, column in cells.items()}
        yield InputRows(read_arrow_rows(table, rows, facts), names, start + 1)


def read_arrow_rows(table: MappedTable, rows: Tensor, facts: dict[str, Any]) -> Batch:
    """Return some rows of an Arrow file as a batch of inputs."""
    if facts["kind"] == "fields":
        fields = fields_split(table, rows, rows, "", facts)
        widths = {name: facts["fields"][name]["shape"][0] for name in fields.lengths_of}
        return fields.inputs(torch.arange(len(rows)), widths)
    if facts["kind"] == "sequences":
        column = next(iter(table.columns.values()))
        longest = facts["in_shape"][0]
        lengths = column.lengths()[rows].clamp(max=min(longest, facts["max_length"]))
        return column.read_lists(rows, lengths, longest)
    split = mapped_split(table, rows, rows, facts)
    every = torch.arange(len(rows))
    if isinstance(split, MappedNumbers):
        return split.gather(every)[0]
    return torch.stack([split.read(row) for row in rows.tolist()])


def fields_split(
    table: MappedTable, rows: Tensor, labels: Tensor, target: str, facts: dict[str, Any]
) -> MappedFields:
    """Return a split of named fields, prepared as in training."""
    lengths = {}
    for name, field in facts["fields"].items():
        if "max_length" in field:
            most = min(*field["shape"], field["max_length"])
            lengths[name] = table.columns[name].lengths()[rows].clamp(max=most)
    return MappedFields(table, rows, labels, target, facts["fields"], lengths, 0)


def mapped_split(table: MappedTable, rows: Tensor, labels: Tensor, facts: dict[str, Any]) -> Any:
    """Return a split of numbers, texts, images or sounds, prepared as in training."""
    kind = facts["kind"]
    if kind == "numbers":
        shapes = [tuple(shape) for shape in facts["shapes"]]
        return MappedNumbers(table, rows, labels, shapes, facts)
    splits = {"image": MappedImages, "audio": MappedSounds, "text": MappedTexts}
    split = splits[kind](table, rows, labels, facts)
    if isinstance(split, MappedTexts):
        split.tokenizer = load_tokenizer(facts)
    return split
