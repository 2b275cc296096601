"""Long series of numbers, to forecast their next values."""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from framework import (
    Data,
    DataError,
    NonNegativeFloat,
    PositiveInt,
    Preparation,
    Rate,
    Shape,
    TensorSplit,
    datasets,
    memory,
    seeds,
)

from .preparations.sequences import Windows
from .readers.columns import as_column
from .readers.data_files import parse_number, read_text
from .readers.fetched import data_folder
from .readers.scaling import fit_scale, mean_and_std
from .readers.tables import TABLE_SUFFIXES, Table, count_rows, read_table, require_column

Calendar = Literal["day", "week", "year"]


class SeriesData(Data):
    """Windows of one long series, to forecast the next `horizon` values of its first channel.

    Inputs have shape (lookback, channels), targets (horizon,). The splits follow each other in
    time. A window belongs to the split of all its targets; the rows before them may belong to an
    earlier split, because they are known when the forecast is made. Means and deviations are those
    of the training split. The folds of a cross-validation are blocks of time (Bergmeir and Benitez
    2012, "On the use of cross-validation for time series predictor evaluation").
    """

    in_time_order = True

    input_suffixes = TABLE_SUFFIXES
    single_input_suffixes = TABLE_SUFFIXES  # a file gives one forecast

    def split(
        self,
        amounts: Tensor,
        times: list[datetime] | None,
        settings: dict[str, Any],
        val_fraction: float,
        test_fraction: float,
    ) -> None:
        """Split the rows in time, and set the attributes of Data.

        Args:
            amounts: the target and the features, shape (rows, channels), float64.
            times: the times of the rows; None without a calendar.
            settings: path, target, features, time, calendar, lookback, horizon.
            val_fraction: share of the rows for validation, before those of the test.
            test_fraction: share of the rows for the test, the last ones.
        """
        rows = len(amounts)
        val_start = round(rows * (1 - val_fraction - test_fraction))
        test_start = round(rows * (1 - test_fraction))
        lookback = settings["lookback"]
        horizon = settings["horizon"]
        if val_start < lookback + horizon:
            raise DataError(
                f"{settings['path']}: the {max(val_start, 0)} training rows of {rows} are fewer "
                f"than a window of {lookback} + {horizon} rows; lower lookback and horizon, or "
                "val_fraction and test_fraction"
            )
        train, val, test = torch.arange(rows).tensor_split([val_start, test_start])
        self.fit(amounts, times, settings, {"train": train, "val": val, "test": test})

    def fit(
        self,
        amounts: Tensor,
        times: list[datetime] | None,
        settings: dict[str, Any],
        rows: Mapping[str, Tensor],
    ) -> None:
        """Measure the training rows, and set the splits to their windows.

        A training window has also its inputs in the training rows: in a fold, training sees no
        value of the validation.

        Args:
            amounts: the target and the features, shape (rows, channels), float64.
            times: the times of the rows; None without a calendar.
            settings: see `split`.
            rows: the row numbers of each split.
        """
        self.rows = rows
        self.refit = partial(self.fit, amounts, times, settings)
        lookback = settings["lookback"]
        horizon = settings["horizon"]
        mean, std = mean_and_std(amounts[rows["train"]], [0])
        self.settings = {**settings, "mean": mean.tolist(), "std": std.tolist()}
        self.scale = fit_scale(amounts[:, :1], rows["train"], "standard", str(settings["path"]))
        channels = as_channels(amounts, times, self.settings)
        windows = len(channels) - lookback - horizon + 1
        inputs = channels.unfold(0, lookback, 1).transpose(1, 2)[:windows]  # views: no copies
        targets = channels[:, 0].contiguous().unfold(0, horizon, 1)[lookback:]
        for part, part_rows in rows.items():
            is_inside = torch.zeros(len(channels), dtype=torch.bool)
            is_inside[part_rows] = True
            is_chosen = is_inside.unfold(0, horizon, 1).all(1)[lookback:]
            if part == "train":
                is_chosen &= is_inside.unfold(0, lookback, 1).all(1)[:windows]
            chosen = as_slice(is_chosen.nonzero()[:, 0])
            split = TensorSplit(inputs[chosen], targets[chosen]) if is_chosen.any() else None
            setattr(self, part, split)
        if self.train is None:
            raise DataError(
                f"{settings['path']}: the {len(rows['train'])} training rows have no window of "
                f"{lookback} + {horizon} consecutive rows; lower lookback and horizon, or use "
                "other folds"
            )
        self.in_shape = (lookback, channels.shape[1])
        self.out_shape = (horizon,)
        self.target = "value"

    def facts(self) -> dict[str, Any]:
        """Return how rows become inputs."""
        return {**self.settings, "path": str(self.settings["path"])}

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read a CSV or Parquet file, to forecast the values after its last row."""
        facts = {**facts, "path": path}
        lookback = facts["lookback"]
        table = read_table(path, facts.get("delimiter"))
        rows = count_rows(table)
        if rows < lookback:
            raise DataError(f"{path} has {rows} rows; the model needs the last {lookback}")
        skipped = rows - lookback
        last = {label: cells[skipped:] for label, cells in table.items()}
        amounts = read_amounts(last, facts, skipped)
        times = read_times(last, facts, skipped)
        return as_channels(amounts, times, facts)[None]

    @classmethod
    def preparation(cls, facts: dict[str, Any], in_shape: Shape) -> Preparation | None:
        return Windows(facts)


def as_slice(rows: Tensor) -> Tensor | slice:
    """Return consecutive row numbers as a slice, because indexing by a slice copies nothing."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def read_amounts(table: Table, settings: dict[str, Any], skipped: int = 0) -> Tensor:
    """Return the target and the features, shape (rows, channels), float64.

    Args:
        table: the columns.
        settings: path, target and features.
        skipped: rows of the file before those of the table, for errors.

    Raises:
        DataError: a column does not exist, or a cell is not a number.
    """
    path = settings["path"]
    columns = []
    for label in (settings["target"], *settings["features"]):
        column: Any = as_column(require_column(table, label, path), label, path, text=False)
        if column.isnan().any():
            row = int(column.isnan().nonzero()[0, 0]) + skipped + 1
            raise DataError(
                f"{path}, row {row}: {label!r} is empty; a series needs a number in every row"
            )
        columns.append(column)
    return torch.stack(columns, dim=1)


