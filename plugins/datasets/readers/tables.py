"""Read CSV and Parquet files as tables of Arrow columns."""

import csv
import io
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from framework import DataError, SettingError, did_you_mean

from .columns import as_number
from .data_files import check_memory, file_errors, one_line, open_data, open_unpacked, read_bytes

Cells = Any
"""A column of a file: a pyarrow.ChunkedArray."""
Table = dict[str, Cells]

NULL_VALUES = ["", "?", "NA", "na", "N/A", "n/a", "NaN", "NAN", "nan", "NULL", "null", "None"]
"""Spellings of an empty cell that Arrow reads as null; `as_text` knows the others."""

TABLE_SUFFIXES = (".csv", ".csv.gz", ".csv.zip", ".tsv", ".tsv.gz", ".parquet", ".pq")
CHUNK_BYTES = 2**22  # of a CSV file that is read in chunks
MIN_BLOCK_BYTES = 2**20  # of a CSV file that Arrow parses at once
MIN_BLOCK_BYTES_PER_COLUMN = 2**12  # so that a block of thousands of columns has hundreds of rows
MAX_BLOCK_BYTES = 2**31 - 1


def read_table(path: Path, delimiter: str | None = None) -> Table:
    """Return the columns of a CSV or Parquet file; those of a CSV file are texts.

    Args:
        path: a .parquet or .pq file; a file with any other suffix is read as CSV.
        delimiter: the separator of the cells; None: the most frequent of , ; | and tab in the
            first line.

    Raises:
        DataError: the file is missing or malformed, or has no rows.
    """
    path = path.expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a .csv or .parquet file")
    is_parquet = path.suffix in (".parquet", ".pq")
    table = read_parquet(path) if is_parquet else read_csv(path, delimiter)
    if not table or not count_rows(table):
        raise DataError(f"{path} has no rows")
    return table


def read_table_chunks(
    path: Path,
    rows: int,
    columns: Sequence[str],
    delimiter: str | None = None,
    stream: IO[bytes] | None = None,
) -> Iterator[Table]:
    """Yield the columns of a CSV or Parquet file in chunks, which need little memory.

    Args:
        path: the file, see `read_table`.
        rows: the number of rows of a chunk of a Parquet file; a chunk of a CSV file has
            CHUNK_BYTES.
        columns: the columns to read from a Parquet file.
        delimiter: see `read_table`.
        stream: a CSV file that is read instead of `path`, such as standard input.

    Raises:
        DataError: the file is missing or malformed, or has no rows.
    """
    if stream is None and path.is_dir():
        raise DataError(f"{path} is a folder; expected a .csv or .parquet file")
    if stream is None and path.suffix in (".parquet", ".pq"):
        chunks = parquet_chunks(path, rows, columns)
    else:
        chunks = csv_chunks(path, delimiter, stream)
    is_empty = True
    for table in chunks:
        if table and count_rows(table):
            is_empty = False
            yield table
    if is_empty:
        raise DataError(f"{path} has no rows")


def csv_chunks(path: Path, delimiter: str | None, stream: IO[bytes] | None) -> Iterator[Table]:
    """Yield the columns of a CSV file as texts, in chunks of about CHUNK_BYTES."""
    header = b""
    lines = 0
    size = 0
    with open_unpacked(path, stream) as file, file_errors(path):
        for block in row_blocks(file, path):
            try:
                block.decode()
            except UnicodeDecodeError as error:
                place = size + error.start
                raise DataError(
                    f"{path} is not UTF-8 text (byte {place}); save it as UTF-8"
                ) from error
            if not header:
                header = block[: end_of_header(block)]
                yield read_csv_content(block, path, delimiter)
            elif block.strip():
                yield read_csv_content(header + block, path, delimiter, lines - header.count(b"\n"))
            lines += block.count(b"\n")
            size += len(block)


def end_of_header(content: bytes) -> int:
    """Return where the first row of CSV ends."""
    end = 0
    while True:
        end = content.find(b"\n", end) + 1
        if end == 0:
            return len(content)
        if content.count(b'"', 0, end) % 2 == 0:
            return end


