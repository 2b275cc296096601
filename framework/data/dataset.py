"""Data sets and how batches are read from them.

A batch is a tuple (inputs, targets) of tensors. A `Data` has splits; a split is a `TensorSplit` (in memory) or any
map-style `torch.utils.data.Dataset` that yields (input, target).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader, IterableDataset

from framework.errors import DataError, FrameworkError, RunError, short
from framework.registry.kinds import Shape
from framework.registry.schema import NonNegativeFloat, PositiveInt, Range
from framework.runtime import seeds
from framework.runtime.copy_stream import CopyStream
from framework.runtime.memory import check_room
from framework.runtime.memory_format import channels_last, chosen_layout
from framework.system.files import read_json

from .token_splits import GatheredSplit, RaggedSplit as RaggedSplit, WindowSplit as WindowSplit
from .workers import (
    MEMORY,
    Batch as Batch,
    IndexBatches,
    SeededSamples,
    Split,
    SteadySamples,
    as_batch,
    read_batches,
    read_whole,
)

SPLITS = ("train", "val", "test")
Target = Literal["class", "labels", "value", "none"]
READS_FROM = ("loader", "dataloader", "batch_sampler", "sampler", "dataset")
READ_AGAIN = "pass a list of batches or a DataLoader, which can be read again"


class TensorSplit:
    """A split in memory: tensors with a common first axis, indexed together (an int, a slice or index tensor)."""

    def __init__(self, *tensors: Tensor):
        sizes = {len(tensor) for tensor in tensors}
        if len(sizes) != 1:
            raise DataError(
                f"the tensors of a split must have one length, not {[len(t) for t in tensors]}"
            )
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: Any) -> Batch:
        return tuple(tensor[index] for tensor in self.tensors)

    def content(self) -> Any:
        """Return what the samples are made of, see `content.py`."""
        return self.tensors

    def to(self, device: torch.device) -> "TensorSplit":
        return TensorSplit(*(tensor.to(device) for tensor in self.tensors))


def is_in_memory(split: Split) -> bool:
    """Return whether the samples of a split are the rows of its tensors.

    They are not in a subclass with a `__getitem__` of its own.
    """
    return isinstance(split, TensorSplit) and type(split).__getitem__ is TensorSplit.__getitem__


class Scale(NamedTuple):
    """How amounts became targets: their logarithm, if `log`, less mean, over std.

    mean, std: a number, or one for each value of a target.
    """

    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    log: bool = False

    def there(self, amounts: Tensor) -> Tensor:
        """Return amounts as targets, in their own number format."""
        mean, std = self.moments(amounts)
        return ((amounts.log() if self.log else amounts) - mean) / std

    def back(self, targets: Tensor) -> Tensor:
        """Return targets, or outputs that predict them, as amounts in their own unit, in float64.

        float32 could not hold the digits of amounts far from 0. (On mps, which has no float64, it
        has to.)
        """
        known = targets if targets.device.type == "mps" else targets.double()
        mean, std = self.moments(known)
        amounts = known * std + mean
        return amounts.exp() if self.log else amounts

    def moments(self, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Return mean and std as numbers, or where there are several as tensors like another."""
        if isinstance(self.mean, int | float):
            return self.mean, self.std  # type: ignore[return-value]
        return like.new_tensor(self.mean), like.new_tensor(self.std)


