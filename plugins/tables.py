"""Tables in files, CSV and Parquet: columns of cells, a column as numbers or texts, and as inputs of a model."""

import csv
import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from framework.errors import DataError
from framework.paths import override
from framework_plugins.arrays import mean_and_std

LARGEST = 3.4e38  # what a float32 can hold
MISSING = {"", "?", "na", "n/a", "nan", "null", "none"}  # what an empty cell may say, in small letters or capitals

Cell = str | float | None
Table = dict[str, list[Cell]]


def read_table(path: Path, delimiter: str | None = None) -> Table:
    """Return the columns of a CSV or Parquet file. Raises DataError when it is missing, malformed or has no rows."""
    path = path.expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a folder; a table is one file, .csv or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file (looked from {Path.cwd()})")
    table = read_parquet(path) if path.suffix in (".parquet", ".pq") else read_csv(path, delimiter)
    if not table or not next(iter(table.values())):
        raise DataError(f"{path} has no rows")
    return table


def read_csv(path: Path, delimiter: str | None = None) -> Table:
    with readable(path), open_text(path) as lines:
        first = lines.readline()
        lines.seek(0)
        reader = csv.reader(lines, delimiter=delimiter or max(",;\t|", key=first.count), strict=True)
        header = [label.strip() for label in next(reader, [])]
        check_header(header, path)
        rows = list(full_rows(reader, len(header), path))
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}


def open_text(path: Path) -> Any:
    """Open a file, or what is packed in a .gz or in a .zip of one file, as lines of UTF-8."""
    if path.suffix != ".zip":
        return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="")
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.startswith("__MACOSX")]
    if len(names) != 1:
        raise DataError(f"{path} holds {len(names)} files; unpack it and name one of them")
    # In memory: a reader goes back to the start, which in a zip means to unpack all of it again.
    return io.TextIOWrapper(io.BytesIO(archive.read(names[0])), encoding="utf-8-sig", newline="")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading into a DataError that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} is no well-formed CSV: {error}") from error
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
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
    if "" in header:
        place = header.index("") + 1
        raise DataError(f"{path}: column {place} has no name (row numbers?); name it in the first line, or take it out")
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
    known = {cell: as_number(cell) for cell in set(cells)}
    numbers: list[Cell] = [known[cell] for cell in cells]
    if None not in known.values():
        check_distinct(known, label, path)
        return numbers
    if text is None and numbers.count(None) > len(numbers) / 2:
        return each(as_text, cells)
    row = numbers.index(None)
    raise DataError(f"{path}, row {row + 1}, column {label!r}: {cells[row]!r} is no number; correct it{way_out}")


def check_distinct(known: Mapping[Cell, float | None], label: str, path: Path) -> None:
    """Raise DataError for different integers that are the same float64.

    known: what cells were read as.
    """
    read: dict[float, int] = {}
    for cell, number in known.items():
        if number is None or not abs(number) > 2**53 or isinstance(cell, float):
            continue
        try:
            integer = int(str(cell))
        except ValueError:  # such as 1e20
            continue
        if read.setdefault(number, integer) != integer:
            raise DataError(
                f"{path}, column {label!r}: float64 does not tell {read[number]} and {integer} "
                f"apart; subtract an offset, or leave the column out: {override('ignore', [label])}"
            )


def each(read: Callable[[Cell], Cell], cells: Sequence[Cell]) -> list[Cell]:
    """Return every cell read, the same ones once: a column of texts has few."""
    known = {cell: read(cell) for cell in set(cells)}
    return [known[cell] for cell in cells]


def as_number(cell: Cell) -> float | None:
    """Return a cell as a number, NaN when it is empty, None when it is no number, or beyond those of float32."""
    if cell is None:
        return math.nan
    try:
        number = float(cell)
    except ValueError:
        return math.nan if str(cell).strip().lower() in MISSING else None
    return None if abs(number) > LARGEST else number


def as_text(cell: Cell) -> str | None:
    if isinstance(cell, float):
        return None if math.isnan(cell) else f"{cell:.0f}" if cell.is_integer() else repr(cell)
    text = str(cell).strip()
    return None if cell is None or text.lower() in MISSING else text


Categories = Literal["one_hot", "index"]
KNOTS = 256  # quantiles that are kept of a column
NEVER = 1e-7  # the share of values that lie beyond the smallest and the largest one, so that no score is infinite


class Encoding(NamedTuple):
    """How columns become inputs (the settings of `data=table` say more)."""

    normalize: bool = True
    quantile: bool = False
    categories: Categories = "one_hot"
    mark_missing: bool = True
    most_texts: int = 100


