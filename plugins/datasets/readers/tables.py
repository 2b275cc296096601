"""Tables in files, CSV and Parquet: columns of cells, a column as numbers or texts, and as inputs of a model.

A table is a dict of Arrow's columns, as they are in the file: of a CSV, texts. `as_column` makes a column of them.
"""

import csv
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from framework import DataError, SettingError, paths

from .arrays import Texts, mean_and_std
from .data_files import one_line, open_data, parse_number, read_bytes, readable

LARGEST = 3.4e38  # what a float32 can hold
BOM = b"\xef\xbb\xbf"  # spreadsheets write it at the beginning of a CSV in UTF-8
MISSING = {
    "",
    "?",
    "na",
    "n/a",
    "nan",
    "null",
    "none",
}  # what an empty cell may say, in small letters or capitals
SIGNED_NAN = {
    "-nan",
    "+nan",
}  # what C prints for a number that is NaN; as a text it is no empty cell
BLOCK_BYTES = 2**20  # of a CSV that Arrow parses at once; grows with the longest row
BLOCK_BYTES_PER_COLUMN = (
    2**12
)  # so that a block has hundreds of rows also in a table of thousands of columns
LARGEST_BLOCK = 2**31 - 1  # of Arrow

Cells = Any
"""A column of a file: a pyarrow.ChunkedArray."""
Table = dict[str, Cells]


Column = Tensor | Texts
"""Numbers as float64, NaN where a cell is empty; or texts."""


def read_table(path: Path, delimiter: str | None = None) -> Table:
    """Return the columns of a CSV or Parquet file. Raises DataError when it is missing, malformed or has no rows."""
    path = path.expanduser()
    if path.is_dir():
        raise DataError(f"{path} is a folder; a table is one file, .csv or .parquet")
    table = read_parquet(path) if path.suffix in (".parquet", ".pq") else read_csv(path, delimiter)
    if not table or not rows_of(table):
        raise DataError(f"{path} has no rows")
    return table


def rows_of(table: Table) -> int:
    return len(next(iter(table.values())))


def read_csv(path: Path, delimiter: str | None = None) -> Table:
    """Return the columns of a CSV, texts, and null where a cell says that it is empty (see MISSING)."""
    content = read_bytes(path)
    with readable(path):
        start = len(BOM) if content.startswith(BOM) else 0
        end = start + len(
            lines_of(content[start : start + 2**16]).readline()
        )  # so far only to count delimiters
        first = content[start:end].decode("utf-8", errors="replace")
        delimiter = delimiter or max(",;\t|", key=first.count)
        check_delimiter(delimiter)
        header, start = read_header(content, start, delimiter, path)
    check_header(header, path)
    if re.compile(rb"[^\r\n]").search(content, start) is None:
        return {}
    return parse_rows(content, start, header, delimiter, path)


def check_delimiter(delimiter: str) -> None:
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n\0':
        raise SettingError(f"delimiter={delimiter!r}: expected one ASCII character, such as , or ;")


def lines_of(content: bytes) -> io.TextIOWrapper:
    """Return the lines of bytes, which end with \\n, \\r or both; invalid UTF-8 is kept as surrogates."""
    return io.TextIOWrapper(
        io.BytesIO(content), encoding="utf-8", errors="surrogateescape", newline=""
    )


