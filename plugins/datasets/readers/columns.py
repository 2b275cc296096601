"""Convert Arrow columns to tensors of numbers or to texts."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework import DataError, paths

from .data_files import parse_number

MAX_FLOAT32 = 3.4e38
MISSING = {"", "?", "na", "n/a", "nan", "null", "none"}  # texts of an empty cell, in any case
SIGNED_NAN = {"-nan", "+nan"}  # NaN as C prints it: an empty cell of numbers, but not of texts
MAX_STRING_BYTES = 2**31 - 1  # of Arrow's type string; large_string has no limit


@dataclass(frozen=True)
class Texts:
    """A column of texts: cell i is `known[codes[i]]`; the code -1 is an empty cell."""

    codes: Tensor
    known: list[str]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Tensor) -> "Texts":
        return Texts(self.codes[rows], self.known)


Column = Tensor | Texts
"""Numbers as float64, NaN for an empty cell; or texts."""


def as_column(
    cells: Any,
    label: str,
    path: Path,
    text: bool | None = None,
    advice: str = "",
    skipped: int = 0,
) -> Column:
    """Return an Arrow column as numbers or as texts.

    Args:
        cells: the column, a pyarrow.ChunkedArray.
        label: its name, for errors.
        path: its file, for errors.
        text: True for texts, False for numbers; None infers it: texts if more than half of the
            cells are not numbers.
        advice: what to do about a cell that is not a number, added to the error.
        skipped: rows of the file before these cells, for errors.

    Raises:
        DataError: a cell of a column of numbers is not a number.
    """
    if text:
        return as_texts(cells)
    values, invalid = as_numbers(cells)
    if invalid is None:
        check_distinct(cells, values, label, path)
        return values
    if text is None and int(invalid.sum()) > len(values) / 2:
        return as_texts(cells)
    row = int(invalid.nonzero()[0, 0])
    raise DataError(
        f"{path}, row {skipped + row + 1}, column {label!r}: {cells[row].as_py()!r} is not a "
        f"number; correct it{advice}"
    )


def as_numbers(cells: Any) -> tuple[Tensor, Tensor | None]:
    """Return the cells as float64, and a mask of the cells that are not numbers.

    An empty cell is NaN. A number beyond the range of float32 counts as no number. The mask is None
    if all cells are numbers.
    """
    import pyarrow.compute

    if is_text_type(cells.type):
        values = parse_texts(cells)
        if values is None:  # perhaps because of blanks around a number
            values = parse_texts(pyarrow.compute.utf8_trim_whitespace(cells))
    else:
        values = to_float64(cells)
    if values is not None:
        if max_magnitude(values) <= MAX_FLOAT32:
            return values, None
        return values, values.abs() > MAX_FLOAT32
    codes, distinct = dictionary_encoded(cells)
    numbers = []
    is_invalid = []
    for cell in distinct:
        number = as_number(cell)
        numbers.append(number or 0.0)
        is_invalid.append(number is None)
    numbers.append(math.nan)  # of the code -1
    is_invalid.append(False)
    invalid = torch.tensor(is_invalid)[codes]
    return torch.tensor(numbers, dtype=torch.float64)[codes], invalid if invalid.any() else None


def as_texts(cells: Any) -> Texts:
    """Return the cells as texts without blanks around them."""
    codes, distinct = dictionary_encoded(cells)
    known: dict[str, int] = {}
    renumbered = []
    for cell in distinct:
        text = as_text(cell)
        renumbered.append(-1 if text is None else known.setdefault(text, len(known)))
    renumbered.append(-1)  # of the code -1
    return Texts(torch.tensor(renumbered)[codes], list(known))


def as_number(cell: str | float | None) -> float | None:
    """Return a cell as a number: NaN if it is empty, None if it is no number that float32 holds."""
    if cell is None:
        return math.nan
    if isinstance(cell, str):
        if cell.strip().lower() in MISSING | SIGNED_NAN:
            return math.nan
        number = parse_number(cell)
    else:
        number = float(cell)
    if number is None or abs(number) > MAX_FLOAT32:
        return None
    return number


def as_text(cell: Any) -> str | None:
    """Return a cell as a text, None if it is empty."""
    if cell is None:
        return None
    if isinstance(cell, float):
        if math.isnan(cell):
            return None
        return f"{cell:.0f}" if cell.is_integer() else repr(cell)
    text = str(cell).strip()
    return None if text.lower() in MISSING else text


def parse_texts(cells: Any) -> Tensor | None:
    """Return texts as float64; None if Arrow does not parse all of them as we do."""
    import pyarrow

    try:
        values = to_float64(cells)
    except pyarrow.ArrowInvalid:
        return None
    # Arrow also parses texts such as "nan(x)".
    if values.isnan().any() and int(values.isnan().sum()) != cells.null_count:
        return None
    return values


def to_float64(cells: Any) -> Tensor:
    """Return booleans, numbers or texts as float64.

    Raises:
        ArrowInvalid: a text is not a number.
    """
    import numpy
    import pyarrow

    if pyarrow.types.is_boolean(cells.type):
        cells = cells.cast("uint8")
    numbers = numpy.empty(len(cells), numpy.float64)
    start = 0
    for chunk in cells.chunks:
        converted = chunk.cast("float64", safe=is_text_type(cells.type))
        numbers[start : start + len(chunk)] = converted.to_numpy(zero_copy_only=False)
        start += len(chunk)
    return torch.from_numpy(numbers)


def max_magnitude(values: Tensor) -> float:
    """Return the largest absolute value, NaN left out."""
    low, high = values.aminmax()
    if low.isnan():
        low, high = values.nan_to_num(0.0, math.inf, -math.inf).aminmax()
    return max(-low.item(), high.item())


def is_text_type(kind: Any) -> bool:
    """Return whether an Arrow type is string or large_string."""
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind))


def dictionary_encoded(cells: Any) -> tuple[Tensor, list[Any]]:
    """Return the index of each cell among the distinct cells, -1 for null, and these cells."""
    import numpy

    if is_text_type(cells.type) and cells.nbytes > MAX_STRING_BYTES:
        cells = cells.cast("large_string")
    encoded = cells.dictionary_encode().unify_dictionaries()
    codes = numpy.concatenate([chunk.indices.fill_null(-1).to_numpy() for chunk in encoded.chunks])
    distinct = encoded.chunk(0).dictionary.to_pylist()
    return torch.from_numpy(codes.astype(numpy.int64)), distinct


def check_distinct(cells: Any, values: Tensor, label: str, path: Path) -> None:
    """Raise DataError for different integers in `cells` that are the same float64 in `values`."""
    import pyarrow

    if pyarrow.types.is_floating(cells.type) or max_magnitude(values) < 2**53:
        return
    is_large = pyarrow.array((values.abs() >= 2**53).numpy())
    integers: dict[float, int] = {}
    for cell in cells.filter(is_large).unique().to_pylist():
        try:
            integer = int(str(cell))
        except ValueError:  # such as 1e20
            continue
        first = integers.setdefault(float(integer), integer)
        if first != integer:
            raise DataError(
                f"{path}, column {label!r}: float64 cannot distinguish {first} and {integer}; "
                f"subtract an offset, or leave the column out: {paths.override('ignore', [label])}"
            )