def learn_column(label: str, cells: Sequence[Cell], encoding: Encoding, name: str) -> dict[str, Any]:
    """Return how a column becomes inputs, from its cells in the training split, in plain JSON types.

    Of numbers {"name", "fill", "mean", "std"} and "knots" for quantiles; of texts {"name", "texts"} and "index".
    "missing" says that empty cells have an input, or a category, of their own.
    """
    learnt = (
        learn_texts(label, cells, encoding, name) if is_text(cells) else learn_numbers(label, cells, encoding, name)
    )
    empty = any(cell is None or cell != cell for cell in cells)
    return learnt | ({"missing": True} if empty and encoding.mark_missing else {})


def learn_texts(label: str, cells: Sequence[Cell], encoding: Encoding, name: str) -> dict[str, Any]:
    texts = sorted({str(cell) for cell in cells if cell is not None})
    if not texts:
        raise nothing_in(label, name)
    if len(texts) > encoding.most_texts:
        raise DataError(
            f"{name}: column {label!r} has {len(texts)} different texts; leave it out "
            f"({override('ignore', [label])}) or raise max_categories, now {encoding.most_texts}"
        )
    return {"name": label, "texts": texts} | ({"index": True} if encoding.categories == "index" else {})


def learn_numbers(label: str, cells: Sequence[Cell], encoding: Encoding, name: str) -> dict[str, Any]:
    values = torch.tensor(cells, dtype=torch.float64)
    known = values[~values.isnan()]
    if not len(known):
        raise nothing_in(label, name)
    mean, std = (moment.item() for moment in mean_and_std(known, [0]))
    if encoding.quantile:
        knots = quantiles(known, min(KNOTS, len(known))).tolist()
        return {"name": label, "fill": mean, "knots": knots}
    kept = encoding.normalize
    return {"name": label, "fill": mean, "mean": mean if kept else 0.0, "std": std if kept else 1.0}


def quantiles(values: Tensor, count: int) -> Tensor:
    """Return `count` quantiles at even shares from 0 to 1, linear between values (torch's own stop at 2^24 values)."""
    place = torch.linspace(0, len(values) - 1, count, dtype=torch.float64)
    ordered, below = values.sort().values, place.long()
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)


def nothing_in(label: str, name: str) -> DataError:
    advice = override("ignore", [label])
    return DataError(f"{name}: column {label!r} is empty in the training split; leave it out: {advice}")


def encode(table: Mapping[str, Sequence[Cell]], columns: Sequence[dict[str, Any]]) -> Tensor:
    """Return inputs (rows, features) as float32, contiguous."""
    return torch.cat([encode_column(table[column["name"]], column) for column in columns], dim=1)


def encode_column(cells: Sequence[Cell], column: dict[str, Any]) -> Tensor:
    return encode_texts(cells, column) if "texts" in column else encode_numbers(cells, column)


def encode_texts(cells: Sequence[Cell], column: dict[str, Any]) -> Tensor:
    """Return an input for each text, or the one index; 0 is what training never saw."""
    known = [*column["texts"], *([None] if column.get("missing") else [])]
    places = {text: place for place, text in enumerate(known, 1)}
    index = torch.tensor([places.get(cell, 0) for cell in cells])[:, None]
    return index.float() if column.get("index") else (index == torch.arange(1, len(known) + 1)).float()


def encode_numbers(cells: Sequence[Cell], column: dict[str, Any]) -> Tensor:
    """Return the number, and where the training has empty cells, 1 in a second input for those."""
    values = torch.tensor(cells, dtype=torch.float64)
    empty = values.isnan()
    values = values.nan_to_num(column["fill"])
    scaled = normal_scores(values, column["knots"]) if "knots" in column else (values - column["mean"]) / column["std"]
    return torch.stack([scaled, empty.double()] if column.get("missing") else [scaled], dim=1).float()


def normal_scores(values: Tensor, knots: Sequence[float]) -> Tensor:
    """Return the normal score of each value: Φ⁻¹ of the share of the training values below it.

    Linear between the quantiles `knots`; a value that many have in common is in the middle of its shares, as in
    scikit-learn's QuantileTransformer.
    """
    import numpy

    at = numpy.asarray(knots)
    shares = numpy.linspace(0, 1, len(at))
    first = numpy.interp(values.numpy(), at, shares)
    last = -numpy.interp(-values.numpy(), -at[::-1], -shares[::-1])
    return torch.special.ndtri(torch.from_numpy((first + last) / 2).clamp(NEVER, 1 - NEVER))


def widths(columns: Sequence[dict[str, Any]]) -> list[int]:
    """Return of each input 0 for a number, or how many categories its index tells apart; see `Data.columns`."""
    found = []
    for column in columns:
        missing = bool(column.get("missing"))
        if "texts" not in column:
            found += [0] * (1 + missing)
        elif column.get("index"):
            found.append(1 + len(column["texts"]) + missing)
        else:
            found += [0] * (len(column["texts"]) + missing)
    return found


def is_text(cells: Sequence[Cell]) -> bool:
    return cells[0] is None or isinstance(cells[0], str)  # the first speaks for all, after `as_column`
