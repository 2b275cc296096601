"""Data sets, and how their batches are read.

A batch is a tuple of tensors, such as (inputs, targets), or nested, such as a dict of tensors (see
`runtime/batch.py`). A `Data` has splits. A split is a `TensorSplit` (in memory) or any map-style
`torch.utils.data.Dataset` of (input, target), or of dicts.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    TypeGuard,
    runtime_checkable,
)

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from framework.errors import DataError, FrameworkError, RunError, SettingError
from framework.registry.annotations import NonNegativeFloat, PositiveInt, Range
from framework.registry.kinds import Shape
from framework.runtime import seeds
from framework.runtime.batch import Batch as Batch
from framework.runtime.copy_stream import CopyStream
from framework.runtime.memory import check_room
from framework.runtime.memory_format import ChannelsLast, choose_memory_format
from framework.system.files import read_json

from . import SPLITS
from .batch_slice import BatchSlice, filled
from .foreign_loader import (
    READ_AGAIN as READ_AGAIN,
    ForeignLoader as ForeignLoader,
    copy_batch,
    known_length as known_length,
    set_epoch,
)
from .input_rows import InputFile, InputRows
from .preparation import Preparation
from .sample_order import CPU, BatchIndices, Order, sequential, shuffled
from .shown import Shown as Shown, show_numbers
from .token_splits import (
    GatheredSplit as GatheredSplit,
    RaggedSplit as RaggedSplit,
    WindowSplit as WindowSplit,
)
from .workers import (
    MEMORY,
    DeterministicSamples,
    IndexBatches,
    SeededSamples,
    Split as Split,
    batch_of,
    collate,
    read_all_samples,
    read_batches,
)

Target = Literal["class", "labels", "value", "none"]


class TensorSplit:
    """A split in memory: tensors whose first axis is the sample.

    Args:
        tensors: tensors of one length, such as inputs and targets.
        fields: tensors of one length by name, instead of `tensors`; then batches are dicts.

    Attributes:
        tensors: the tensors.
        names: those of the fields; empty for batches that are tuples.

    Raises:
        DataError: the tensors have different lengths.
    """

    names: tuple[str, ...] = ()

    def __init__(self, *tensors: Tensor, **fields: Tensor):
        if tensors and fields:
            raise DataError(
                "expected tensors or named fields for a split, got both; the fields are "
                f"{', '.join(fields)}"
            )
        self.names = tuple(fields)
        self.tensors = tensors or tuple(fields.values())
        lengths = [len(tensor) for tensor in self.tensors]
        if len(set(lengths)) != 1:
            raise DataError(f"expected tensors of one length for a split, got lengths {lengths}")

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: Any) -> Batch:
        """Return the samples at an int, a slice or a tensor of indices."""
        return self.as_batch([tensor[index] for tensor in self.tensors])

    def as_batch(self, tensors: Iterable[Tensor]) -> Batch:
        """Return tensors as a batch: a dict if the split has names, otherwise a tuple."""
        if self.names:
            return dict(zip(self.names, tensors, strict=True))
        return tuple(tensors)

    def content(self) -> Any:
        """Return the content of the samples, see `Data`."""
        return self.tensors

    def to(self, device: torch.device) -> "TensorSplit":
        """Return the split on a device."""
        return split_of(self.as_batch([tensor.to(device) for tensor in self.tensors]))


def split_of(columns: Batch) -> TensorSplit:
    """Return a split in memory of a tuple of tensors, or of a dict of them by name."""
    if isinstance(columns, Mapping):
        return TensorSplit(**{str(name): column for name, column in columns.items()})
    return TensorSplit(*columns)


def is_in_memory(split: Split) -> TypeGuard[TensorSplit]:
    """Return whether the samples of a split are the rows of its tensors.

    This is not known of a subclass with another `__getitem__`.
    """
    return isinstance(split, TensorSplit) and type(split).__getitem__ is TensorSplit.__getitem__


class Scale(NamedTuple):
    """The scaling of targets: (amount - mean) / std, after the logarithm if `log`.

    Attributes:
        mean: a number, or one for each value of a target.
        std: a number, or one for each value of a target.
        log: whether the logarithm of the amounts is scaled.
    """

    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    log: bool = False

    def transform(self, amounts: Tensor) -> Tensor:
        """Return the targets for amounts, in their dtype."""
        mean, std = self._as_tensors(amounts)
        if self.log:
            amounts = amounts.log()
        return (amounts - mean) / std

    def inverse_transform(self, targets: Tensor) -> Tensor:
        """Return targets, or outputs that predict them, as amounts in float64.

        float32 cannot represent the digits of amounts far from 0. (mps, which does not support
        float64, uses float32.)
        """
        if targets.device.type != "mps":
            targets = targets.double()
        mean, std = self._as_tensors(targets)
        amounts = targets * std + mean
        return amounts.exp() if self.log else amounts

    def _as_tensors(self, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Return mean and std as numbers, or as tensors of the dtype and device of `like`."""
        if isinstance(self.mean, int | float) and isinstance(self.std, int | float):
            return self.mean, self.std
        return like.new_tensor(self.mean), like.new_tensor(self.std)


