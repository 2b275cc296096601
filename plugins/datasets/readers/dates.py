"""Dates in a table, as columns of numbers: the parts of a date, and the elapsed time.

The parts are those of fastai's `add_datepart`.
"""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework import DataError

DATE_PARTS = (
    "year",
    "month",
    "week",
    "day",
    "weekday",
    "day_of_year",
    "is_month_start",
    "is_month_end",
    "is_quarter_start",
    "is_quarter_end",
    "is_year_start",
    "is_year_end",
    "elapsed",
)
TIME_PARTS = ("hour", "minute", "second")
MICROSECONDS_PER_DAY = 86_400_000_000
FEW = 20


def part_label(label: str, part: str) -> str:
    """Return the name of a part of a column of dates: "sold:month"."""
    return f"{label}:{part}"


def date_columns(cells: Any, label: str, path: Path) -> dict[str, Tensor]:
    """Return the parts of a column of dates by their names, and those of the time if there is one.

    Args:
        cells: dates in ISO 8601 form, such as 2024-01-31 or 2024-01-31 10:00:00; a
            pyarrow.ChunkedArray.
        label: the name of the column.
        path: its file, for errors.

    Raises:
        DataError: a cell is not a date.
    """
    from pyarrow import compute

    times = as_times(cells, label, path)
    parts = list(DATE_PARTS)
    days = compute.floor_temporal(times, unit="day")
    if compute.any(compute.not_equal(times, days)).as_py():
        parts += TIME_PARTS
    return {part_label(label, part): date_part(times, part) for part in parts}


def date_part_column(cells: Any, label: str, part: str, path: Path, skipped: int = 0) -> Tensor:
    """Return a part of a column of dates, shape (rows,), float64; NaN for an empty cell.

    Args:
        cells: see `date_columns`.
        label: the name of the column, for errors.
        part: one of DATE_PARTS or TIME_PARTS.
        path: its file, for errors.
        skipped: rows of the file before these cells, for errors.

    Raises:
        DataError: a cell is not a date.
    """
    return date_part(as_times(cells, label, path, skipped), part)


def as_times(cells: Any, label: str, path: Path, skipped: int = 0) -> Any:
    """Return cells as Arrow timestamps in microseconds; times with a zone in UTC."""
    import pyarrow
    from pyarrow import compute

    texts = cells if pyarrow.types.is_string(cells.type) else cells.cast("string")
    texts = compute.utf8_trim_whitespace(texts)
    texts = compute.if_else(compute.equal(texts, ""), pyarrow.scalar(None, texts.type), texts)
    for kind in (pyarrow.timestamp("us"), pyarrow.timestamp("us", "UTC")):
        try:
            return texts.cast(kind).cast(pyarrow.timestamp("us"))
        except pyarrow.ArrowInvalid:
            continue
    for row, text in enumerate(texts.to_pylist(), 1 + skipped):
        if text is not None and not is_date(text):
            raise DataError(
                f"{path}, row {row}, column {label!r}: {text!r} is not a date such as 2024-01-31 "
                "or 2024-01-31 10:00:00"
            )
    raise DataError(
        f"{path}, column {label!r}: some dates have a time zone and others have none; write all in "
        "one form, such as 2024-01-31 10:00:00"
    )


def date_part(times: Any, part: str) -> Tensor:
    """Return a part of timestamps; "elapsed" are days since 1970, weekday 0 is Monday.

    Args:
        times: from `as_times`.
        part: one of DATE_PARTS or TIME_PARTS.
    """
    import numpy
    from pyarrow import compute

    functions = {
        "year": compute.year,
        "month": compute.month,
        "week": compute.iso_week,
        "day": compute.day,
        "weekday": compute.day_of_week,
        "day_of_year": compute.day_of_year,
        "hour": compute.hour,
        "minute": compute.minute,
        "second": compute.second,
    }
    if part in functions:
        values = functions[part](times).cast("float64").to_numpy()
        return torch.from_numpy(numpy.array(values))
    moments = times.to_numpy()
    is_empty = torch.from_numpy(numpy.isnat(moments))
    if part == "elapsed":
        microseconds = torch.from_numpy(moments.astype("datetime64[us]").astype("int64"))
        values = microseconds.double() / MICROSECONDS_PER_DAY
    else:
        values = torch.from_numpy(is_boundary(moments, part)).double()
    return values.masked_fill(is_empty, torch.nan)


def is_boundary(moments: Any, part: str) -> Any:
    """Return whether moments are on the first or last day of a month, quarter or year."""
    _, period, side = part.split("_")
    days = moments.astype("datetime64[D]")
    if side == "end":
        days = days + 1  # the day after it is the first one of the next period
    months = days.astype("datetime64[M]")
    is_first = days == months.astype("datetime64[D]")
    number = months.astype("int64") % 12  # 0: January
    if period == "quarter":
        return is_first & (number % 3 == 0)
    if period == "year":
        return is_first & (number == 0)
    return is_first


def is_date(text: str) -> bool:
    """Return whether a text is a date or a time in ISO 8601 form."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return not text.isdigit()


def look_like_dates(texts: Iterable[str]) -> bool:
    """Return whether the first texts are dates, to advise the setting `dates`."""
    first = [text for _, text in zip(range(FEW), texts, strict=False)]
    return bool(first) and all(map(is_date, first))