def as_channels(amounts: Tensor, times: list[datetime] | None, facts: dict[str, Any]) -> Tensor:
    """Return standardized amounts and the calendar, shape (rows, channels), float32."""
    mean = torch.tensor(facts["mean"], dtype=torch.float64)
    std = torch.tensor(facts["std"], dtype=torch.float64)
    channels = [(amounts - mean) / std]
    if times is not None:
        channels += [calendar_channels(times, part) for part in facts["calendar"]]
    return torch.cat(channels, dim=1).float()


def read_times(table: Table, settings: dict[str, Any], skipped: int = 0) -> list[datetime] | None:
    """Return the times of all rows, None without a column of times.

    Raises:
        DataError: a cell is not a time, or the times are not evenly spaced.
    """
    label = settings["time"]
    path = settings["path"]
    if label is None:
        return None
    times: list[datetime] = []
    for row, cell in enumerate(require_column(table, label, path).to_pylist(), 1 + skipped):
        try:
            times.append(datetime.fromisoformat(str(cell)))
        except ValueError:
            found = "an empty cell" if cell is None else repr(cell)
            raise DataError(
                f"{path}, row {row}, column {label!r}: expected a time such as 2000-06-05T14:30, "
                f"got {found}"
            ) from None
        if len(times) > 2:
            check_step(times, f"{path}, row {row}")
    return times


def check_step(times: Sequence[datetime], where: str) -> None:
    """Raise DataError if the last step is not the first one."""
    try:
        step = times[1] - times[0]
        expected = times[-2] + step
        is_even = times[-1] - times[-2] == step
    except (TypeError, OverflowError) as error:  # times with and without a zone, years beyond 9999
        raise DataError(f"{where}: {times[-1]} does not follow {times[-2]}: {error}") from error
    if not is_even:
        raise DataError(
            f"{where}: expected the time {expected}, a step of {step} later, got {times[-1]}"
        )


def calendar_channels(times: Sequence[datetime], part: Calendar) -> Tensor:
    """Return the part of the calendar as channels, shape (rows, channels).

    The times of the day and of the year are the sine and cosine of their angle; the day of the week
    is one-hot.
    """
    if part == "week":
        days = torch.tensor([time.weekday() for time in times])
        return (days[:, None] == torch.arange(7)).double()
    if part == "day":
        turns = [(time.hour + time.minute / 60 + time.second / 3600) / 24 for time in times]
    else:
        turns = [time.timetuple().tm_yday / 365.25 for time in times]
    angle = 2 * math.pi * torch.tensor(turns, dtype=torch.float64)
    return torch.stack([angle.sin(), angle.cos()], dim=1)


@datasets.register("series", aliases=["forecast"])
class SeriesFile(SeriesData):
    """A series in the rows of a CSV or Parquet file, to forecast.

    The rows are evenly spaced in time.

    Args:
        path: a .csv or .tsv file (also .gz or .zip), or .parquet.
        target: the column to forecast.
        features: further columns that are inputs.
        time: the column of times, such as 2000-06-05T14:30; null: no times, and no calendar.
        calendar: the parts of the time that are inputs: day, week, year; null: all three.
        lookback: number of rows before a forecast that are its input.
        horizon: number of rows to forecast.
        delimiter: the separator of the cells; null: the most frequent of , ; | and tab in the
            first line.
        val_fraction: share of the rows for validation, before those of the test.
        test_fraction: share of the rows for the test, the last ones.
    """

    def __init__(
        self,
        path: Path,
        target: str,
        features: list[str] | None = None,
        time: str | None = None,
        calendar: list[Calendar] | None = None,
        lookback: PositiveInt = 96,
        horizon: PositiveInt = 24,
        delimiter: str | None = None,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
    ):
        path = path.expanduser()
        settings = {
            "path": path,
            "target": target,
            "features": features or [],
            "time": time,
            "calendar": ["day", "week", "year"] if calendar is None else calendar,
            "lookback": lookback,
            "horizon": horizon,
            "delimiter": delimiter,
        }
        table = read_table(path, delimiter)
        amounts = read_amounts(table, settings)
        self.split(amounts, read_times(table, settings), settings, val_fraction, test_fraction)


