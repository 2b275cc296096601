"""The rows of files to predict: found, named, and read in chunks of a bounded size."""

import glob
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from framework.errors import DataError, short
from framework.errors.paths import expanded
from framework.runtime.batch import Batch, count_rows, join_rows, select_rows

STDIN = "-"
CHUNK_BYTES = 2**24  # of inputs in float32
MAX_CHUNK_ROWS = 2**14


@dataclass(frozen=True)
class InputFile:
    """A file, a folder or standard input to predict.

    Attributes:
        path: the file as the user names it; "-" for standard input.
        ids: the columns of the file that identify a row.
        rows: the number of rows to read at once.
        stream: standard input; None for a file.
    """

    path: Path
    ids: Sequence[str] = ()
    rows: int = MAX_CHUNK_ROWS
    stream: IO[bytes] | None = None


@dataclass
class InputRows:
    """Consecutive rows of a file.

    Attributes:
        inputs: shape (rows, *in_shape); or a dict of tensors for batches with named fields.
        ids: the cells of the columns that identify a row, by column.
        first: number of the first row in its file; the first row of a file is 1.
        file: the file as the user names it.
    """

    inputs: Batch
    ids: dict[str, Sequence[Any]] = field(default_factory=dict)
    first: int = 1
    file: str = ""

    def __len__(self) -> int:
        return count_rows(self.inputs)

    def slice(self, start: int, stop: int) -> "InputRows":
        """Return the rows from start to stop."""
        ids = {name: cells[start:stop] for name, cells in self.ids.items()}
        inputs = select_rows(self.inputs, start, stop)
        return InputRows(inputs, ids, self.first + start, self.file)


def chunk_rows(in_shape: Sequence[int], batch_size: int) -> int:
    """Return how many rows to read at once: whole batches, at most CHUNK_BYTES if possible."""
    bytes_per_row = 4 * max(1, torch.Size(in_shape).numel())
    rows = min(MAX_CHUNK_ROWS, CHUNK_BYTES // bytes_per_row)
    return max(1, rows // batch_size) * batch_size


def find_input_files(names: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Return the files that the arguments name: files, folders, patterns, or "-".

    Args:
        names: the arguments. A pattern such as "new/*.png" is expanded if no file has its name.
        suffixes: of the files in a folder, at any depth; if empty, a folder is one input.

    Raises:
        DataError: there is no such file, or a folder or pattern has none.
    """
    found: list[Path] = []
    for name in names:
        if name == STDIN:
            found.append(Path(STDIN))
            continue
        path = expanded(name)
        if path.is_dir() and suffixes:
            found += files_in(path, suffixes)
        elif path.exists() or not glob.has_magic(name):
            found.append(path)
        else:
            matches = sorted(glob.glob(str(path), recursive=True))
            if not matches:
                raise DataError(f"--input {short(name, quote=False)}: no file has such a name")
            found += find_input_files(matches, suffixes)
    if found.count(Path(STDIN)) > 1:
        raise DataError("--input: expected - (standard input) at most once")
    return found


def files_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files with one of the suffixes in a folder, at any depth, sorted."""
    files = []
    for file in folder.rglob("*"):
        is_known = file.name.lower().endswith(tuple(suffixes))
        if is_known and not file.name.startswith(".") and not file.is_dir():
            files.append(file)
    if not files:
        raise DataError(f"{folder}: expected files with a suffix of {', '.join(suffixes)}")
    return sorted(files)


def opened(path: Path, ids: Sequence[str], rows: int) -> InputFile:
    """Return a file, or standard input for "-"."""
    if path != Path(STDIN):
        return InputFile(path, ids, rows)
    return InputFile(path, ids, rows, stream=sys.stdin.buffer)


def regrouped(chunks: Iterable[InputRows], rows: int) -> Iterator[list[InputRows]]:
    """Yield groups of chunks with `rows` rows together; the last group may have fewer."""
    group: list[InputRows] = []
    size = 0
    for chunk in chunks:
        start = 0
        while start < len(chunk):
            stop = min(len(chunk), start + rows - size)
            group.append(chunk.slice(start, stop))
            size += stop - start
            start = stop
            if size == rows:
                yield group
                group = []
                size = 0
    if group:
        yield group


def joined_inputs(group: Sequence[InputRows]) -> Batch:
    """Return the inputs of a group of chunks."""
    if len(group) == 1:
        return group[0].inputs
    return join_rows([chunk.inputs for chunk in group])


def name_columns(
    group: Sequence[InputRows], with_file: bool, with_row: bool
) -> dict[str, list[Any]]:
    """Return the columns that identify the rows of a group: `file`, `row`, and those of the file.

    Args:
        group: the chunks.
        with_file: whether there is a column `file`.
        with_row: whether there is a column `row`.
    """
    columns: dict[str, list[Any]] = {}
    for chunk in group:
        count = len(chunk)
        if with_file:
            columns.setdefault("file", []).extend([chunk.file] * count)
        if with_row:
            columns.setdefault("row", []).extend(range(chunk.first, chunk.first + count))
        for name, cells in chunk.ids.items():
            columns.setdefault(name, []).extend(cells)
    return columns
