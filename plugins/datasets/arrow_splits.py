"""Splits of data sets in Arrow files: rows are read from the mapped files when they are needed."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from framework import Batch, GatheredSplit, RaggedSplit

from .audio import decode_sound
from .images import decode_image
from .readers.arrow_files import MappedTable
from .readers.scaling import standardize
from .text import encode

RIFF = b"RIFF"  # a wav file begins with it


class MappedNumbers(GatheredSplit):
    """Rows of numbers, read and scaled batch by batch.

    Args:
        table: the mapped columns.
        rows: the numbers of the rows of this split.
        labels: the targets of these rows, in memory.
        shapes: for each column, the shape of the values of a row.
        facts: how the values are scaled (see `standardize`), and "in_shape".
    """

    reuses_memory = False
    place = "memory-mapped"

    def __init__(
        self,
        table: MappedTable,
        rows: Tensor,
        labels: Tensor,
        shapes: Sequence[tuple[int, ...]],
        facts: dict[str, Any],
    ):
        self.table = table
        self.rows = rows
        self.labels = labels
        self.shapes = list(shapes)
        self.facts = facts
        self.dtype = torch.float64 if facts.get("float64") else torch.float32
        self.mean = torch.as_tensor(facts["mean"], dtype=self.dtype)
        self.std = torch.as_tensor(facts["std"], dtype=self.dtype)
        self.starts: Tensor | None = None
        columns = list(table.columns.values())
        if len(columns) == 1 and len(table.files) == 1 and columns[0].fixed_shape is not None:
            # Computed once: reading is a tenth faster (`scripts/bench data`, row reading).
            self.starts = columns[0].starts(rows)
        self.bytes_per_sample = 4 * math.prod(facts["in_shape"]) + labels[:1].nbytes

    def __len__(self) -> int:
        return len(self.rows)

    def content(self) -> Any:
        """Return the content of the samples, see `Data`."""
        return [self.table.paths, self.table.names, self.rows, self.labels, self.facts]

    def gather(self, indices: Tensor) -> Batch:
        raw = self.read_raw(indices)
        # As `standardize`, without its copy: `raw` is new, and has been read from the file.
        inputs = raw.to(self.dtype).sub_(self.mean).div_(self.std).float()
        labels = self.labels.index_select(0, indices)
        if self.device.type == "cpu":
            return inputs, labels
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in (inputs, labels))

    def read_raw(self, indices: Tensor) -> Tensor:
        """Return the numbers of some samples as they are in the files."""
        in_shape = self.facts["in_shape"]
        if self.starts is None:
            return read_numbers(self.table, self.rows[indices], self.shapes, in_shape)
        column = next(iter(self.table.columns.values()))
        values = column.take(0, self.starts.index_select(0, indices), math.prod(in_shape))
        return values.reshape(len(indices), *in_shape)


def read_numbers(
    table: MappedTable, rows: Tensor, shapes: Sequence[tuple[int, ...]], in_shape: Sequence[int]
) -> Tensor:
    """Return the numbers of some rows, shape (rows, *in_shape), as they are in the files.

    Args:
        table: the mapped columns, which are joined in their order.
        rows: the numbers of the rows.
        shapes: for each column, the shape of the values of a row.
        in_shape: the shape of an input.
    """
    columns = []
    for column, shape in zip(table.columns.values(), shapes, strict=True):
        columns.append(column.read(rows, shape).reshape(len(rows), -1))
    joined = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
    return joined.reshape(len(rows), *in_shape)


class MappedSequences(RaggedSplit):
    """Lists of token ids of unequal length; a batch is padded with 0 to its longest list.

    Args:
        table: the mapped table; its only column has the lists.
        rows: the numbers of the rows of this split.
        labels: the targets of these rows, in memory.
        lengths: the lengths of these rows.
        bucket: see `RaggedSplit`.
    """

    place = "memory-mapped"

    def __init__(
        self, table: MappedTable, rows: Tensor, labels: Tensor, lengths: Tensor, bucket: int
    ):
        self.table = table
        self.rows = rows
        self.labels = labels
        self.lengths = lengths
        self.bucket = bucket

    def content(self) -> Any:
        """Return the content of the samples, see `Data`."""
        files = [self.table.paths, self.table.names]
        return [*files, self.rows, self.labels, self.lengths, self.bucket]

    def gather_part(self, indices: Tensor, batch: Tensor) -> Batch:
        column = next(iter(self.table.columns.values()))
        width = int(self.lengths[batch].max())
        tokens = column.read_lists(self.rows[indices], self.lengths[indices], width)
        parts = (tokens, self.labels[indices])
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in parts)


class MappedFields(RaggedSplit):
    """Columns of numbers, and the targets, by name: a batch is a dict of tensors.

    Integers and booleans become int64, other numbers float32 (see `standardize`). Lists of unequal
    length are padded with 0 to the longest list of their column in the batch.

    Args:
        table: the mapped columns.
        rows: the numbers of the rows of this split.
        labels: the targets of these rows, in memory.
        target: the name of the targets in a batch.
        columns: for each column, how it is scaled, and "shape", that of a row.
        lengths: for each column of lists of unequal length, the lengths of these rows.
        bucket: see `RaggedSplit`; by the lengths of the first such column.
    """

    place = "memory-mapped"

    def __init__(
        self,
        table: MappedTable,
        rows: Tensor,
        labels: Tensor,
        target: str,
        columns: Mapping[str, dict[str, Any]],
        lengths: Mapping[str, Tensor],
        bucket: int,
    ):
        self.table = table
        self.rows = rows
        self.labels = labels
        self.target = target
        self.columns = columns
        self.lengths_of = lengths
        self.lengths = next(iter(lengths.values()), rows)
        self.bucket = bucket if lengths else 0

    def content(self) -> Any:
        """Return the content of the samples, see `Data`."""
        samples = [self.table.paths, self.table.names, self.rows, self.labels, self.target]
        return [*samples, self.columns, self.lengths_of, self.bucket]

    def gather_part(self, indices: Tensor, batch: Tensor) -> Batch:
        widths = {name: int(lengths[batch].max()) for name, lengths in self.lengths_of.items()}
        fields = self.inputs(indices, widths) | {self.target: self.labels[indices]}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in fields.items()}

    def inputs(self, indices: Tensor, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the inputs of some samples by name.

        Args:
            indices: of the samples.
            widths: for each column of lists of unequal length, the length to pad them to.
        """
        rows = self.rows[indices]
        fields = {}
        for name, column in self.table.columns.items():
            if name in widths:
                lengths = self.lengths_of[name][indices]
                fields[name] = column.read_lists(rows, lengths, widths[name])
                continue
            values = column.read(rows, self.columns[name]["shape"])
            if values.is_floating_point():
                fields[name] = standardize(values, self.columns[name])
            else:
                fields[name] = values.long()
        return fields