def row_blocks(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yield the content of a CSV file in blocks of whole rows.

    A line end is inside of a cell if the number of quotes before it is odd.
    """
    rest = b""
    while True:
        piece = file.read(CHUNK_BYTES)
        if not piece:
            break
        rest += piece
        check_memory(2 * len(rest), path)
        end = end_of_rows(rest)
        if end:
            yield rest[:end]
            rest = rest[end:]
    if rest:
        yield rest


def end_of_rows(content: bytes) -> int:
    """Return where the last complete row of CSV ends; 0 if there is none."""
    quotes = content.count(b'"')
    end = len(content)
    while True:
        newline = content.rfind(b"\n", 0, end)
        quotes -= content.count(b'"', newline + 1, end)
        if newline < 0 or quotes % 2 == 0:
            return newline + 1
        end = newline


def parquet_chunks(path: Path, rows: int, columns: Sequence[str]) -> Iterator[Table]:
    """Yield some columns of a Parquet file, `rows` rows at a time."""
    import pyarrow
    import pyarrow.parquet

    with open_data(path) as file, file_errors(path):
        try:
            parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
            for label in columns:
                require_column(dict.fromkeys(parquet.schema_arrow.names), label, path)
            for batch in parquet.iter_batches(rows, columns=list(columns)):
                table = pyarrow.Table.from_batches([batch])
                cells = zip(table.column_names, table.columns, strict=True)
                yield {label: plain_cells(column) for label, column in cells}
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is not a readable Parquet file: {one_line(error)}") from error


def count_rows(table: Table) -> int:
    """Return the number of rows of a table with at least one column."""
    return len(next(iter(table.values())))


def require_column(table: Table, label: str, path: Path) -> Cells:
    """Return a column.

    Raises:
        DataError: the table does not have the column.
    """
    if label not in table:
        raise DataError(f"{path} has no column {label!r}; {did_you_mean(label, table)}")
    return table[label]


def read_csv(path: Path, delimiter: str | None = None) -> Table:
    """Return the columns of a CSV file as texts; a cell that is one of NULL_VALUES is null."""
    return read_csv_content(read_bytes(path), path, delimiter)


def read_csv_content(
    content: bytes, path: Path, delimiter: str | None = None, skipped: int = 0
) -> Table:
    """Return the columns of the content of a CSV file as texts; see `read_csv`.

    Args:
        content: the header and rows.
        path: the file, for errors.
        delimiter: see `read_table`.
        skipped: lines of the file between the header and the rows, for errors.
    """
    first_line = re.match(rb"[^\r\n]*", content)[0]  # type: ignore[index]
    if not delimiter:
        delimiter = max((b",", b";", b"\t", b"|"), key=first_line.count).decode()
    elif len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n\0':
        raise SettingError(f"delimiter={delimiter!r}: expected one ASCII character, such as , or ;")
    with file_errors(path):
        with closing(csv_rows(content, delimiter, path)) as rows:
            _, header = next(rows, (1, []))
            header = [label.strip() for label in header]
            check_header(header, path)
            if not any(row for _, row in rows):
                return {}
        has_quotes = content.find(b'"', len(first_line)) >= 0
        if has_quotes:
            # Arrow accepts quotes that are not closed, and text after a closing quote.
            check_rows(content, len(header), delimiter, path, skipped)
        return parse_rows(content, header, delimiter, has_quotes, path, skipped)


def csv_rows(
    content: bytes, delimiter: str, path: Path, skipped: int = 0
) -> Generator[tuple[int, list[str]], None, None]:
    """Yield the line number and the cells of each row.

    Raises:
        DataError: the CSV is malformed.
    """
    lines = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline="")
    limit = csv.field_size_limit(MAX_BLOCK_BYTES)
    first_line = 1  # of the row that is read
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        for row in reader:
            yield reader.line_num, row
            first_line = reader.line_num + 1
    except UnicodeDecodeError:
        content.decode("utf-8-sig")  # raises the error with the position in the file
        raise
    except csv.Error as error:
        reason = str(error)
        if reason == "unexpected end of data":  # csv.Error has neither a code nor subclasses
            reason = 'a quote (") is not closed'
        raise DataError(
            f"{path}, line {skipped + first_line}: not well-formed CSV: {reason}"
        ) from error
    finally:
        csv.field_size_limit(limit)


def check_header(header: Sequence[str], path: Path) -> None:
    """Raise DataError for columns without a name or with the same name, and for numbers."""
    if not any(header):
        raise DataError(f"{path} is empty; the first line must name the columns")
    seen = set()
    for label in header:
        if label in seen:
            raise DataError(f"{path}: two columns are called {label!r}; rename one")
        seen.add(label)
    if "" in header:
        raise DataError(
            f"{path}: column {header.index('') + 1} has no name (row numbers?); "
            "name it in the first line, or remove it"
        )
    if all(as_number(label) is not None for label in header):
        raise DataError(
            f"{path}: the first line must name the columns, got numbers: {', '.join(header[:5])}"
        )


def check_rows(content: bytes, columns: int, delimiter: str, path: Path, skipped: int = 0) -> None:
    """Raise DataError for the first malformed row: its encoding, its quotes or its length."""
    for line, row in csv_rows(content, delimiter, path, skipped):
        if row and len(row) != columns:
            raise DataError(
                f"{path}, line {skipped + line}: {len(row)} cells, but {columns} columns"
            )


def parse_rows(
    content: bytes,
    header: Sequence[str],
    delimiter: str,
    has_quotes: bool,
    path: Path,
    skipped: int = 0,
) -> Table:
    """Parse the rows after the header with Arrow.

    Raises:
        DataError: a row is malformed.
    """
    import pyarrow
    from pyarrow import csv as arrow_csv

    names = [str(number) for number in range(len(header))]
    parse_options = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=has_quotes)
    convert_options = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pyarrow.string()),
        null_values=NULL_VALUES,
        strings_can_be_null=True,
    )
    block_bytes = max(MIN_BLOCK_BYTES, MIN_BLOCK_BYTES_PER_COLUMN * len(header))
    while True:
        read_options = arrow_csv.ReadOptions(
            column_names=names,
            skip_rows_after_names=1,
            block_size=min(block_bytes, MAX_BLOCK_BYTES),
        )
        try:
            table = arrow_csv.read_csv(
                pyarrow.BufferReader(content), read_options, parse_options, convert_options
            )
            return dict(zip(header, table.columns, strict=True))
        except pyarrow.ArrowInvalid as error:
            # Arrow has one class of error for malformed files and for a row longer than a block.
            if "straddl" in str(error) and block_bytes < min(len(content), MAX_BLOCK_BYTES):
                block_bytes *= 16
                continue
            check_rows(content, len(header), delimiter, path, skipped)
            raise DataError(f"{path} is not well-formed CSV: {one_line(error)}") from error


def read_parquet(path: Path) -> Table:
    """Return the columns of a Parquet file.

    Raises:
        DataError: the file cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    with open_data(path) as file, file_errors(path):
        try:
            table = pyarrow.parquet.read_table(file)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is not a readable Parquet file: {one_line(error)}") from error
        columns = {}
        for label, cells in zip(table.column_names, table.columns, strict=True):
            columns[label] = plain_cells(cells)
        return columns


def plain_cells(cells: Cells) -> Cells:
    """Return a column as booleans, numbers or texts: decimals as float64, other types as texts."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(cells.type):
        cells = cells.cast(cells.type.value_type)
    kind = cells.type
    if types.is_decimal(kind):
        return cells.cast("float64")
    if types.is_float16(kind):
        return cells.cast("float32")
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return cells
    if types.is_null(kind) or types.is_string(kind):
        return cells
    texts = [None if cell is None else str(cell) for cell in cells.to_pylist()]
    return pyarrow.chunked_array([texts], type=pyarrow.large_string())
