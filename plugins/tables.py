"""Tables in files, CSV and Parquet, as named columns of cells; a column as numbers or as texts."""

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from framework.errors import DataError

MISSING = {"", "?", "na", "n/a", "nan", "null", "none"}  # what an empty cell may say, in small letters or capitals

Cell = str | float | None
Table = dict[str, list[Cell]]


def read_table(path: Path, delimiter: str | None = None) -> Table:
    """Return the columns of a CSV or Parquet file. Raises DataError when it is missing, malformed or has no rows."""
    path = path.expanduser()
    if not path.is_file():
        raise DataError(f"{path}: there is no such file (looked from {Path.cwd()})")
    table = read_parquet(path) if path.suffix in (".parquet", ".pq") else read_csv(path, delimiter)
    if not table or not next(iter(table.values())):
        raise DataError(f"{path} has no rows")
    return table


def read_csv(path: Path, delimiter: str | None = None) -> Table:
    with (
        readable(path),
        (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as lines,
    ):
        first = lines.readline()
        lines.seek(0)
        reader = csv.reader(lines, delimiter=delimiter or max(",;\t|", key=first.count), strict=True)
        header = [label.strip() for label in next(reader, [])]
        check_header(header, path)
        rows = list(full_rows(reader, len(header), path))
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading into a DataError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} is no well-formed CSV: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def full_rows(reader: Any, width: int, path: Path) -> Iterator[list[str]]:
    for row in reader:
        if len(row) == width:
            yield row
        elif row:
            raise DataError(f"{path}, line {reader.line_num}: {len(row)} cells, but {width} columns")


def check_header(header: Sequence[str], path: Path) -> None:
    twice = next((label for label in header if header.count(label) > 1), None)
    if not any(header):
        raise DataError(f"{path} is empty; its first line must name the columns")
    if twice is not None:
        raise DataError(f"{path}: two columns are called {twice!r}; rename one")
    if all(as_number(label) is not None for label in header):
        raise DataError(f"{path}: the first line must name the columns, but it holds numbers: {', '.join(header[:5])}")


def read_parquet(path: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("Parquet files need pyarrow: pip install 'framework[tables]'") from error
    with readable(path):
        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is no readable Parquet file: {error}") from error
    return {label: plain_cells(table.column(label)) for label in table.column_names}


def plain_cells(column: Any) -> list[Cell]:
    from pyarrow import types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_decimal(kind):
        return column.cast("float64").to_pylist()
    plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_null, types.is_string)
    cells = column.to_pylist()
    if any(is_kind(kind) for is_kind in plain):
        return cells
    return [None if cell is None else str(cell) for cell in cells]  # dates and lists: texts, most often too many


def as_column(cells: Sequence[Cell], label: str, path: Path, text: bool | None = None, way_out: str = "") -> list[Cell]:
    """Return a column as numbers (NaN where it is empty) or as texts (None where it is empty).

    text: which of them; None infers it: numbers when all are, texts when fewer than half are, else an error naming
    the first cell that is no number, with the `way_out`.
    """
    if text:
        return each(as_text, cells)
    numbers = each(as_number, cells)
    if None not in numbers:
        return numbers
    if text is None and numbers.count(None) > len(numbers) / 2:
        return each(as_text, cells)
    row = numbers.index(None)
    raise DataError(f"{path}, row {row + 1}, column {label!r}: {cells[row]!r} is no number; correct it{way_out}")


def each(read: Callable[[Cell], Cell], cells: Sequence[Cell]) -> list[Cell]:
    """Return every cell read, the same ones once: a column of texts has few."""
    known = {cell: read(cell) for cell in set(cells)}
    return [known[cell] for cell in cells]


def as_number(cell: Cell) -> float | None:
    """Return a cell as a number, NaN when it is empty, None when it is no finite number."""
    if cell is None:
        return math.nan
    try:
        number = float(cell)
    except ValueError:
        return math.nan if str(cell).strip().lower() in MISSING else None
    return None if math.isinf(number) else number


def as_text(cell: Cell) -> str | None:
    if isinstance(cell, float):
        return None if math.isnan(cell) else f"{cell:.0f}" if cell.is_integer() else repr(cell)
    text = str(cell).strip()
    return None if cell is None or text.lower() in MISSING else text
