"""Sequences of several channels and unequal length, to classify."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework import (
    Data,
    DataError,
    PositiveInt,
    Preparation,
    Rate,
    Shape,
    TensorSplit,
    datasets,
    memory,
)

from .preparations.sequences import Frames
from .readers.data_files import parse_number, read_bytes
from .readers.fetched import data_folder
from .readers.scaling import check_digits, mean_and_std, needs_float64
from .readers.splits import split_parts
from .readers.targets import as_targets


@datasets.register("ts_files", aliases=["ts"])
class TsFiles(Data):
    """Sequences of unequal length with a class each, from files of the UEA archive (.ts).

    Inputs have shape (channels + 1, length) and are padded with zeros at the end; the last channel
    is the mask: 1 for a frame, 0 for padding.

    Args:
        path: the file with the training set.
        test_path: a file with the official test set; test_fraction is not used then.
        length: frames of an input; null: those of the longest sequence.
        val_fraction: share of the sequences for validation, with the same share of each class.
        test_fraction: share of the sequences for the test.
        split_seed: seed of the draw.
        normalize: standardize each channel by the frames of the training split.
    """

    input_suffixes = (".ts",)

    def __init__(
        self,
        path: Path,
        test_path: Path | None = None,
        length: PositiveInt | None = None,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        files = {"train": path} if test_path is None else {"train": path, "test": test_path}
        parts: list[tuple[Path, list[Tensor]]] = []
        labels: list[str] = []
        for file in files.values():
            sequences, classes = read_ts(file.expanduser())
            parts.append((file, sequences))
            labels += classes
        sizes = {part: len(read) for part, (_, read) in zip(files, parts, strict=True)}
        targets = as_targets(labels, "class", name=str(path))
        train_targets = targets.tensor[: sizes["train"]]
        rows = split_parts(train_targets, sizes, val_fraction, test_fraction, split_seed)
        self.classes = targets.classes
        self.out_shape = targets.out_shape
        self.strata = targets.tensor
        self.length = length or max_frames(parts)
        self.fit(parts, targets.tensor, normalize, path, rows)

    def fit(
        self,
        parts: Sequence[tuple[Path, list[Tensor]]],
        targets: Tensor,
        normalize: bool,
        path: Path,
        rows: Mapping[str, Tensor],
    ) -> None:
        """Measure the training sequences, and set the splits.

        Args:
            parts: the files and their sequences, which are numbered through all files.
            targets: the class of each sequence.
            normalize: standardize by the training frames.
            path: the file to name in an error.
            rows: the numbers of the sequences of each split.
        """
        self.rows = rows
        self.refit = partial(self.fit, parts, targets, normalize, path)
        sequences: list[Tensor] = []
        for _, read in parts:
            sequences += read
        frames = torch.cat([sequences[row] for row in rows["train"].tolist()], dim=1)
        self.float64 = normalize and needs_float64(frames.T)
        if normalize:
            mean, std = mean_and_std(frames if self.float64 else frames.float(), [1])
            self.mean = mean.tolist()
            self.std = std.tolist()
        else:
            check_digits(frames.T, f"{path}: the frames", "data.normalize=true")
            self.mean = [0.0] * len(frames)
            self.std = [1.0] * len(frames)
        inputs = torch.cat([pad(read, self.facts(), file) for file, read in parts])
        for part, chosen in rows.items():
            setattr(self, part, TensorSplit(inputs[chosen], targets[chosen]))
        self.in_shape = tuple(inputs.shape[1:])

    def facts(self) -> dict[str, Any]:
        """Return how sequences become inputs."""
        facts: dict[str, Any] = {"length": self.length, "mean": self.mean, "std": self.std}
        if self.float64:
            facts["float64"] = True
        return facts

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read the sequences of a .ts file."""
        sequences, _ = read_ts(path)
        return pad(sequences, facts, path)

    @classmethod
    def preparation(cls, facts: dict[str, Any], in_shape: Shape) -> Preparation | None:
        return Frames(facts)


def max_frames(parts: Sequence[tuple[Path, list[Tensor]]]) -> int:
    """Return the length of the longest sequence."""
    lengths: list[int] = []
    for _, sequences in parts:
        lengths += [sequence.shape[1] for sequence in sequences]
    return max(lengths)