HALF_HOURS = {"target": "megawatts", "features": [], "time": "time", "calendar": ["day", "week"]}


def half_hours(count: int) -> list[datetime]:
    """Return the times of half-hours from Monday, 5 June 2000."""
    start = datetime(2000, 6, 5)
    return [start + timedelta(minutes=30 * row) for row in range(count)]


@datasets.register("electricity", aliases=["taylor"])
class Electricity(SeriesData):
    """Electricity demand in England and Wales, megawatts in each half-hour of 12 weeks in 2000.

    (Taylor 2003.) `scripts/fetch_data electricity` downloads the file.

    Args:
        path: taylor.py, from which the numbers are read without running it; null: where
            scripts/fetch_data puts it.
        lookback: number of half-hours before a forecast that are its input; 336 are a week.
        horizon: number of half-hours to forecast.
        val_fraction: share of the rows for validation, before those of the test.
        test_fraction: share of the rows for the test, the last ones.
    """

    def __init__(
        self,
        path: Path | None = None,
        lookback: PositiveInt = 336,
        horizon: PositiveInt = 48,
        val_fraction: Rate = 1 / 12,
        test_fraction: Rate = 1 / 6,
    ):
        path = path or data_folder("electricity", "1 MB", "data=seasonal") / "taylor.py"
        megawatts = read_taylor(path)
        settings = {"path": path, **HALF_HOURS, "lookback": lookback, "horizon": horizon}
        times = half_hours(len(megawatts))
        self.split(megawatts[:, None], times, settings, val_fraction, test_fraction)


def read_taylor(path: Path) -> Tensor:
    """Return the longest list of numbers in a Python file, float64. The file is not run.

    Raises:
        DataError: there is none, or it is an item of another list.
    """
    content = read_text(path)
    lists = re.finditer(r"\[([^\[\]]*)\]", content)
    longest = max(lists, key=lambda found: len(found[1]), default=None)
    items = [""]
    if longest is not None:
        before = content[: longest.start()].rstrip()[-1:]
        after = content[longest.end() :].lstrip()[:1]
        if before == "[" or after == "]" or (before == "," and after == ","):
            raise DataError(f"{path}: expected one list of numbers, got a list of lists")
        items = longest[1].rstrip(", \n").split(",")
    numbers = []
    for text in items:
        number = parse_number(text)
        if number is None or math.isinf(number):
            raise DataError(f"{path} has no list of finite numbers; fetch it again")
        numbers.append(number)
    return torch.tensor(numbers, dtype=torch.float64)


@datasets.register("seasonal")
class Seasonal(SeriesData):
    """A synthetic series of half-hours with a daily wave, lower weekends, and autocorrelated noise.

    The value is 100 + 20 sin(2π t / 48) + 8 sin(4π t / 48) - 15 at weekends + n(t), with the noise
    n(t) = 0.8 n(t - 1) + noise · normal.

    Args:
        weeks: length of the series, 336 half-hours each.
        noise: standard deviation of the noise that each half-hour adds.
        seed: seed of the noise.
        lookback: number of half-hours before a forecast that are its input.
        horizon: number of half-hours to forecast.
        val_fraction: share of the rows for validation, before those of the test.
        test_fraction: share of the rows for the test, the last ones.
    """

    def __init__(
        self,
        weeks: PositiveInt = 12,
        noise: NonNegativeFloat = 1.5,
        seed: int = 0,
        lookback: PositiveInt = 336,
        horizon: PositiveInt = 48,
        val_fraction: Rate = 1 / 12,
        test_fraction: Rate = 1 / 6,
    ):
        # A time and several numbers for each half-hour.
        memory.check_room(200 * 336 * weeks, f"seasonal with weeks={weeks}")
        t = torch.arange(weeks * 336, dtype=torch.float64)
        generator = seeds.generator(seed, "seasonal")
        normal = torch.randn(len(t), generator=generator, dtype=torch.float64)
        n = 0.0
        drift = []
        for number in normal.tolist():
            n = 0.8 * n + noise * number
            drift.append(n)
        angle = 2 * math.pi * t / 48
        is_weekend = (t // 48 % 7 >= 5).double()
        daily = 100 + 20 * angle.sin() + 8 * (2 * angle).sin()
        amounts = daily - 15 * is_weekend + torch.tensor(drift)
        path = Path("seasonal")
        settings = {"path": path, **HALF_HOURS, "lookback": lookback, "horizon": horizon}
        times = half_hours(len(amounts))
        self.split(amounts[:, None], times, settings, val_fraction, test_fraction)