def records(lines: Iterator[str], delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the cells of each row. Raises DataError if the text is no well-formed CSV."""
    limit = csv.field_size_limit(LARGEST_BLOCK)
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        # csv.Error has neither a code nor subclasses.
        open_quote = str(error) == "unexpected end of data"
        said = 'a quote (") is not closed' if open_quote else error
        raise DataError(f"{path} is no well-formed CSV: {said}") from error
    finally:
        csv.field_size_limit(limit)


def read_header(content: bytes, start: int, delimiter: str, path: Path) -> tuple[list[str], int]:
    """Return the names in the first row, and where the second one begins."""
    used = start

    def counted() -> Iterator[str]:
        nonlocal used
        for line in lines_of(content[start:]):
            used += len(line.encode("utf-8", errors="surrogateescape"))
            yield line

    for _, header in records(counted(), delimiter, path):
        content[:used].decode("utf-8")  # raises UnicodeDecodeError
        return [label.strip() for label in header], used
    return [], used


def parse_rows(
    content: bytes, start: int, header: Sequence[str], delimiter: str, path: Path
) -> Table:
    import pyarrow
    from pyarrow import csv as arrow_csv

    quoted = content.find(b'"', start) >= 0
    if quoted and is_suspicious(content, start, delimiter):
        check_rows(content, len(header), delimiter, path)
    names = [str(number) for number in range(len(header))]
    parsing = arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=quoted)
    converting = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(names, pyarrow.string()),
        null_values=MISSING_CELLS,
        strings_can_be_null=True,
    )
    rows = pyarrow.py_buffer(content).slice(start)
    block = min(LARGEST_BLOCK, max(BLOCK_BYTES, BLOCK_BYTES_PER_COLUMN * len(header)))
    while True:
        reading = arrow_csv.ReadOptions(column_names=names, block_size=block)
        try:
            table = arrow_csv.read_csv(pyarrow.BufferReader(rows), reading, parsing, converting)
            return dict(zip(header, table.columns, strict=True))
        except pyarrow.ArrowInvalid as error:
            # A row longer than a block; ArrowInvalid stands for all that is wrong with a file.
            if "straddl" in str(error) and block < min(len(content), LARGEST_BLOCK):
                block = min(LARGEST_BLOCK, 16 * block)
                continue
            check_rows(content, len(header), delimiter, path)
            raise DataError(f"{path} is no well-formed CSV: {one_line(error)}") from error


def is_suspicious(content: bytes, start: int, delimiter: str) -> bool:
    """Whether quotes may not be closed, or be closed within a cell, which Arrow reads all the same."""
    if content.count(b'"', start) % 2:
        return True
    edge = re.escape(delimiter.encode() + b'\r\n"')
    closed_within = re.compile(rb'"(?<=[^%b]")[^%b]' % (edge, edge))
    return closed_within.search(content, start) is not None


def check_rows(content: bytes, width: int, delimiter: str, path: Path) -> None:
    """Raise DataError for the first thing in a CSV that is wrong: its encoding, its quotes, or the cells of a row."""
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is no UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    for line, row in records(lines_of(content.removeprefix(BOM)), delimiter, path):
        if row and len(row) != width:
            raise DataError(f"{path}, line {line}: {len(row)} cells, but {width} columns")


def check_header(header: Sequence[str], path: Path) -> None:
    if not any(header):
        raise DataError(f"{path} is empty; its first line must name the columns")
    seen = set()
    for label in header:
        if label in seen:
            raise DataError(f"{path}: two columns are called {label!r}; rename one")
        seen.add(label)
    if "" in header:
        place = header.index("") + 1
        raise DataError(
            f"{path}: column {place} has no name (row numbers?); name it in the first line, or take it out"
        )
    if all(as_number(label) is not None for label in header):
        raise DataError(
            f"{path}: the first line must name the columns, but it holds numbers: {', '.join(header[:5])}"
        )


def read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    with open_data(path) as file, readable(path):
        try:
            table = pyarrow.parquet.read_table(file)
        except pyarrow.ArrowException as error:
            raise DataError(f"{path} is no readable Parquet file: {one_line(error)}") from error
        return {
            label: plain_cells(cells)
            for label, cells in zip(table.column_names, table.columns, strict=True)
        }


def plain_cells(cells: Cells) -> Cells:
    """Return a column of truth values, numbers or texts as it is, decimals as float64, others as texts."""
    import pyarrow
    from pyarrow import types

    kind = cells.type.value_type if types.is_dictionary(cells.type) else cells.type
    if cells.type != kind:
        cells = cells.cast(kind)
    if types.is_decimal(kind):
        return cells.cast("float64")
    if types.is_float16(kind):
        return cells.cast("float32")
    plain = (types.is_integer, types.is_floating, types.is_boolean, types.is_null, types.is_string)
    if any(is_kind(kind) for is_kind in plain):
        return cells
    texts = [
        None if cell is None else str(cell) for cell in cells.to_pylist()
    ]  # dates and lists, most often too many
    return pyarrow.chunked_array([texts], type=pyarrow.large_string())


def as_column(
    cells: Cells, label: str, path: Path, text: bool | None = None, way_out: str = ""
) -> Column:
    """Return a column as numbers (NaN where it is empty) or as texts.

    text: which of them; None infers it: numbers when all are, texts when fewer than half are, else an error naming
    the first cell that is no number, with the `way_out`.
    """
    if text:
        return as_texts(cells)
    values, wrong = as_numbers(cells)
    if wrong is None:
        check_distinct(cells, values, label, path)
        return values
    if text is None and int(wrong.sum()) > len(values) / 2:
        return as_texts(cells)
    row = int(wrong.nonzero()[0, 0])
    raise DataError(
        f"{path}, row {row + 1}, column {label!r}: {cells[row].as_py()!r} is no number; correct it{way_out}"
    )


def as_numbers(cells: Cells) -> tuple[Tensor, Tensor | None]:
    """Return the cells as float64, NaN where one is empty, and which of them are no numbers, or beyond float32.

    None stands for a column without such cells.
    """
    values = to_float64(cells) if not is_text_type(cells.type) else text_numbers(cells)
    if values is not None:
        wrong = None if largest(values) <= LARGEST else values.abs() > LARGEST
        return values, wrong
    codes, known = encoded(cells)
    numbers = [as_number(cell) for cell in known]
    wrong = torch.tensor([*(number is None for number in numbers), False])[codes]
    values = torch.tensor([*(number or 0.0 for number in numbers), math.nan], dtype=torch.float64)[
        codes
    ]
    return values, wrong if wrong.any() else None


def text_numbers(cells: Cells) -> Tensor | None:
    """Return texts as float64; None if one is no number in Arrow's eyes, which may still be one, or empty."""
    import pyarrow
    import pyarrow.compute

    for trim in (False, True):
        trimmed = pyarrow.compute.utf8_trim_whitespace(cells) if trim else cells
        try:
            values = to_float64(trimmed)
        except pyarrow.ArrowInvalid:
            continue
        strange = (
            values.isnan().any() and int(values.isnan().sum()) != cells.null_count
        )  # such as "nan(x)"
        return None if strange else values
    return None


def largest(values: Tensor) -> float:
    """Return the largest magnitude of some numbers, NaN left out."""
    low, high = values.aminmax()
    if low.isnan():
        low, high = values.nan_to_num(0.0, math.inf, -math.inf).aminmax()
    return max(-low.item(), high.item())


def to_float64(cells: Cells) -> Tensor:
    import numpy
    import pyarrow

    if pyarrow.types.is_boolean(cells.type):
        cells = cells.cast("uint8")
    numbers = numpy.empty(len(cells), numpy.float64)
    start = 0
    for chunk in cells.chunks:
        read = chunk.cast("float64", safe=is_text_type(cells.type))
        numbers[start : start + len(chunk)] = read.to_numpy(zero_copy_only=False)
        start += len(chunk)
    return torch.from_numpy(numbers)


def is_text_type(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind)


def encoded(cells: Cells) -> tuple[Tensor, list[Any]]:
    """Return the different cells, and for each row the place of its own among them, -1 if it is null."""
    import numpy

    if is_text_type(cells.type) and cells.nbytes > LARGEST_BLOCK:
        cells = cells.cast("large_string")
    whole = cells.dictionary_encode().unify_dictionaries()
    codes = numpy.concatenate([chunk.indices.fill_null(-1).to_numpy() for chunk in whole.chunks])
    known = whole.chunk(0).dictionary.to_pylist()
    return torch.from_numpy(codes.astype(numpy.int64)), known


def as_texts(cells: Cells) -> Texts:
    codes, raw = encoded(cells)
    places: dict[str, int] = {}
    renumbered = []
    for cell in raw:
        text = as_text(cell)
        renumbered.append(-1 if text is None else places.setdefault(text, len(places)))
    renumbered.append(-1)  # of the code -1
    return Texts(torch.tensor(renumbered)[codes], list(places))


def check_distinct(cells: Cells, values: Tensor, label: str, path: Path) -> None:
    """Raise DataError for different integers that are the same float64.

    values: what the cells were read as.
    """
    import pyarrow

    if pyarrow.types.is_floating(cells.type) or largest(values) < 2**53:
        return
    large = (values.abs() >= 2**53).numpy()
    read: dict[float, int] = {}
    for cell in cells.filter(pyarrow.array(large)).unique().to_pylist():
        try:
            integer = int(str(cell))
        except ValueError:  # such as 1e20
            continue
        number = float(integer)
        if read.setdefault(number, integer) != integer:
            raise DataError(
                f"{path}, column {label!r}: float64 does not tell {read[number]} and {integer} "
                f"apart; subtract an offset, or leave the column out: {paths.override('ignore', [label])}"
            )


def as_number(cell: str | float | None) -> float | None:
    """Return a cell as a number, NaN when it is empty, None when it is no number, or beyond those of float32."""
    if cell is None:
        return math.nan
    if isinstance(cell, str):
        if cell.strip().lower() in MISSING | SIGNED_NAN:
            return math.nan
        number = parse_number(cell)
    else:
        number = float(cell)
    return None if number is None or abs(number) > LARGEST else number


def as_text(cell: Any) -> str | None:
    if isinstance(cell, float):
        return None if math.isnan(cell) else f"{cell:.0f}" if cell.is_integer() else repr(cell)
    text = str(cell).strip()
    return None if cell is None or text.lower() in MISSING else text


def spellings(word: str) -> Iterator[str]:
    """Yield a word with each of its letters small or a capital."""
    choices = [sorted({letter.lower(), letter.upper()}) for letter in word]
    for letters in itertools.product(*choices):
        yield "".join(letters)


MISSING_CELLS = [spelling for word in sorted(MISSING) for spelling in spellings(word)]


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


def learn_column(label: str, column: Column, encoding: Encoding, name: str) -> dict[str, Any]:
    """Return how a column becomes inputs, from its cells in the training split, in plain JSON types.

    Of numbers {"name", "fill", "mean", "std"} and "knots" for quantiles; of texts {"name", "texts"} and "index".
    "missing" says that empty cells have an input, or a category, of their own.
    """
    if isinstance(column, Texts):
        learnt = learn_texts(label, column, encoding, name)
        empty = column.codes < 0
    else:
        learnt = learn_numbers(label, column, encoding, name)
        empty = column.isnan()
    return learnt | ({"missing": True} if encoding.mark_missing and empty.any() else {})


def learn_texts(label: str, column: Texts, encoding: Encoding, name: str) -> dict[str, Any]:
    texts = sorted(column.known[code] for code in column.codes.unique().tolist() if code >= 0)
    if not texts:
        raise nothing_in(label, name)
    if len(texts) > encoding.most_texts:
        raise DataError(
            f"{name}: column {label!r} has {len(texts)} different texts; leave it out "
            f"({paths.override('ignore', [label])}) or raise max_categories, now {encoding.most_texts}"
        )
    return {"name": label, "texts": texts} | (
        {"index": True} if encoding.categories == "index" else {}
    )


def learn_numbers(label: str, values: Tensor, encoding: Encoding, name: str) -> dict[str, Any]:
    empty = values.isnan()
    known = values[~empty] if empty.any() else values
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
    advice = paths.override("ignore", [label])
    return DataError(
        f"{name}: column {label!r} is empty in the training split; leave it out: {advice}"
    )


def encode(table: Mapping[str, Column], columns: Sequence[dict[str, Any]]) -> Tensor:
    """Return inputs (rows, features) as float32, contiguous."""
    return torch.cat([encode_column(table[column["name"]], column) for column in columns], dim=1)


def encode_column(cells: Column, column: dict[str, Any]) -> Tensor:
    return (
        encode_texts(cells, column) if isinstance(cells, Texts) else encode_numbers(cells, column)
    )


def encode_texts(cells: Texts, column: dict[str, Any]) -> Tensor:
    """Return an input for each text, or the one index; 0 is what training never saw."""
    places = {text: place for place, text in enumerate(column["texts"], 1)}
    empty = len(places) + 1 if column.get("missing") else 0
    index = torch.tensor([*(places.get(text, 0) for text in cells.known), empty])[cells.codes][
        :, None
    ]
    if column.get("index"):
        return index.float()
    return (index == torch.arange(1, len(places) + bool(column.get("missing")) + 1)).float()


def encode_numbers(values: Tensor, column: dict[str, Any]) -> Tensor:
    """Return the number, and where the training has empty cells, 1 in a second input for those."""
    empty = values.isnan()
    values = values.nan_to_num(column["fill"])
    scaled = (
        normal_scores(values, column["knots"])
        if "knots" in column
        else (values - column["mean"]) / column["std"]
    )
    if not column.get("missing"):
        return scaled.float()[:, None]
    return torch.stack([scaled.float(), empty.float()], dim=1)


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