class Data:
    """A data set. A plugin's `__init__` reads it and sets these attributes.

    Attributes:
        train, val, test: splits; val and test may be None.
        in_shape: shape of one input, without the batch axis.
        out_shape: (classes,) for classes, (labels,) for labels, (values,) for values.
        target: "class" (int64 index, shape ()), "labels" (0/1 floats, shape (labels,)), "value" (floats, (values,)).
        classes: the names of classes or labels, in the order of the outputs; empty for values.
        characters: of a text as tokens, the characters that each token stands for, shape
            (vocabulary,); None for other data.
        columns: of a table with categories as indices, for each input: 0 for a number, n for an index from 0 to n - 1.
        scale: how values were scaled; metrics and predictions are scaled back.
        rows: of each split, which of the samples read it has, as tensors of their numbers, for
            `refit`.
        refit: sets the splits anew, of other rows; what is measured (mean, vocabulary) is measured
            on rows["train"]. Cross-validation calls it. A method, or a `functools.partial` of one,
            is pickled and copied with the data set. It may hold all that was read: set it to None
            to release that. None: the data set cannot, and its splits are cut as they are.
        strata: the class of each sample read, where folds shall have all classes in equal shares;
            None for others.
        in_time_order: whether a fold is a block of rows that follow each other, not rows drawn at
            random.
        measures_training: whether something is measured on the training split; False without
            `refit` avoids a warning.
        fold: the fold "K/N" that was taken by `refit`; None for others.

    A split may have `content()`, which returns all that its samples are made of, in their order:
    tensors, numbers, texts, lists of them, and lists of paths, of which the content of the files
    counts. By it a run can be resumed with the data at another path. `TensorSplit` has it.

    Raises DataError when the data is missing, empty or malformed, with the file and what would be right.
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

    def facts(self) -> dict[str, Any]:
        """Return what `read_inputs` needs beyond the file (plain JSON types), kept in the run folder for `predict`."""
        return {}

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read a user's file as a batch of inputs, prepared as in training, shape (rows, *in_shape).

        facts: what `facts` gave when the model was trained; the training data need not be there.
        Raises DataError when the file cannot be read, and here, where no way of reading is known.
        """
        raise DataError(
            f"{path}: {cls.__name__} does not say how to read a file of inputs (`read_inputs`)"
        )

    @classmethod
    def encode(cls, text: str, facts: dict[str, Any]) -> Tensor:
        """Return a text as token ids, shape (length,). Raises DataError where the data are no texts to go on with."""
        raise DataError(
            f"{cls.__name__} holds no text to go on with: --prompt is for language models"
        )

    @classmethod
    def decode(cls, tokens: Sequence[int], facts: dict[str, Any]) -> str:
        """Return the text of token ids."""
        raise DataError(f"{cls.__name__} holds no text")


def splits_of(data: Data) -> dict[str, Split]:
    """Return the splits that a data set has, by name."""
    found = {name: getattr(data, name, None) for name in SPLITS}
    return {name: split for name, split in found.items() if split is not None}


def check_data(data: Data) -> None:
    """Raise DataError when a split is empty."""
    splits = splits_of(data)
    for name, split in splits.items():
        if known_length(split) == 0:
            raise DataError(f"the {name} split of {type(data).__name__} is empty")
    if "train" not in splits:
        raise DataError(f"{type(data).__name__} has no train split")


def known_length(source: Any) -> int | None:
    """Return the length of a split or loader; None where it has none."""
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


@runtime_checkable
class LabelledSplit(Protocol):
    """A split that knows the targets of all its samples, in their order, without reading them."""

    labels: Tensor


class EvenClasses:
    """Draws samples with replacement: each class is as likely as any other, and within it each sample."""

    def __init__(self, split: Split):
        """Sort the samples by class. Raises DataError where their classes are not known without reading them."""
        known: Any = None
        if isinstance(split, TensorSplit):
            known = split.tensors[-1]
        elif isinstance(split, LabelledSplit):
            known = split.labels
        if not isinstance(known, Tensor) or known.ndim != 1 or known.is_floating_point():
            raise DataError(
                f"loader.sampling=weighted: {type(split).__name__} does not give one class for each sample beforehand; "
                "it takes data in memory whose targets are classes"
            )
        self.rows = known.argsort(stable=True).cpu()
        self.counts = known.unique(return_counts=True)[1].cpu()

    def order(self, seed: int, epoch: int) -> Tensor:
        """Return as many samples as there are: a pure function of (seed, epoch)."""
        generator, size = seeds.generator(seed, "classes", epoch), len(self.rows)
        drawn = torch.randint(len(self.counts), (size,), generator=generator)
        within = torch.rand(size, generator=generator, dtype=torch.float64) * self.counts[drawn]
        return self.rows[(self.counts.cumsum(0) - self.counts)[drawn] + within.long()]