def read_ts(path: Path) -> tuple[list[Tensor], list[str]]:
    """Read a .ts file (timeseriesclassification.com).

    A line is a sequence: channels separated by ":", their frames by ",", and the class at the end.

    Returns:
        The sequences, shape (channels, frames), float64; and their classes, "" without classes.

    Raises:
        DataError: a line is malformed; the error names it.
    """
    lines = read_bytes(path).decode("utf-8", errors="replace").splitlines()
    is_data = False
    has_classes = False
    sequences: list[Tensor] = []
    labels = []
    for number, text in enumerate(lines, 1):
        line = text.strip()
        if not is_data:
            is_data = line.lower() == "@data"
            has_classes = has_classes or line.lower().startswith("@classlabel true")
            continue
        if not line:
            continue
        where = f"{path}, line {number}"
        channels, _, label = line.rpartition(":") if has_classes else (line, "", "")
        sequence = read_sequence(channels, where)
        if sequences and len(sequence) != len(sequences[0]):
            raise DataError(
                f"{where}: {len(sequence)} channels, but {len(sequences[0])} in the first sequence"
            )
        if has_classes and not label.strip():
            raise DataError(f"{where}: the class at the end of the line is missing")
        sequences.append(sequence)
        labels.append(label.strip())
    if not is_data:
        raise DataError(f"{path} is not a .ts file: it has no line @data")
    if not sequences:
        raise DataError(f"{path} has no sequences")
    return sequences, labels


def read_sequence(text: str, where: str) -> Tensor:
    """Return channels separated by ":" as a tensor (channels, frames)."""
    channels = [read_channel(channel, where) for channel in text.split(":")]
    lengths = [len(channel) for channel in channels]
    if len(set(lengths)) != 1:
        raise DataError(f"{where}: expected channels of equal length, got {lengths} frames")
    sequence = torch.tensor(channels, dtype=torch.float64)
    if not sequence.float().isfinite().all():
        raise DataError(f"{where}: a frame is not a finite number")
    return sequence


def read_channel(text: str, where: str) -> list[float]:
    """Return frames separated by commas."""
    frames = []
    for frame in text.split(","):
        number = parse_number(frame)
        if number is None:
            raise DataError(f"{where}: expected numbers as frames, got {frame[:60]!r}")
        frames.append(number)
    return frames


def pad(sequences: Sequence[Tensor], facts: dict[str, Any], path: Path) -> Tensor:
    """Return standardized sequences with their mask, shape (sequences, channels + 1, length).

    Raises:
        DataError: a sequence has other channels than the facts, or is too long; it names `path`.
    """
    dtype = torch.float64 if facts.get("float64") else torch.float32
    mean = torch.tensor(facts["mean"], dtype=dtype)[:, None]
    std = torch.tensor(facts["std"], dtype=dtype)[:, None]
    length = facts["length"]
    memory.check_room(
        4 * len(sequences) * (len(mean) + 1) * length,
        f"{len(sequences)} sequences of {length} frames",
    )
    inputs = torch.zeros(len(sequences), len(mean) + 1, length)
    for row, sequence in enumerate(sequences):
        channels, frames = sequence.shape
        if channels != len(mean):
            raise DataError(
                f"{path}, sequence {row + 1}: {channels} channels; the model takes {len(mean)}"
            )
        if frames > length:
            raise DataError(
                f"{path}, sequence {row + 1}: {frames} frames; the model takes {length} "
                "(data.length)"
            )
        inputs[row, :-1, :frames] = (sequence.to(dtype) - mean) / std
        inputs[row, -1, :frames] = 1
    return inputs


@datasets.register("vowels", aliases=["japanese_vowels"])
class Vowels(TsFiles):
    """Two Japanese vowels spoken by nine men; the class is the speaker.

    270 + 370 utterances of 7 to 29 frames of 12 LPC cepstrum coefficients (Kudo, Toyama and Shimbo
    1999, UCI). `scripts/fetch_data vowels` downloads the files.

    Args:
        path: the folder of JapaneseVowels_TRAIN.ts and _TEST.ts; null: where scripts/fetch_data
            puts them.
        val_fraction: share of the training utterances for validation, with the same share of
            each speaker.
        split_seed: seed of the draw.
        normalize: standardize each coefficient by the frames of the training split.
    """

    def __init__(
        self,
        path: Path | None = None,
        val_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        folder = path or data_folder("vowels", "6 MB", "data=digits model=rnn data.image=true")
        super().__init__(
            folder / "JapaneseVowels_TRAIN.ts",
            folder / "JapaneseVowels_TEST.ts",
            val_fraction=val_fraction,
            split_seed=split_seed,
            normalize=normalize,
        )
