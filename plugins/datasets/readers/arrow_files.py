"""Memory-mapped Arrow IPC files: rows are read at random, and only the columns that are used.

A file may come from a stranger. Its metadata is checked when it is opened: each buffer has to be
inside the file and long enough for its rows. Offsets of lists, texts and bytes are checked when
rows are read, and only those of these rows: checking all of them (`validate(full=True)`) would read
the file. A column that is read as a whole, such as the targets, is checked completely.
"""

import math
import mmap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from framework import DataError, did_you_mean

from .data_files import one_line, open_data

MAGIC = b"ARROW1"
ADVICE = "`framework data convert IN OUT` writes it as the data set needs it"
ROWS_PER_SCAN = 2**20  # of a column whose lengths are all read
DTYPES = {
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "halffloat": torch.float16,
    "float": torch.float32,
    "double": torch.float64,
}
UNSIGNED = {"uint16": (torch.int16, 0xFFFF), "uint32": (torch.int32, 0xFFFFFFFF)}
"""Types that torch does not index: the signed type of their size, and a mask."""


class Layout(NamedTuple):
    """How the values of one row are found in the buffers of a column.

    Attributes:
        levels: for each level of lists, the fixed number of items, or "int32" or "int64", the type
            of the offsets; bytes and texts are lists of uint8.
        leaf: the Arrow type of the values.
        field: the name of the field of a struct that contains the values; empty if it is none.
    """

    levels: tuple[int | str, ...]
    leaf: Any
    field: str = ""

    @property
    def is_bytes(self) -> bool:
        """Whether the values are the bytes of a text or of binary data."""
        return is_text(self.leaf) or is_binary(self.leaf)

    @property
    def is_number(self) -> bool:
        """Whether the values are numbers or booleans that can be inputs."""
        return str(self.leaf) in (*DTYPES, *UNSIGNED, "bool")

    @property
    def is_integer(self) -> bool:
        """Whether the values are integers."""
        from pyarrow import types

        return bool(types.is_integer(self.leaf))


def layout_of(kind: Any) -> Layout:
    """Return the layout of an Arrow type."""
    from pyarrow import types

    if is_extension(kind):
        return layout_of(kind.storage_type)
    if types.is_struct(kind):
        names = [kind.field(number).name for number in range(kind.num_fields)]
        if "bytes" in names:  # an image or a sound of Hugging Face
            inner = layout_of(kind.field(names.index("bytes")).type)
            return inner._replace(field="bytes")
        return Layout((), kind)
    levels: list[int | str] = []
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if types.is_fixed_size_list(kind):
            levels.append(kind.list_size)
        else:
            levels.append("int64" if types.is_large_list(kind) else "int32")
        kind = kind.value_type
        if is_extension(kind):
            kind = kind.storage_type
    if types.is_fixed_size_binary(kind):
        levels.append(kind.byte_width)
    elif types.is_large_string(kind) or types.is_large_binary(kind):
        levels.append("int64")
    elif is_text(kind) or is_binary(kind):
        levels.append("int32")
    return Layout(tuple(levels), kind)


def is_text(kind: Any) -> bool:
    """Return whether an Arrow type is one of texts."""
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def is_binary(kind: Any) -> bool:
    """Return whether an Arrow type is one of bytes."""
    from pyarrow import types

    is_variable = types.is_binary(kind) or types.is_large_binary(kind)
    return bool(is_variable or types.is_fixed_size_binary(kind))