class Loader:
    """Reads the batches of a split. The order is a pure function of (seed, epoch): nothing is kept between epochs.

    In memory, a batch is one indexed read of each tensor, on the device where they are. Anything else goes through
    torch's DataLoader; what is random in reading a sample is then a function of (seed, epoch, sample), so that the
    batches are the same with any number of workers, and after a restart. On CUDA its batches come copied ahead.
    """

    ahead = 2**20  # bytes of memory that are read at once, if several batches fit in them

    def __init__(
        self,
        split: Split,
        batch_size: PositiveInt = 32,
        eval_batch_size: PositiveInt = 256,
        workers: Annotated[int, Range("[0, 1024]")] = 0,
        drop_last: bool = False,
        timeout_seconds: NonNegativeFloat = 0.0,
        on_bad_sample: Literal["raise", "skip"] = "raise",
        read: Literal["auto", "memory", "workers"] = "auto",
        channels_last: Literal["auto"] | bool = "auto",
        limit: PositiveInt | None = None,
        sampling: Literal["once", "weighted"] = "once",
        *,
        shuffle: bool = False,
        seed: int = 0,
        model: nn.Module | None = None,
    ):
        """Prepare to read `split`.

        Args:
            batch_size: training samples a batch.
            eval_batch_size: samples a batch in validation, test and prediction.
            workers: processes that load samples ahead (0: none; data in memory needs none; at most 1024).
            drop_last: leave out the last training batch of an epoch when it is smaller.
            timeout_seconds: how long a batch may take to come from a worker, before it is an error (0: for ever).
            on_bad_sample: what to do when a sample cannot be read: raise an error that names it, or skip it; then its
                batch is one smaller, and `skipped` counts.
            read: memory loads a split of samples whole, once, which takes samples of one shape with nothing random in
                them; workers reads even tensors through torch's DataLoader; auto leaves a split as it is. The batches
                are the same in all ways.
            channels_last: give images with the channels of a pixel side by side in memory, a format in which most
                convolutional models are faster (`scripts/bench formats` measures it); the numbers differ by rounding.
                auto does so for several convolutions that go on to smaller images.
            limit: most batches of a training epoch, and of a validation or test: to try something out quickly.
            sampling: once: an epoch has each training sample once; weighted: as many, drawn with replacement so that
                each class comes equally often in expectation, however rare it is.
            model: what reads the batches, if they are images; `channels_last=auto` is for it.
        """
        if isinstance(split, IterableDataset) or not hasattr(split, "__len__"):
            got = f"got {type(split).__name__}, which Trainer.fit takes as it is"
            raise DataError(f"expected a split with `__len__` and `__getitem__`, {got}")
        plain = type(split) is torch.utils.data.TensorDataset  # a subclass may read in another way
        self.split: Split = split
        if plain:
            self.split = TensorSplit(*split.tensors)  # type: ignore[attr-defined]
        self.read, self.shuffle, self.seed = read, shuffle, seed
        self.channels_last, self.layout = chosen_layout(channels_last, model)
        self.workers, self.timeout_seconds = workers, timeout_seconds
        self.on_bad_sample, self.skipped = on_bad_sample, 0
        self.batch_size = batch_size if shuffle else eval_batch_size
        self.drop_last, self.limit = drop_last and shuffle, limit
        if self.drop_last and len(split) < self.batch_size:
            raise DataError(
                f"drop_last leaves no batch: {len(split)} samples, batch_size {self.batch_size}"
            )
        self.even = EvenClasses(self.split) if shuffle and sampling == "weighted" else None
        self.copies: CopyStream | None = None
        self.whole: SteadySamples | None = None  # what is to be read into memory
        if read == "workers" and isinstance(self.split, GatheredSplit):
            raise DataError(
                f"loader.read=workers: a {type(split).__name__} makes its batches in memory"
            )
        ready = is_in_memory(self.split) or isinstance(self.split, GatheredSplit)
        if read == "memory" and not ready:
            if callable(getattr(split, "set_epoch", None)):
                why = "has `set_epoch`, and may give other samples in each epoch"
                raise DataError(f"{MEMORY} reads each sample once: {type(split).__name__} {why}")
            if on_bad_sample == "skip":
                raise DataError(
                    f"{MEMORY} needs every sample: it does not go with loader.on_bad_sample=skip"
                )
            self.whole = SteadySamples(self.split, 0, workers=workers)
            check_room(self.whole.probe(), f"{MEMORY}: {type(split).__name__}")

    def to(self, device: torch.device) -> "Loader":
        """Prepare to read for a device, and return this loader: what shall be in memory is read, and goes there."""
        if self.whole is not None:
            self.split, self.whole = (
                TensorSplit(*read_whole(self.whole, self.workers, self.timeout_seconds)),
                None,
            )
        if self.tensors is not None or isinstance(self.split, GatheredSplit):
            self.split = self.split.to(device)  # type: ignore[attr-defined]
        elif device.type == "cuda":
            self.copies = CopyStream(device)
        return self

    @property
    def fresh(self) -> bool:
        """Whether each batch has memory of its own."""
        return not isinstance(self.split, GatheredSplit) or not self.split.reuses_memory

    @property
    def hold(self) -> int:
        """How many batches may be held back, see `Measures`."""
        return 16 if self.fresh else 1

    @property
    def tensors(self) -> Sequence[Tensor] | None:
        """What batches are gathered from; None where they are read sample by sample."""
        if self.read == "workers" or not is_in_memory(self.split):
            return None
        return self.split.tensors  # type: ignore[attr-defined]

    @property
    def in_memory(self) -> bool:
        """Whether batches are made of what is in memory, so that workers would not help."""
        return self.tensors is not None or isinstance(self.split, GatheredSplit)

    def __len__(self) -> int:
        """The number of batches of an epoch."""
        full, rest = divmod(len(self.split), self.batch_size)
        batches = full + (rest > 0 and not self.drop_last)
        return batches if self.limit is None else min(batches, self.limit)

    @property
    def manner(self) -> str:
        """How batches are read, in words."""
        manner = "in memory, once it is read by " * (self.whole is not None)
        manner += f"torch's DataLoader, {self.workers or 'no'} workers"
        if isinstance(self.split, GatheredSplit):
            manner = "in memory, gathered batch by batch"
        elif self.tensors is not None:
            manner = f"in memory, {self._together(self.tensors)} batches a read"
        return manner + self.layout + ", classes drawn evenly" * (self.even is not None)

    def epoch(self, epoch: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch number `start` on.

        Args:
            epoch: the epoch of training, counted from 0; `set_epoch` of the data set is called.
                None for a measurement: it reads in the order of epoch 0 and calls nothing.
            start: batches to leave out.
        """
        if epoch is None:
            epoch = 0
        else:
            set_epoch(self.split, epoch)
        indices = self.order(epoch)[: len(self) * self.batch_size]
        if self.tensors is not None:
            return self._gather(self.tensors, indices, start)
        if isinstance(self.split, GatheredSplit):
            rest = indices[start * self.batch_size :]
            return map(self.split.gather, rest.split(self.batch_size) if len(rest) else ())
        return self._load(epoch, indices[start * self.batch_size :])

    def keep(self, batch: Batch) -> Batch:
        """Return a batch that outlasts the next one: a copy, where the memory may be reused."""
        return batch if self.fresh else copied(batch)

    def indices(self, epoch: int, start: int, batches: int) -> list[int]:
        """Return which samples the batches from number `start` on hold."""
        return self.order(epoch)[
            start * self.batch_size : (start + batches) * self.batch_size
        ].tolist()

    def order(self, epoch: int) -> Tensor:
        """Return the samples of an epoch in their order, a pure function of (seed, epoch)."""
        if self.even is not None:
            return self.even.order(self.seed, epoch)
        if isinstance(self.split, GatheredSplit):
            return self.split.order(self.seed, epoch, self.batch_size, self.shuffle)
        size = len(self.split)
        return seeds.order(self.seed, epoch, size) if self.shuffle else torch.arange(size)

    def _together(self, tensors: Sequence[Tensor]) -> int:
        """Return how many batches are read at once."""
        row = sum(tensor[:1].nbytes for tensor in tensors)
        return min(max(self.ahead // max(row * self.batch_size, 1), 1), max(len(self), 1))

    def _gather(self, tensors: Sequence[Tensor], indices: Tensor, start: int) -> Iterator[Batch]:
        """Yield views of one read of several batches, from batch number `start` on.

        The reads are of the same batches wherever one starts: a sum may depend on where in memory its numbers are.
        """
        indices = indices.to(tensors[0].device)  # once an epoch, not once a batch
        together = self._together(tensors)
        for number in range(start - start % together, len(self), together):
            chunk = indices[number * self.batch_size : (number + together) * self.batch_size]
            whole = self._laid_out([tensor.index_select(0, chunk) for tensor in tensors])
            parts = [tensor.split(self.batch_size) for tensor in whole]
            yield from islice(zip(*parts, strict=True), max(start - number, 0), None)

    def _load(self, epoch: int, indices: Tensor) -> Iterator[Batch]:
        chunks = IndexBatches(indices, self.batch_size)
        workers = min(self.workers, len(chunks))
        seed = seeds.derive(self.seed, "sample", epoch)
        samples = SeededSamples(self.split, seed, self.on_bad_sample == "skip", workers)
        reads = read_batches(
            samples, chunks, workers, self.timeout_seconds, pin=self.copies is not None
        )
        with closing(reads):  # at once: an error that is raised here keeps this frame
            for batch, left_out in reads if self.copies is None else self.copies.ahead(reads):
                self.skipped += len(left_out)
                for why in left_out:
                    warnings.warn(f"{why}; it is left out", stacklevel=2)
                if isinstance(batch, FrameworkError):
                    raise batch
                yield self._laid_out(batch)

    def _laid_out(self, batch: Sequence[Tensor]) -> Batch:
        return tuple(map(channels_last, batch)) if self.channels_last else tuple(batch)


class ForeignLoader:
    """An iterable of batches that is not ours (a plain DataLoader), read as it is.

    It may write each batch into the memory of the one before it. So a batch can be read until the
    next one is asked for; what is needed for longer has to be a copy (`keep`).
    """

    hold = 1
    split: None = None  # what the samples are read from is not known
    batch_size: None = None
    skipped = 0

    def __init__(self, batches: Iterable[Any]):
        """Wrap an iterable of batches. Raises DataError for what is not iterable."""
        if not hasattr(batches, "__iter__"):
            expected = "a Data, a split, a data set with a length or an iterable of batches"
            raise DataError(f"data: expected {expected}, got {short(batches)}")
        self.batches = batches
        self.fresh = makes_fresh_batches(batches)
        self.copies: CopyStream | None = None
        self.started = False

    def to(self, device: torch.device) -> "ForeignLoader":
        """Prepare to read for a device, and return this loader: on CUDA, batches come copied.

        Those of a DataLoader are copied ahead, each while the one before it is computed with.
        """
        if device.type == "cuda":
            self.copies = CopyStream(device, reused=not self.fresh)
        return self

    def __len__(self) -> int:
        """The number of batches of an epoch. Raises TypeError where it is not known."""
        several = isinstance(self.batches, DataLoader) and self.batches.num_workers > 1
        if several and isinstance(self.batches.dataset, IterableDataset):  # type: ignore[attr-defined]
            raise TypeError("the length does not count the smaller last batch of each worker")
        return len(self.batches)  # type: ignore[arg-type]

    @property
    def single_pass(self) -> bool:
        """Whether it can be read only once, as a generator; a user's iterator may begin again."""
        built_in = type(self.batches).__module__ in ("builtins", "itertools")
        return built_in and isinstance(self.batches, Iterator)

    def epoch(self, epoch: int | None = None, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from batch number `start` on.

        Args:
            epoch: the epoch of training, counted from 0; `set_epoch` of the loader, its samplers
                and its data set is called. None for a measurement, which calls nothing: it may read
                what a training that is under way reads too.
            start: batches to leave out.

        Raises DataError for a measurement on data that was read before and can be read only once.
        """
        if epoch is not None:
            set_epoch(self.batches, epoch)
        elif self.started and self.single_pass:
            kind = type(self.batches).__name__
            raise DataError(f"the data is a {kind}, which can be read only once; {READ_AGAIN}")
        self.started = True
        batches = map(as_batch, self._iterate(start))
        if self.copies is None:
            return batches
        reads = ((batch, None) for batch in batches)
        ahead = isinstance(self.batches, DataLoader)
        copied = self.copies.ahead(reads) if ahead else self.copies.in_turn(reads)
        return (batch for batch, _ in copied)

    def _iterate(self, start: int) -> Iterator[Any]:
        """Return an iterator from batch number `start` on.

        Skipping does not advance the random generators: a resumed fit has restored them already.
        """
        if start == 0:
            return iter(self.batches)
        with seeds.undisturbed():
            batches = iter(self.batches)
            for _ in islice(batches, start):
                pass
        return batches

    def keep(self, batch: Batch) -> Batch:
        """Return a batch that outlasts the next one: a copy, where the memory may be reused."""
        if self.fresh or self.copies is not None:
            return batch
        return copied(batch)


def copied(batch: Batch) -> Batch:
    return tuple(tensor.clone() for tensor in batch)


def check_read_again(batches: Loader | ForeignLoader, reader: str) -> None:
    """Raise DataError for data that can be read only once, where a callback would read it again.

    Args:
        batches: the training or validation data.
        reader: what would read it, such as "callbacks.swa".
    """
    if isinstance(batches, ForeignLoader) and batches.single_pass:
        kind = type(batches.batches).__name__
        raise DataError(
            f"{reader}: expected data that can be read again, got a {kind}; {READ_AGAIN}"
        )


def makes_fresh_batches(batches: Any) -> bool:
    """Return whether each batch is known to have memory of its own.

    That is so in a list, and where torch's DataLoader stacks samples in its usual way.
    """
    if isinstance(batches, list | tuple):
        return True
    if type(batches) is not DataLoader or batches.batch_sampler is None:
        return False
    return batches.collate_fn is torch.utils.data.default_collate


def set_epoch(source: Any, epoch: int) -> None:
    """Call `set_epoch` of a loader and of its samplers, batch samplers and data sets, once each."""
    waiting = [source]
    seen: list[Any] = []
    while waiting:
        part = waiting.pop(0)
        if part is None or isinstance(part, type) or any(part is other for other in seen):
            continue
        seen.append(part)
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
        waiting += [getattr(part, name, None) for name in READS_FROM]
        if isinstance(part, ConcatDataset | ChainDataset):
            waiting += part.datasets


def class_names(run: Path | None) -> list[str]:
    """Return the names of the classes that a run folder keeps; [] when there is none, or its facts are damaged."""
    if run is None:
        return []
    try:
        return [str(name) for name in read_json(run, "facts.json")["classes"]]
    except (OSError, RunError, LookupError, TypeError):
        return []