class Data:
    """A data set. The `__init__` of a plugin reads it and sets these attributes.

    A split may have a method `content()`. It returns everything that determines the samples, in
    their order: tensors, numbers, texts, lists of them, and lists of paths, which stand for the
    content of the files. A run can be resumed with data of the same content at another path.

    Attributes:
        train: the training split.
        val: the validation split, or None.
        test: the test split, or None.
        in_shape: shape of one input, without the batch axis.
        out_shape: (classes,) for classes, (labels,) for labels, (values,) for values.
        input_suffixes: suffixes of the files to predict in a folder; empty if `read_inputs` reads
            folders itself, or reads none.
        single_input_suffixes: suffixes of the files that are one input, such as an image.
        max_pixel: value of a white pixel before the inputs are scaled; None if unknown.
        target: "class" (int64 index, shape ()), "labels" (0/1 floats, shape (labels,)) or "value"
            (floats, shape (values,)).
        classes: the names of classes or labels, in the order of the outputs; empty for values.
        characters: for a text as tokens, the number of characters of each token, shape
            (vocabulary,); None for other data.
        columns: for a table with categories as indices, one entry for each input: 0 for a number,
            n for an index from 0 to n - 1.
        scale: the scaling of the targets; metrics and predictions undo it.
        rows: for `refit`, the indices of the samples of each split, counted in reading order.
        refit: splits the samples again by other rows; statistics (mean, vocabulary) are measured on
            rows["train"]. Cross-validation calls it. A method, or a `functools.partial` of one, is
            pickled and copied with the data set. It may hold all samples: set it to None to release
            them. If it is None, cross-validation cuts the splits without measuring again.
        strata: the class of each sample read, if all folds need equal shares of the classes.
        in_time_order: whether a fold is a block of consecutive rows instead of random rows.
        measures_training: whether statistics are measured on the training split; False avoids a
            warning if there is no `refit`.
        fold: the fold "K/N" that `refit` has set; None without cross-validation.

    Raises:
        DataError: the data is missing, empty or malformed; with the file and the expected content.
    """

    train: Split
    val: Split | None = None
    test: Split | None = None
    in_shape: Shape
    out_shape: Shape
    target: Target = "class"
    classes: Sequence[str] = ()
    characters: Tensor | None = None
    columns: Sequence[int] = ()
    scale: Scale | None = None
    rows: Mapping[str, Tensor] = MappingProxyType({})
    refit: Callable[[Mapping[str, Tensor]], None] | None = None
    strata: Tensor | None = None
    in_time_order: bool = False
    measures_training: bool = True
    fold: str | None = None
    input_suffixes: ClassVar[Sequence[str]] = ()
    single_input_suffixes: ClassVar[Sequence[str]] = ()
    max_pixel: ClassVar[float | None] = None

    def facts(self) -> dict[str, Any]:
        """Return the facts that `read_inputs` needs, as JSON types; the run folder stores them."""
        return {}

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read a file of the user as a batch of inputs, prepared as in training.

        Args:
            path: the file.
            facts: the result of `facts` in training; the training data may be missing.

        Returns:
            Inputs of shape (rows, *in_shape).

        Raises:
            DataError: the file cannot be read, or this method is not implemented.
        """
        raise DataError(
            f"{path}: {cls.__name__} does not support files of inputs (it has no `read_inputs`)"
        )

    @classmethod
    def read_chunks(cls, file: InputFile, facts: dict[str, Any]) -> Iterator[InputRows]:
        """Yield the inputs of a file in chunks, so that any number of rows needs little memory.

        By default one chunk with all rows, by `read_inputs`. If a subclass overrides only
        `read_inputs`, this method of its base class is not called.

        Args:
            file: the file, and how many rows to read at once.
            facts: see `read_inputs`.

        Raises:
            DataError: the file cannot be read.
        """
        if file.stream is not None:
            raise DataError(f"--input -: {cls.__name__} does not read standard input; name a file")
        if file.ids:
            raise DataError(
                f"--id {file.ids[0]}: the files of {cls.__name__} have no named columns"
            )
        yield InputRows(cls.read_inputs(file.path, facts))

    @classmethod
    def read_labelled(
        cls,
        path: Path,
        facts: dict[str, Any],
        settings: Mapping[str, Any],
        scale: Scale | None = None,
    ) -> Split:
        """Return a file or folder of inputs and targets as a split, prepared as in training.

        Args:
            path: the file or folder, in the format of the training data.
            facts: see `read_inputs`.
            settings: the settings of the data set in the run, defaults included.
            scale: that of the targets in training; None if they were not scaled.

        Raises:
            DataError: the file cannot be read, or this method is not implemented.
        """
        raise DataError(
            f"--data {path}: {cls.__name__} cannot be evaluated on other files; use eval --split"
        )

    @classmethod
    def preparation(cls, facts: dict[str, Any], in_shape: Shape) -> Preparation | None:
        """Return how raw inputs become inputs, for `framework export`.

        Args:
            facts: the result of `facts` in training.
            in_shape: shape of one input of the model.

        Returns:
            None if the exported model takes the inputs as the data set prepares them.
        """
        return None

    @classmethod
    def show(cls, inputs: Tensor, facts: dict[str, Any]) -> Shown:
        """Return inputs as a reader sees them, for tables and pictures of single samples.

        By default inputs with the shape of images are images, and up to 8 numbers are columns.

        Args:
            inputs: shape (samples, *in_shape), prepared as in training.
            facts: see `read_inputs`.
        """
        return show_numbers(inputs, facts, cls.max_pixel)

    def sample_names(self, split: str, samples: Sequence[int]) -> dict[str, list[Any]]:
        """Return columns that identify samples in the source of the data, such as file and row.

        By default the file of each sample if the split has `files`, or its row in the source,
        counted from 1.

        Args:
            split: the name of the split.
            samples: their numbers in the split, counted from 0.
        """
        columns = file_names(getattr(self, split), samples)
        if columns:
            return columns
        rows = self.rows.get(split)
        if rows is None or len(rows) != known_length(getattr(self, split)):
            return {}
        return {"row": [int(rows[sample]) + 1 for sample in samples]}

    @classmethod
    def encode(cls, text: str, facts: dict[str, Any]) -> Tensor:
        """Return a text as token ids, shape (length,).

        Raises:
            DataError: the data has no texts that a model could continue.
        """
        raise DataError(f"{cls.__name__} has no text to continue: --prompt needs a language model")

    @classmethod
    def decode(cls, tokens: Sequence[int], facts: dict[str, Any]) -> str:
        """Return the text of token ids.

        Raises:
            DataError: the data has no texts.
        """
        raise DataError(f"{cls.__name__} has no text")


def splits_of(data: Data) -> dict[str, Split]:
    """Return the splits of a data set by name, without those that are None."""
    splits = {}
    for name in SPLITS:
        split = getattr(data, name, None)
        if split is not None:
            splits[name] = split
    return splits


def check_data(data: Data) -> None:
    """Raise DataError if a split is empty, or the training split is missing."""
    splits = splits_of(data)
    for name, split in splits.items():
        if known_length(split) == 0:
            raise DataError(f"the {name} split of {type(data).__name__} is empty")
    if "train" not in splits:
        raise DataError(f"{type(data).__name__} has no train split")


class Loader:
    """Reads the batches of a split, in an order that is a pure function of (seed, epoch).

    Three kinds of splits are read in three ways:

    - A split in memory: several batches at once by indexing its tensors, on the device that holds
      them.
    - A `GatheredSplit`: batch by batch, made by the split; several at once if it allows this.
    - Any other split: sample by sample through torch's DataLoader. The random numbers of a sample
      are a function of (seed, epoch, sample), so that batches are the same with any number of
      workers and after a restart. For CUDA each batch is copied while the previous one is used.

    Args:
        batch_size: training samples per batch.
        eval_batch_size: samples per batch in validation, test and prediction.
        workers: processes that load samples ahead (0: none, as for data in memory; at most 1024).
        drop_last: skip the last training batch of an epoch if it is smaller.
        timeout_seconds: longest time to wait for a batch of a worker before an error (0: no limit).
        on_bad_sample: raise an error that names a sample that cannot be read, or skip it, which
            makes its batch smaller by one and is counted in `skipped`.
        read: memory reads a split once and keeps it in memory, if its samples have one shape and
            are not random; workers uses torch's DataLoader even for tensors; auto leaves the split
            unchanged. The batches are the same in each case.
        channels_last: convert images to the memory format channels last, in which most
            convolutional models are faster (measure with `scripts/bench formats`). Numbers differ
            by rounding. auto does so if the model has several convolutions and makes images
            smaller.
        limit: largest number of batches in a training epoch, and in a validation or test, for a
            quick try.
        sampling: once reads each training sample once in an epoch; weighted draws the same number
            of samples with replacement, so that each class has the same expected share, however
            rare it is. weighted keeps the drawn indices of an epoch in memory (8 bytes a sample);
            once does so up to 2**24 samples, and computes them when they are read above that.
        split: the split to read.
        shuffle: whether this is the loader of training.
        seed: the seed of the order and of random samples.
        model: the model that reads the batches, for `channels_last=auto`.

    Attributes:
        skipped: number of samples that could not be read.

    Raises:
        DataError: the split does not support a setting.
    """

    bytes_per_read = 2**20
    """Largest number of bytes to read at once from memory, if several batches fit in."""

    def __init__(  # noqa: PLR0913  # the arguments are the settings of the section `loader`
        self,
        split: Split,
        batch_size: PositiveInt = 32,
        eval_batch_size: PositiveInt = 256,
        workers: Annotated[int, Range("[0, 1024]")] = 0,
        drop_last: bool = False,
        timeout_seconds: NonNegativeFloat = 0.0,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        read: Literal["auto", "memory", "workers"] = "auto",
        channels_last: ChannelsLast = "auto",
        limit: PositiveInt | None = None,
        sampling: Literal["once", "weighted"] = "once",
        *,
        shuffle: bool = False,
        seed: int = 0,
        model: nn.Module | None = None,
    ):
        self.split = as_split(split)
        self.batch_size = batch_size if shuffle else eval_batch_size
        self.workers = workers
        self.drop_last = drop_last and shuffle
        self.timeout_seconds = timeout_seconds
        self.on_bad_sample = on_bad_sample
        self.read = read
        self.limit = limit
        self.shuffle = shuffle
        self.seed = seed
        self.memory_format = choose_memory_format(channels_last, model)
        self.class_sampler: ClassSampler | None = None
        if sampling == "weighted" and shuffle:
            self.class_sampler = ClassSampler(self.split)
        self.slice = BatchSlice()
        self.skipped = 0
        self.copies: CopyStream | None = None
        self.uncached: DeterministicSamples | None = None  # samples that `to` reads into memory
        if self.drop_last and len(self.split) < self.batch_size:
            raise DataError(
                f"drop_last leaves no batch: {len(self.split)} samples, "
                f"batch_size {self.batch_size}"
            )
        if read == "workers" and isinstance(self.split, GatheredSplit):
            raise DataError(
                f"loader.read=workers: a {type(self.split).__name__} builds its batches in memory"
            )
        if read == "memory" and not self.in_memory:
            self.uncached = self._samples_to_cache()

    def to(self, device: torch.device) -> "Loader":
        """Prepare to read for a device, and return this loader.

        This reads the samples of `read=memory`, and moves a split in memory to the device.
        """
        if self.uncached is not None:
            columns = read_all_samples(self.uncached, self.workers, self.timeout_seconds)
            named = any(isinstance(name, str) for name in columns)
            self.split = split_of(columns if named else list(columns.values()))
            self.uncached = None
        if self.in_memory and isinstance(self.split, TensorSplit | GatheredSplit):
            self.split = self.split.to(device)
        elif device.type == "cuda":
            self.copies = CopyStream(device)
        return self

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        batches = len(self.split) // self.batch_size
        if len(self.split) % self.batch_size and not self.drop_last:
            batches += 1
        return batches if self.limit is None else min(batches, self.limit)

    def epoch(self, epoch: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Return an iterator over the batches of an epoch.

        Args:
            epoch: the epoch of training, counted from 0; `set_epoch` of the data set is called.
                None for a measurement: it reads in the order of epoch 0 and does not call it.
            start: number of batches to skip.
        """
        if epoch is None:
            epoch = 0
        else:
            set_epoch(self.split, epoch)
        if self.tensors is not None:
            indices = self.batch_indices(epoch, self.tensors[0].device)
            batches = self._read_tensors(self.tensors, indices, start)
        elif isinstance(self.split, GatheredSplit):
            whole = BatchIndices(self.order(epoch), self.batch_size, len(self))
            batches = self._gather(self.split, whole, start)
        else:
            indices = self.batch_indices(epoch)
            batches = self._read_samples(epoch, IndexBatches(indices, start))
        return batches if self.slice.is_whole else filled(batches, len(self) - start)

    @property
    def own_batch_size(self) -> int:
        """The number of rows that this process reads of a full batch."""
        return self.slice.rows(self.batch_size)

    def order(self, epoch: int) -> Order:
        """Return the indices of the samples of an epoch: a pure function of (seed, epoch)."""
        if self.class_sampler is not None:
            return self.class_sampler.order(self.seed, epoch)
        if isinstance(self.split, GatheredSplit):
            return self.split.order(self.seed, epoch, self.batch_size, self.shuffle)
        size = len(self.split)
        return shuffled(self.seed, epoch, size) if self.shuffle else sequential(size)

    def batch_indices(self, epoch: int, device: torch.device = CPU) -> BatchIndices:
        """Return the indices of the samples that this process reads in each batch of an epoch.

        All ways to read take their indices from here. `device` is the one that uses them.
        """
        return BatchIndices(self.order(epoch), self.batch_size, len(self), device, self.slice)

    def indices(self, epoch: int, start: int, batches: int) -> list[int]:
        """Return the indices of the samples that this process reads in some batches.

        Args:
            epoch: counted from 0.
            start: the number of the first batch.
            batches: the number of batches.
        """
        return self.batch_indices(epoch).joined(start, start + batches).tolist()

    def samples(self, numbers: Tensor) -> Batch:
        """Return some samples as one batch in new memory, each as a measurement reads it.

        Args:
            numbers: of the samples in their split, from 0, on the CPU.

        Raises:
            DataError: a sample cannot be read.
        """
        if self.tensors is not None:
            batch = self.split[numbers.to(self.tensors[0].device)]
        elif isinstance(self.split, GatheredSplit):
            batch = self.keep(self.split.gather(self.split.indices_of(numbers)))
        else:
            seed = seeds.derive(self.seed, "sample", 0)
            samples = SeededSamples(self.split, seed, self.on_bad_sample == "skip")
            batch = batch_of(collate(samples.__getitems__(numbers.tolist())))
        return self.memory_format.convert(batch)

    def keep(self, batch: Batch) -> Batch:
        """Return a batch that stays valid after the next one is read: a copy if necessary."""
        return copy_batch(batch) if self.reuses_memory else batch

    @property
    def tensors(self) -> Sequence[Tensor] | None:
        """The tensors that batches are read from; None if the split is not read by indexing."""
        if self.read == "workers" or not is_in_memory(self.split):
            return None
        return self.split.tensors

    @property
    def in_memory(self) -> bool:
        """Whether batches are made from memory, so that workers would not help."""
        return self.tensors is not None or isinstance(self.split, GatheredSplit)

    @property
    def reuses_memory(self) -> bool:
        """Whether a batch may be overwritten when the next one is read."""
        return isinstance(self.split, GatheredSplit) and self.split.reuses_memory

    @property
    def max_buffered(self) -> int:
        """The number of batches that `Measures` may buffer."""
        return 1 if self.reuses_memory else 16

    @property
    def description(self) -> str:
        """A short text on how batches are read."""
        if self.tensors is not None:
            text = f"in memory, {self._batches_per_read(self.tensors)} batches per read"
        elif isinstance(self.split, GatheredSplit):
            count = self._batches_per_gather(self.split)
            reads = "gathered batch by batch" if count == 1 else f"{count} batches per read"
            text = f"{self.split.place}, {reads}"
        else:
            text = f"torch's DataLoader, {self.workers or 'no'} workers"
            if self.uncached is not None:
                text = f"in memory after one pass of {text}"
        text += self.memory_format.description
        if self.class_sampler is not None:
            text += ", balanced classes"
        return text

    def _samples_to_cache(self) -> DeterministicSamples:
        """Return the samples that `to` reads into memory.

        Raises:
            DataError: the samples may be random or bad, or do not fit into memory.
        """
        name = type(self.split).__name__
        if callable(getattr(self.split, "set_epoch", None)):
            raise DataError(
                f"{MEMORY} reads each sample once: {name} has `set_epoch`, and may give other "
                "samples in each epoch"
            )
        if self.on_bad_sample == "skip":
            raise DataError(
                f"{MEMORY} needs every sample: loader.on_bad_sample=skip is not possible"
            )
        samples = DeterministicSamples(self.split, seed=0, workers=self.workers)
        check_room(samples.probe(), f"{MEMORY}: {name}")
        return samples

    def _batches_per_read(self, tensors: Sequence[Tensor]) -> int:
        return self._batches_of(sum(tensor[:1].nbytes for tensor in tensors))

    def _batches_per_gather(self, split: GatheredSplit) -> int:
        if split.bytes_per_sample is None or split.reuses_memory:
            return 1
        return self._batches_of(split.bytes_per_sample)

    def _batches_of(self, bytes_per_sample: int) -> int:
        """Return the number of batches to read at once."""
        bytes_per_batch = max(bytes_per_sample * self.own_batch_size, 1)
        fitting = max(self.bytes_per_read // bytes_per_batch, 1)
        return min(fitting, max(len(self), 1))

    def _read_tensors(
        self, tensors: Sequence[Tensor], indices: BatchIndices, start: int
    ) -> Iterator[Batch]:
        """Yield views of reads of several batches, from batch number `start` on."""
        per_read = self._batches_per_read(tensors)
        size = self.own_batch_size
        # Each read has the same batches with any start: sums may depend on alignment in memory.
        first_read = start - start % per_read
        for number in range(first_read, len(self), per_read):
            chunk = indices.joined(number, number + per_read)
            if not len(chunk):  # other processes have the rows of the last batch
                return
            rows = [tensor.index_select(0, chunk) for tensor in tensors]
            rows = self.memory_format.convert(tuple(rows))
            columns = [torch.split(tensor, size) for tensor in rows]
            batches: Iterator[Batch] = zip(*columns, strict=True)
            if isinstance(self.split, TensorSplit) and self.split.names:
                batches = map(self.split.as_batch, batches)
            yield from islice(batches, max(start - number, 0), None)

    def _gather(self, split: GatheredSplit, batches: BatchIndices, start: int) -> Iterator[Batch]:
        """Yield the batches of a split from batch number `start` on, as `_read_tensors` does.

        Args:
            split: the split.
            batches: the indices of whole batches.
            start: number of batches to skip.
        """
        per_read = self._batches_per_gather(split)
        if per_read == 1:
            for batch in batches.read(start):
                first, last = self.slice.bounds(len(batch))
                if first < last:
                    part = split.gather_part(batch[first:last], batch)
                    yield self.memory_format.convert(part)
            return
        first_read = start - start % per_read
        for number in range(first_read, len(self), per_read):
            joined = batches.joined(number, number + per_read)
            indices = self.slice.of_batches(joined, self.batch_size)
            if not len(indices):
                return
            read = self.memory_format.convert(split.gather(indices))
            columns = [torch.split(tensor, self.own_batch_size) for tensor in read]
            yield from islice(zip(*columns, strict=True), max(start - number, 0), None)

    def _read_samples(self, epoch: int, chunks: IndexBatches) -> Iterator[Batch]:
        workers = min(self.workers, len(chunks))
        seed = seeds.derive(self.seed, "sample", epoch)
        samples = SeededSamples(self.split, seed, self.on_bad_sample == "skip", workers)
        pin = self.copies is not None
        reads = read_batches(samples, chunks, workers, self.timeout_seconds, pin)
        with closing(reads):  # an error keeps this frame alive, and without this the workers
            copies = reads if self.copies is None else self.copies.ahead(reads)
            for batch, errors in copies:
                self.skipped += len(errors)
                for error in errors:
                    warnings.warn(f"{error}; the sample is skipped", stacklevel=2)
                if isinstance(batch, FrameworkError):
                    raise batch
                yield self.memory_format.convert(batch)


def as_split(source: Any) -> Split:
    """Return a map-style data set as a split; a TensorDataset becomes a split in memory.

    Raises:
        DataError: the source has no length or is an iterable data set.
    """
    if isinstance(source, IterableDataset) or not hasattr(source, "__len__"):
        raise DataError(
            "expected a split with `__len__` and `__getitem__`, got "
            f"{type(source).__name__}; pass it to Trainer.fit instead"
        )
    if type(source) is TensorDataset:  # a subclass may have another `__getitem__`
        return TensorSplit(*source.tensors)
    split: Split = source
    return split


@runtime_checkable
class LabelledSplit(Protocol):
    """A split that knows the classes of all its samples, in their order, without reading them."""

    labels: Tensor


class ClassSampler:
    """Draws samples with replacement: first a class, then a sample of it, each equally likely.

    Args:
        split: the training split.

    Raises:
        DataError: the class of each sample is not known without reading it.
    """

    def __init__(self, split: Split):
        classes: Any = None
        if isinstance(split, LabelledSplit):
            classes = split.labels
        elif isinstance(split, TensorSplit) and not split.names:
            classes = split.tensors[-1]
        if not isinstance(classes, Tensor) or classes.ndim != 1 or classes.is_floating_point():
            raise DataError(
                "loader.sampling=weighted: expected data in memory with classes as targets (or a "
                f"split with `labels`), got {type(split).__name__}"
            )
        self.rows = classes.argsort(stable=True).cpu()  # class by class
        self.counts = torch.unique(classes, return_counts=True)[1].cpu()

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return the indices of an epoch: a pure function of (seed, epoch)."""
        generator = seeds.generator(seed, "classes", epoch)
        size = len(self.rows)
        drawn = torch.randint(len(self.counts), (size,), generator=generator)
        fractions = torch.rand(size, generator=generator, dtype=torch.float64)
        starts = self.counts.cumsum(0) - self.counts
        within = (fractions * self.counts[drawn]).long()
        return self.rows[starts[drawn] + within]


def check_read_again(batches: Loader | ForeignLoader, reader: str) -> None:
    """Raise DataError if the data can be read only once, but a callback has to read it again.

    Args:
        batches: the training or validation data.
        reader: the callback for the message, such as "callbacks.swa".
    """
    if isinstance(batches, ForeignLoader) and batches.single_pass:
        kind = type(batches.batches).__name__
        raise DataError(
            f"{reader}: expected data that can be read again, got a {kind}; {READ_AGAIN}"
        )


def check_has_validation(batches: Loader | ForeignLoader | None, reader: str) -> None:
    """Check that there is validation data that a callback can read again.

    Args:
        batches: the validation data.
        reader: the callback for the message, such as "callbacks.worst".

    Raises:
        SettingError: there is none.
        DataError: it can be read only once.
    """
    if batches is None:
        raise SettingError(f"{reader}: expected a validation split, but the data has none")
    check_read_again(batches, reader)


def names_or_numbers(names: Sequence[str], count: int) -> list[str]:
    """Return the names of classes; their numbers if the names are unknown."""
    return list(names) if len(names) == count else [str(index) for index in range(count)]


def file_names(split: Any, samples: Sequence[int]) -> dict[str, list[Any]]:
    """Return the file of each sample as the column "file"; no column if the split has no files."""
    files = getattr(split, "files", None)
    return {} if files is None else {"file": [str(files[sample]) for sample in samples]}


def class_names(run: Path | None) -> list[str]:
    """Return the names of the classes in a run folder; empty if they are missing or damaged."""
    if run is None:
        return []
    try:
        return [str(name) for name in read_json(run, "facts.json")["classes"]]
    except (OSError, RunError, LookupError, TypeError):
        return []