class MappedFile:
    """An Arrow IPC file (Feather 2) or stream, mapped into memory.

    Attributes:
        path: the file.
        schema: the Arrow schema.

    Raises:
        DataError: the file is missing or damaged.
    """

    def __init__(self, path: Path):
        import numpy
        import pyarrow

        self.path = path
        with open_data(path) as file, arrow_errors(path):
            start = file.read(len(MAGIC))
            if not start:
                raise DataError(f"{path} is empty; expected an Arrow file")
            self.is_file = start == MAGIC
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.buffer = pyarrow.py_buffer(self.map)
        octets = numpy.frombuffer(self.map, numpy.uint8)
        with warnings.catch_warnings():
            # torch has no read-only tensors; nothing writes to this one.
            warnings.filterwarnings("ignore", message="The given (NumPy array|buffer)")
            self.octets = torch.from_numpy(octets)
        self.schema = self.open_reader().schema

    def open_reader(self) -> Any:
        """Return a reader of pyarrow."""
        import pyarrow

        # Not `included_fields`: the reader would copy these columns instead of mapping all.
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)
        source = pyarrow.BufferReader(self.buffer)
        with arrow_errors(self.path):
            if self.is_file:
                return pyarrow.ipc.open_file(source, options=options)
            return pyarrow.ipc.open_stream(source, options=options)

    def read_batches(self) -> Iterator[Any]:
        """Yield the record batches; their buffers are parts of the mapped file, and not read.

        Raises:
            DataError: the file is damaged or cut off.
        """
        reader = self.open_reader()
        with arrow_errors(self.path):
            if self.is_file:
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number)
            else:
                yield from reader

    def view(self, dtype: torch.dtype) -> Tensor:
        """Return the file as a tensor of numbers, without the last bytes that are no number."""
        size = dtype.itemsize
        return self.octets[: len(self.octets) // size * size].view(dtype)

    def position(self, buffer: Any, item_bytes: int, needed: int, column: str) -> int:
        """Return the position of a buffer in the file, counted in items.

        Args:
            buffer: a buffer of pyarrow.
            item_bytes: the size of an item in bytes.
            needed: the number of bytes that the rows need.
            column: the name of the column, for errors.

        Raises:
            DataError: the buffer is too short, or is not a part of the mapped file.
        """
        if needed == 0:
            return 0
        if buffer is None or buffer.size < needed:
            have = 0 if buffer is None else buffer.size
            raise DataError(
                f"{self.path} is damaged: column {column!r} has a buffer of {have:,} bytes, its "
                f"rows need {needed:,}"
            )
        start = buffer.address - self.buffer.address
        if start < 0 or start + needed > self.buffer.size:
            raise DataError(
                f"{self.path}: column {column!r} is compressed (or big-endian) and cannot be read "
                f"at random; {ADVICE}"
            )
        if start % item_bytes:
            raise DataError(f"{self.path}: column {column!r} is not aligned in the file; {ADVICE}")
        return start // item_bytes


@contextmanager
def arrow_errors(path: Path) -> Iterator[None]:
    """Raise errors of pyarrow as a DataError that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a readable Arrow IPC file ({one_line(error)}); it may be damaged or "
            "cut off: write it again"
        ) from error


def is_extension(kind: Any) -> bool:
    """Return whether an Arrow type is an extension of a stored type."""
    import pyarrow

    return isinstance(kind, pyarrow.BaseExtensionType)


@dataclass
class FileColumn:
    """The places of a column in one file, by the number of the record batch.

    Attributes:
        offsets: for each level of lists with offsets, the position of the first offset.
        counts: for each of these levels, the number of its lists.
        first: the position of the first value.
        values: the number of values.
    """

    offsets: list[Tensor]
    counts: list[Tensor]
    first: Tensor
    values: Tensor


class MappedColumn:
    """A column of several files.

    Args:
        table: the table of the column.
        name: its name.
        layout: how its rows are stored.
        parts: its places in each file.
    """

    def __init__(self, table: "MappedTable", name: str, layout: Layout, parts: list[FileColumn]):
        self.table = table
        self.name = name
        self.layout = layout
        self.parts = parts
        leaf = "uint8" if layout.is_bytes else str(layout.leaf)
        self.mask = UNSIGNED[leaf][1] if leaf in UNSIGNED else None
        self.is_bits = leaf == "bool"
        if self.is_bits:
            self.dtype = torch.uint8
        elif leaf in UNSIGNED:
            self.dtype = UNSIGNED[leaf][0]
        else:
            self.dtype = DTYPES[leaf]
        self.views = [file.view(self.dtype) for file in table.files]
        if self.fixed_shape is not None:
            # Row r of a record batch begins at bases[batch] + r * values of a row.
            first = torch.cat([part.first for part in parts])
            self.bases = first - table.batch_starts * math.prod(self.fixed_shape)

    @property
    def fixed_shape(self) -> tuple[int, ...] | None:
        """The shape of the values of each row; None if it is stored row by row."""
        sizes = []
        for level in self.layout.levels:
            if isinstance(level, str):
                return None
            sizes.append(level)
        return tuple(sizes)

    def spans(self, rows: Tensor) -> Iterator[tuple[int, Tensor, list[Tensor], Tensor, Tensor]]:
        """Yield the places of the values of some rows, file by file.

        Yields:
            The number of the file, the indices into `rows`, the number of items at each level, and
            the positions of the first value and after the last value.

        Raises:
            DataError: an offset points out of its buffer.
        """
        for number, chosen, batch, local in self.table.locate(rows):
            part = self.parts[number]
            start = local
            end = local + 1
            sizes = []
            level_with_offsets = 0
            for level in self.layout.levels:
                if isinstance(level, int):
                    start = start * level
                    end = end * level
                else:
                    count = part.counts[level_with_offsets][batch]
                    self.check_span(start, end, count, number, rows[chosen])
                    at = part.offsets[level_with_offsets][batch]
                    numbers = self.table.files[number].view(getattr(torch, level))
                    start = numbers[at + start].long()
                    end = numbers[at + end].long()
                    level_with_offsets += 1
                sizes.append(end - start)
            self.check_span(start, end, part.values[batch], number, rows[chosen])
            first = part.first[batch]
            yield number, chosen, sizes, first + start, first + end

    def check_span(
        self, start: Tensor, end: Tensor, count: Tensor, file: int, rows: Tensor
    ) -> None:
        """Raise DataError unless 0 <= start <= end <= count for each row."""
        is_wrong = (start < 0) | (end < start) | (end > count)
        if is_wrong.any():
            row = int(rows[is_wrong.nonzero()[0, 0]])
            raise DataError(
                f"{self.table.files[file].path} is damaged: column {self.name!r} of row {row + 1} "
                "points out of the data"
            )

    def lengths(self) -> Tensor:
        """Return the number of values of each row."""
        lengths = torch.empty(len(self.table), dtype=torch.int64)
        for rows in torch.arange(len(self.table)).split(ROWS_PER_SCAN):
            for _, chosen, _, start, end in self.spans(rows):
                lengths[rows[chosen]] = end - start
        return lengths

    def shape_of(self, row: int) -> tuple[int, ...]:
        """Return the shape of the values of a row; lists in lists are taken to have one length."""
        shape: list[int] = []
        total = 1
        for _, _, sizes, _, _ in self.spans(torch.tensor([row])):
            for size in sizes:
                shape.append(int(size) // max(total, 1))
                total = int(size)
        return tuple(shape)

    def read(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the values of some rows, shape (rows, *shape).

        Raises:
            DataError: a row has another shape.
        """
        needed = math.prod(shape)
        if self.fixed_shape is not None:
            starts = self.starts(rows)
            if len(self.views) == 1:
                return self.take(0, starts, needed).reshape(len(rows), *shape)
            pieces = self.by_file(self.table.file_of_batch[self.table.batch_of(rows)], starts)
        else:
            pieces = self.starts_of_lists(rows, shape)
        result: Tensor | None = None
        for number, chosen, starts in pieces:
            values = self.take(number, starts, needed)
            if result is None:
                result = values.new_empty(len(rows), needed)
            result[chosen] = values
        if result is None:
            result = torch.empty(0, needed, dtype=self.dtype)
        return result.reshape(len(rows), *shape)

    def starts(self, rows: Tensor) -> Tensor:
        """Return the positions of the first values of rows, for a column of fixed shape."""
        count = math.prod(self.fixed_shape or ())
        return self.bases[self.table.batch_of(rows)] + rows * count

    def by_file(self, files: Tensor, starts: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the number of each file, the indices of its rows, and the starts of these."""
        for number in torch.unique(files).tolist():
            chosen = (files == number).nonzero()[:, 0]
            yield number, chosen, starts[chosen]

    def starts_of_lists(
        self, rows: Tensor, shape: Sequence[int]
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the same as `by_file` for lists that are stored with offsets.

        Raises:
            DataError: a list has another shape.
        """
        for number, chosen, sizes, starts, _ in self.spans(rows):
            self.check_shape(sizes, shape, rows[chosen])
            yield number, chosen, starts

    def check_shape(self, sizes: list[Tensor], shape: Sequence[int], rows: Tensor) -> None:
        """Raise DataError for a row whose lists do not have a shape."""
        expected = 1
        for size, length in zip(sizes, shape, strict=True):
            expected *= length
            is_wrong = size != expected
            if is_wrong.any():
                row = int(rows[is_wrong.nonzero()[0, 0]])
                raise DataError(
                    f"{self.table.name}: column {self.name!r} of row {row + 1} has the shape "
                    f"{list(self.shape_of(row))}, the first row has {list(shape)}"
                )

    def take(self, file: int, start: Tensor, count: int) -> Tensor:
        """Return `count` values from each start, shape (starts, count)."""
        view = self.views[file]
        if self.is_bits:
            bits = start[:, None] + torch.arange(count)
            return view[bits >> 3].bitwise_right_shift(bits & 7).bitwise_and(1).to(torch.uint8)
        if count == 0:
            return view.new_empty(len(start), 0)
        # Overlapping rows, one at each position: one copy for each row, from any record batch.
        windows = view.as_strided((len(view) - count + 1, count), (1, 1))
        values = windows.index_select(0, start)
        return values if self.mask is None else values.long() & self.mask

    def read_lists(self, rows: Tensor, lengths: Tensor, width: int) -> Tensor:
        """Return lists of integers, cut to `lengths` and padded with 0: shape (rows, width)."""
        columns = torch.arange(width)
        result = torch.zeros(len(rows), width, dtype=torch.int64)
        for number, chosen, _, start, end in self.spans(rows):
            kept = torch.minimum(lengths[chosen], end - start)
            is_inside = columns < kept[:, None]
            places = (start[:, None] + columns)[is_inside]
            values = self.views[number][places].long()
            if self.mask is not None:
                values &= self.mask
            part = torch.zeros(len(chosen), width, dtype=torch.int64)
            part[is_inside] = values
            result[chosen] = part
        return result

    def read_bytes(self, row: int) -> bytes:
        """Return the bytes of a row.

        Raises:
            DataError: the row is empty.
        """
        for number, _, _, start, end in self.spans(torch.tensor([row])):
            content = bytes(self.table.files[number].map[int(start) : int(end)])
            if content:
                return content
        raise DataError(f"{self.where(row)} is empty; drop the row or fill it in")

    def read_text(self, row: int) -> str:
        """Return the text of a row; empty for an empty cell."""
        for number, _, _, start, end in self.spans(torch.tensor([row])):
            content = bytes(self.table.files[number].map[int(start) : int(end)])
            return content.decode("utf-8", "replace")
        return ""

    def where(self, row: int) -> str:
        """Return the place of a row for messages."""
        return f"{self.table.name}, row {row + 1}, column {self.name!r}"


class MappedTable:
    """Columns of one or more Arrow files with one schema, whose rows are read at random.

    Pickling it stores the paths: a data worker that is not forked maps the files again.

    Args:
        paths: the files, whose rows are numbered through all of them.
        columns: the columns to read at random.
        setting: the setting that names them, with its value, for errors; "" for none.

    Raises:
        DataError: a file is missing or damaged, or a column is missing or cannot be read.
    """

    def __init__(self, paths: Sequence[Path], columns: Sequence[str], setting: str = ""):
        self.paths = list(paths)
        self.names = list(columns)
        self.files = [MappedFile(path) for path in paths]
        self.name = str(paths[0]) if len(paths) == 1 else str(paths[0].parent)
        layouts = {}
        for name in columns:
            layouts[name] = check_column(self.files, name, setting)
        places: dict[str, list[FileColumn]] = {name: [] for name in columns}
        starts: list[Tensor] = []
        self.sizes: list[int] = []
        rows = 0
        for file in self.files:
            lengths, found = find_places(file, layouts)
            for name, part in found.items():
                places[name].append(part)
            size = int(lengths.sum())
            starts.append(rows + lengths.cumsum(0) - lengths)
            self.sizes.append(size)
            rows += size
        self.rows = rows
        if rows == 0:
            raise DataError(f"{self.name} has no rows")
        self.batch_starts = torch.cat(starts)
        self.first_batch = torch.tensor([0, *map(len, starts)]).cumsum(0)
        file_numbers = torch.arange(len(self.files))
        self.file_of_batch = file_numbers.repeat_interleave(self.first_batch.diff())
        self.columns: dict[str, MappedColumn] = {}
        for name in columns:
            self.columns[name] = MappedColumn(self, name, layouts[name], places[name])

    def __len__(self) -> int:
        return self.rows

    def __reduce__(self) -> Any:
        return MappedTable, (self.paths, self.names)

    def batch_of(self, rows: Tensor) -> Tensor:
        """Return the number of the record batch of each row, counted through all files."""
        return torch.searchsorted(self.batch_starts, rows, right=True) - 1

    def locate(self, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield the places of some rows, file by file.

        Yields:
            The number of the file, the indices into `rows`, the numbers of the record batches in
            the file, and the rows in their batches.
        """
        batch = self.batch_of(rows)
        local = rows - self.batch_starts[batch]
        if len(self.files) == 1:
            yield 0, torch.arange(len(rows)), batch, local
            return
        files = self.file_of_batch[batch]
        for number in torch.unique(files).tolist():
            chosen = (files == number).nonzero()[:, 0]
            yield number, chosen, batch[chosen] - self.first_batch[number], local[chosen]


def require_name(schema: Any, name: str, path: Path, setting: str = "") -> None:
    """Raise DataError if a schema does not have a column, or has it twice.

    Args:
        schema: of the file.
        name: of the column.
        path: the file.
        setting: the setting that names the column, with its value, for errors; "" for none.
    """
    if name not in schema.names:
        raise DataError(
            f"{before(setting)}expected a column {name!r} in {path}; "
            f"{did_you_mean(name, schema.names)}"
        )
    if schema.names.count(name) > 1:
        raise DataError(
            f"{before(setting)}expected one column {name!r} in {path}, got two; rename one"
        )


def before(setting: str) -> str:
    """Return a setting as the beginning of a message; "" for none."""
    return f"{setting}: " if setting else ""


def check_column(files: Sequence[MappedFile], name: str, setting: str = "") -> Layout:
    """Return the layout of a column, which all files must have with one type.

    The arguments are those of `require_name`.
    """
    require_name(files[0].schema, name, files[0].path, setting)
    kind = files[0].schema.field(name).type
    for file in files[1:]:
        require_name(file.schema, name, file.path, setting)
        other = file.schema.field(name).type
        if other != kind:
            raise DataError(
                f"{before(setting)}expected one type of column {name!r}, got {other} in "
                f"{file.path} and {kind} in {files[0].path}"
            )
    layout = layout_of(kind)
    is_list_of_bytes = layout.is_bytes and len(layout.levels) > 1
    if is_list_of_bytes or not (layout.is_number or is_text(layout.leaf) or is_binary(layout.leaf)):
        raise DataError(
            f"{before(setting)}expected numbers, texts, bytes or lists of numbers in column "
            f"{name!r} of {files[0].path}, got the type {kind}. For other types: {ADVICE}"
        )
    return layout


def find_places(
    file: MappedFile, layouts: Mapping[str, Layout]
) -> tuple[Tensor, dict[str, FileColumn]]:
    """Return the lengths of the record batches, and the places of the columns.

    Raises:
        DataError: the file is damaged, or a column has empty cells.
    """
    lengths: list[int] = []
    found: dict[str, list[Any]] = {name: [] for name in layouts}
    for batch in file.read_batches():
        lengths.append(batch.num_rows)
        for name, layout in layouts.items():
            column = batch.column(batch.schema.get_field_index(name))
            found[name].append(places_in_batch(file, name, layout, column))
    parts = {}
    for name, layout in layouts.items():
        levels = sum(isinstance(level, str) for level in layout.levels)
        numbers = torch.tensor(found[name], dtype=torch.int64).reshape(-1, 2 * levels + 2)
        parts[name] = FileColumn(
            [numbers[:, 2 * level].clone() for level in range(levels)],
            [numbers[:, 2 * level + 1].clone() for level in range(levels)],
            numbers[:, -2].clone(),
            numbers[:, -1].clone(),
        )
    return torch.tensor(lengths, dtype=torch.int64), parts


def places_in_batch(file: MappedFile, name: str, layout: Layout, column: Any) -> list[int]:
    """Return position and number of the lists of each level with offsets, and of the values."""
    import pyarrow

    if isinstance(column, pyarrow.ExtensionArray):
        column = column.storage
    if layout.field:
        check_no_nulls(file, name, column)
        column = column.field(layout.field)
    numbers: list[int] = []
    count = len(column)
    values = count  # that the levels so far need
    for level in layout.levels:
        check_no_nulls(file, name, column)
        if isinstance(level, int):
            values *= level
        else:
            size = 4 if level == "int32" else 8
            offsets = column.buffers()[1]
            needed = (count + 1) * size if count else 0
            numbers += [file.position(offsets, size, needed, name), count]
        if is_text(column.type) or is_binary(column.type):
            break
        column = column.values
        if isinstance(column, pyarrow.ExtensionArray):
            column = column.storage
        if isinstance(level, int) and len(column) < values:
            raise DataError(
                f"{file.path} is damaged: column {name!r} has {len(column):,} values, its rows "
                f"need {values:,}"
            )
        count = values = len(column)
    else:
        check_no_nulls(file, name, column)
    data = column.buffers()[-1]
    if layout.is_bytes:
        if isinstance(layout.levels[-1], str):
            values = 0 if data is None else data.size
        return [*numbers, file.position(data, 1, values, name), values]
    if str(layout.leaf) == "bool":
        return [*numbers, 8 * file.position(data, 1, -(-values // 8), name), values]
    size = layout.leaf.bit_width // 8
    return [*numbers, file.position(data, size, values * size, name), values]


def check_no_nulls(file: MappedFile, name: str, column: Any) -> None:
    """Raise DataError for a column with empty cells."""
    if column.null_count:
        raise DataError(
            f"{file.path}: column {name!r} has {column.null_count:,} empty cells (or more); fill "
            "them in or drop these rows"
        )


def read_column(files: Iterable[MappedFile], name: str, setting: str = "") -> Any:
    """Return a whole column as a pyarrow.ChunkedArray, completely checked.

    The arguments are those of `require_name`.

    Raises:
        DataError: the column is missing, damaged or has different types in the files.
    """
    import pyarrow

    chunks: list[Any] = []
    kind: Any = None
    for file in files:
        require_name(file.schema, name, file.path, setting)
        own_kind = file.schema.field(name).type
        kind = kind or own_kind
        if own_kind != kind:
            raise DataError(
                f"{before(setting)}expected the type {kind} of the first file in column {name!r} "
                f"of {file.path}, got {own_kind}"
            )
        for batch in file.read_batches():
            chunk = batch.column(batch.schema.get_field_index(name))
            with arrow_errors(file.path):
                chunk.validate(full=True)
            chunks.append(chunk)
    if pyarrow.types.is_dictionary(kind):
        chunks = [chunk.dictionary_decode() for chunk in chunks]
        kind = kind.value_type
    return pyarrow.chunked_array(chunks, type=kind)