class EncodedRows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Rows of encoded inputs; an input is decoded when its sample is read, by a data worker.

    Args:
        table: the mapped table; its only column has the encoded inputs.
        rows: the numbers of the rows of this split.
        labels: the targets of these rows, in memory.
        facts: how a row becomes an input.
    """

    def __init__(self, table: MappedTable, rows: Tensor, labels: Tensor, facts: dict[str, Any]):
        self.table = table
        self.rows = rows
        self.labels = labels
        self.facts = facts
        self.column = next(iter(table.columns.values()))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.read(int(self.rows[index])), self.labels[index]

    def __reduce__(self) -> Any:
        return rebuild, (type(self), self.table, self.rows, self.labels, self.facts)

    def read(self, row: int) -> Tensor:
        """Return a row as an input."""
        raise NotImplementedError

    def content(self) -> Any:
        """Return the content of the samples, see `Data`."""
        return [self.table.paths, self.table.names, self.rows, self.labels, self.facts]


def rebuild(kind: type[EncodedRows], *parts: Any) -> EncodedRows:
    """Return a split that was pickled; its column is that of its table."""
    return kind(*parts)


class MappedImages(EncodedRows):
    """Images as the bytes of image files."""

    def read(self, row: int) -> Tensor:
        return standardize(self.read_pixels(row), self.facts)

    def read_pixels(self, row: int) -> Tensor:
        """Return the pixels of a row as uint8, see `decode_image`."""
        content = io.BytesIO(self.column.read_bytes(row))
        return decode_image(content, self.column.where(row), self.facts)


class MappedSounds(EncodedRows):
    """Sounds as the bytes of sound files."""

    def read(self, row: int) -> Tensor:
        content = self.column.read_bytes(row)
        suffix = ".wav" if content.startswith(RIFF) else ""
        return decode_sound(io.BytesIO(content), self.column.where(row), suffix, self.facts)


class MappedTexts(EncodedRows):
    """Texts, encoded as token ids and padded with 0 to facts["max_length"].

    Attributes:
        tokenizer: the fitted tokenizer; set before a sample is read.
    """

    tokenizer: Any = None

    def __reduce__(self) -> Any:
        return (*super().__reduce__(), {"tokenizer": self.tokenizer})

    def read(self, row: int) -> Tensor:
        max_length = self.facts["max_length"]
        ids = encode(self.column.read_text(row), self.tokenizer, max_length)
        tokens = torch.zeros(max_length, dtype=torch.int64)
        tokens[: len(ids)] = ids
        return tokens
