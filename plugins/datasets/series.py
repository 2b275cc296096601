"""Time series: sequences of unequal length to tell apart, and one long series to forecast.

Sequences are (channels + 1, length), filled up with zeros at the end; the last channel is 1 where a frame is real.
"""

import ast
import math
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
    Rate,
    TensorSplit,
    datasets,
    did_you_mean,
    memory,
    seeds,
    short,
)
from framework_plugins.datasets.readers.arrays import (
    as_targets,
    check_digits,
    data_folder,
    learn_scale,
    mean_and_std,
    needs_float64,
    split_rows,
)
from framework_plugins.datasets.readers.data_files import (
    one_line,
    parse_number,
    read_bytes,
    read_text,
)
from framework_plugins.datasets.readers.tables import Table, as_column, read_table, rows_of

Calendar = Literal["day", "week", "year"]


@datasets.register("ts_files", aliases=["ts"])
class TsFiles(Data):
    """Sequences of several channels and unequal length, with a class each, from files of the UEA archive (.ts)."""

    def __init__(
        self,
        path: Path,
        test_path: Path | None = None,
        length: PositiveInt | None = None,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        """Read the files.

        Args:
            path: the file to train on.
            test_path: a file with the official test set; test_fraction is not used then.
            length: frames that the model takes; null: those of the longest sequence.
            val_fraction: share of the sequences drawn for validation, in the proportions of the classes.
            test_fraction: share of the sequences drawn for the test.
            split_seed: seed of the drawing.
            normalize: standardise each channel by the frames of the training split.
        """
        parts = [
            (file, *read_ts(file.expanduser())) for file in (path, test_path) if file is not None
        ]
        sequences = [sequence for _, read, _ in parts for sequence in read]
        labels = [label for _, _, named in parts for label in named]
        own = len(parts[0][1])
        targets = as_targets(labels, "class", name=str(path))
        rows = split_rows(
            targets.tensor[:own], val_fraction, 0.0 if test_path else test_fraction, split_seed
        )
        if test_path is not None:
            rows["test"] = torch.arange(own, len(sequences))

        self.length = length or max(sequence.shape[1] for sequence in sequences)
        self.target, self.classes, self.out_shape = "class", targets.classes, targets.out_shape
        self.strata = targets.tensor
        found = [(file, read) for file, read, _ in parts]
        self.learn(found, targets.tensor, normalize, path, rows)

    def learn(
        self,
        read: Sequence[tuple[Path, list[Tensor]]],
        targets: Tensor,
        normalize: bool,
        path: Path,
        rows: Mapping[str, Tensor],
    ) -> None:
        """Measure the training sequences, and set the splits.

        Args:
            read: the files and their sequences, which are numbered through all files.
            targets: the class of each.
            normalize: standardise by the training frames.
            path: the file to name in an error.
            rows: the numbers of the sequences of each split.
        """
        self.rows = rows
        self.refit = partial(self.learn, read, targets, normalize, path)
        sequences = [sequence for _, found in read for sequence in found]
        frames = torch.cat([sequences[row] for row in rows["train"].tolist()], dim=1)
        self.float64 = normalize and needs_float64(frames.T)
        if normalize:
            mean, std = mean_and_std(frames if self.float64 else frames.float(), [1])
            self.mean, self.std = mean.tolist(), std.tolist()
        else:
            check_digits(frames.T, f"{path}: the frames", "data.normalize=true")
            self.mean, self.std = [0.0] * len(frames), [1.0] * len(frames)
        inputs = torch.cat([pad(found, self.facts(), file) for file, found in read])
        for part, taken in rows.items():
            setattr(self, part, TensorSplit(inputs[taken], targets[taken]))
        self.in_shape = tuple(inputs.shape[1:])

    def facts(self) -> dict[str, Any]:
        """Return how sequences become inputs."""
        facts = {"length": self.length, "mean": self.mean, "std": self.std}
        return facts | {"float64": True} if self.float64 else facts

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read the sequences of a .ts file."""
        return pad(read_ts(path)[0], facts, path)


def read_ts(path: Path) -> tuple[list[Tensor], list[str]]:
    """Return the sequences (channels, frames) of a .ts file and their classes ("" in a file without).

    A line is a case: channels parted by ":", their frames by ",", at the end the class (timeseriesclassification.com).
    Raises DataError naming the line that is malformed.
    """
    lines = read_bytes(path).decode("utf-8", errors="replace").splitlines()
    header = [line.strip().lower() for line in lines if line.startswith("@")]
    if "@data" not in header:
        raise DataError(f"{path} is no .ts file: it has no line @data")
    labelled = any(line.startswith("@classlabel true") for line in header)
    first = next(number for number, line in enumerate(lines, 1) if line.strip().lower() == "@data")
    cases = [
        (number, line.strip())
        for number, line in enumerate(lines[first:], first + 1)
        if line.strip()
    ]
    sequences = [read_case(line, labelled, f"{path}, line {number}") for number, line in cases]
    if not sequences:
        raise DataError(f"{path} has no cases")
    channels = len(sequences[0])
    for (number, _), sequence in zip(cases, sequences, strict=True):
        if len(sequence) != channels:
            raise DataError(
                f"{path}, line {number}: {len(sequence)} channels, but {channels} in the first case"
            )
    labels = [line.rpartition(":")[2].strip() if labelled else "" for _, line in cases]
    if labelled and "" in labels:
        raise DataError(f"{path}, line {cases[labels.index('')][0]}: it ends without a class")
    return sequences, labels


def read_case(line: str, labelled: bool, where: str) -> Tensor:
    parts = line.split(":")[: -1 if labelled else None]
    channels = [[frame(text, where) for text in part.split(",")] for part in parts]
    if not channels or len({len(channel) for channel in channels}) != 1:
        raise DataError(
            f"{where}: its channels have {[len(channel) for channel in channels]} frames; all need as many"
        )
    sequence = torch.tensor(channels, dtype=torch.float64)
    if not sequence.float().isfinite().all():
        raise DataError(f"{where}: a frame is no finite number")
    return sequence


def frame(text: str, where: str) -> float:
    number = parse_number(text)
    if number is None:
        raise DataError(f"{where}: a frame should be a number, not {short(text)}")
    return number


def pad(sequences: Sequence[Tensor], facts: dict[str, Any], path: Path) -> Tensor:
    """Return sequences standardised, (cases, channels + 1, length). Raises DataError for one that does not fit."""
    dtype = torch.float64 if facts.get("float64") else torch.float32
    mean, std = (torch.tensor(facts[name], dtype=dtype)[:, None] for name in ("mean", "std"))
    length, channels = facts["length"], len(mean) + 1
    memory.check_room(
        4 * len(sequences) * channels * length, f"{len(sequences)} sequences of {length} frames"
    )
    inputs = torch.zeros(len(sequences), channels, length)
    for row, sequence in enumerate(sequences):
        channels, frames = sequence.shape
        if channels != len(mean):
            raise DataError(
                f"{path}, case {row + 1}: {channels} channels; the model takes {len(mean)}"
            )
        if frames > facts["length"]:
            raise DataError(
                f"{path}, case {row + 1}: {frames} frames; the model takes {facts['length']} (data.length)"
            )
        inputs[row, :-1, :frames] = (sequence.to(dtype) - mean) / std
        inputs[row, -1, :frames] = 1
    return inputs


@datasets.register("vowels", aliases=["japanese_vowels"])
class Vowels(TsFiles):
    """Two Japanese vowels said by nine men, 270 + 370 utterances of 7 to 29 frames of 12 LPC cepstrum coefficients.

    The class is the speaker (Kudo, Toyama and Shimbo 1999, UCI).
    """

    def __init__(
        self,
        path: Path | None = None,
        val_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        """Read the files that `scripts/fetch_data vowels` puts in place.

        Args:
            path: the folder of JapaneseVowels_TRAIN.ts and _TEST.ts; null: where scripts/fetch_data puts them.
            val_fraction: share of the training utterances drawn for validation, in the proportions of the speakers.
            split_seed: seed of the drawing.
            normalize: standardise each coefficient by the frames of the training split.
        """
        folder = path or data_folder("vowels", "6 MB", "data=digits model=rnn data.image=true")
        files = [folder / f"JapaneseVowels_{part}.ts" for part in ("TRAIN", "TEST")]
        super().__init__(
            *files, val_fraction=val_fraction, split_seed=split_seed, normalize=normalize
        )


class SeriesData(Data):
    """Windows of one long series: inputs (lookback, channels), targets the next `horizon` values of the first channel.

    The splits follow each other in time. A window belongs to the split in which all its targets
    lie; what it looks back on may lie before, for that is known when the forecast is made. Means
    and deviations are the training span's. The folds of a cross-validation are blocks of time
    (Bergmeir and Benitez 2012, "On the use of cross-validation for time series predictor
    evaluation").
    """

    in_time_order = True

    def learn(
        self,
        amounts: Tensor,
        times: list[datetime] | None,
        settings: dict[str, Any],
        val_fraction: float,
        test_fraction: float,
    ) -> None:
        """Set the attributes of Data.

        Args:
            amounts: the target and the features, (rows, channels) in float64.
            times: the times of the rows; None without a calendar.
            settings: path, target, features, time, calendar, lookback, horizon.
            val_fraction: share of the rows, before those of the test, for validation.
            test_fraction: share of the rows, the last ones, for the test.
        """
        rows = len(amounts)
        ends = [
            round(rows * (1 - val_fraction - test_fraction)),
            round(rows * (1 - test_fraction)),
            rows,
        ]
        lookback, horizon = settings["lookback"], settings["horizon"]
        if ends[0] < lookback + horizon:
            raise DataError(
                f"{settings['path']}: the training span of {max(ends[0], 0)} of {rows} rows has no "
                f"window of {lookback} + {horizon} rows; lower lookback and horizon, or val_fraction "
                "and test_fraction"
            )
        every = torch.arange(rows)
        train, val, test = every.tensor_split(ends[:2])
        self.cut(amounts, times, settings, {"train": train, "val": val, "test": test})

    def cut(
        self,
        amounts: Tensor,
        times: list[datetime] | None,
        settings: dict[str, Any],
        rows: Mapping[str, Tensor],
    ) -> None:
        """Measure the training rows, and set the splits to their windows.

        A window is of a split if all its targets are, and one to train on if all that it looks back
        on is too: in a fold, no value that validates is seen in training.

        Args:
            amounts: the columns to look back on, (rows, channels).
            times: the times of the rows; None without a calendar.
            settings: see `learn`.
            rows: the rows of each split.
        """
        self.rows = rows
        self.refit = partial(self.cut, amounts, times, settings)
        lookback, horizon = settings["lookback"], settings["horizon"]
        mean, std = mean_and_std(amounts[rows["train"]], [0])
        self.given = {**settings, "mean": mean.tolist(), "std": std.tolist()}
        self.scale = learn_scale(amounts[:, :1], rows["train"], "standard", str(settings["path"]))
        channels = as_channels(amounts, times, self.given)
        windows = len(channels) - lookback - horizon + 1
        inputs = channels.unfold(0, lookback, 1).transpose(1, 2)[:windows]  # views: no copies
        targets = channels[:, 0].contiguous().unfold(0, horizon, 1)[lookback:]
        for part, taken in rows.items():
            inside = torch.zeros(len(channels), dtype=torch.bool)
            inside[taken] = True
            chosen = inside.unfold(0, horizon, 1).all(1)[lookback:]
            if part == "train":
                chosen &= inside.unfold(0, lookback, 1).all(1)[:windows]
            places = as_slice(chosen.nonzero()[:, 0])
            split = TensorSplit(inputs[places], targets[places]) if chosen.any() else None
            setattr(self, part, split)
        if self.train is None:
            raise DataError(
                f"{settings['path']}: the {len(rows['train'])} rows of the training split have no "
                f"window of {lookback} + {horizon} rows that follow each other; lower lookback and "
                "horizon, or take other folds"
            )
        self.in_shape, self.out_shape, self.target = (
            (lookback, channels.shape[1]),
            (horizon,),
            "value",
        )

    def facts(self) -> dict[str, Any]:
        """Return how rows become inputs."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self.given.items()
        }

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read a CSV or Parquet file, to forecast what follows its last row."""
        facts, lookback = facts | {"path": path}, facts["lookback"]
        table = read_table(path, facts.get("delimiter"))
        rows = rows_of(table)
        if rows < lookback:
            raise DataError(f"{path} has {rows} rows; the model looks back on {lookback}")
        last = {label: cells[rows - lookback :] for label, cells in table.items()}
        skipped = rows - lookback
        return as_channels(
            read_channels(last, facts, skipped), read_times(last, facts, skipped), facts
        )[None]


def as_slice(places: Tensor) -> Tensor | slice:
    """Return places as a slice where they follow each other, so that indexing copies nothing."""
    if len(places) and places[-1] - places[0] + 1 == len(places):
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


def read_channels(table: Table, settings: dict[str, Any], skipped: int = 0) -> Tensor:
    """Return the target and the features, (rows, channels) in float64. Raises DataError for an empty cell."""
    path, columns = settings["path"], []
    for label in (settings["target"], *settings["features"]):
        if label not in table:
            raise DataError(f"{path} has no column {label!r}; {did_you_mean(label, table)}")
        column = as_column(table[label], label, path, text=False)
        if column.isnan().any():
            row = int(column.isnan().nonzero()[0, 0]) + skipped + 1
            raise DataError(
                f"{path}, row {row}: {label!r} is empty; a series needs a number in every row"
            )
        columns.append(column)
    return torch.stack(columns, dim=1)


def as_channels(amounts: Tensor, times: list[datetime] | None, facts: dict[str, Any]) -> Tensor:
    """Return amounts standardised and the calendar beside them, (rows, channels) as float32."""
    mean, std = (torch.tensor(facts[name], dtype=torch.float64) for name in ("mean", "std"))
    channels = [(amounts - mean) / std]
    if times is not None:
        channels += [calendar(times, part) for part in facts["calendar"]]
    return torch.cat(channels, dim=1).float()


def read_times(table: Table, settings: dict[str, Any], skipped: int = 0) -> list[datetime] | None:
    """Return the times of all rows, None without a column of them.

    Raises DataError where one is no time, or does not follow at the same distance.
    """
    label, path = settings["time"], settings["path"]
    if label is None:
        return None
    if label not in table:
        raise DataError(f"{path} has no column {label!r}; {did_you_mean(label, table)}")
    moments: list[datetime] = []
    for row, cell in enumerate(table[label].to_pylist(), 1 + skipped):
        try:
            moments.append(datetime.fromisoformat(str(cell)))
        except ValueError:
            found = "the cell is empty, but should be a" if cell is None else f"{cell!r} is no"
            raise DataError(
                f"{path}, row {row}, column {label!r}: {found} time such as 2000-06-05T14:30"
            ) from None
        if len(moments) > 2:
            check_step(moments, f"{path}, row {row}")
    return moments


def check_step(moments: Sequence[datetime], where: str) -> None:
    """Raise DataError if the last time does not follow at the distance of the first two."""
    try:
        step = moments[1] - moments[0]
        expected = moments[-2] + step
        follows = moments[-1] - moments[-2] == step
    except (TypeError, OverflowError) as error:  # times with and without a zone, years beyond 9999
        raise DataError(f"{where}: {moments[-1]} does not follow {moments[-2]}: {error}") from error
    if not follows:
        raise DataError(f"{where}: {moments[-1]} should be {expected}, a step of {step} later")


def calendar(moments: Sequence[datetime], part: str) -> Tensor:
    """Return channels that tell the time of the day or year (sin, cos of its angle), or the day of the week (7)."""
    if part == "week":
        days = torch.tensor([moment.weekday() for moment in moments])
        return (days[:, None] == torch.arange(7)).double()
    if part == "day":
        turns = [
            (moment.hour + moment.minute / 60 + moment.second / 3600) / 24 for moment in moments
        ]
    else:
        turns = [moment.timetuple().tm_yday / 365.25 for moment in moments]
    angle = 2 * math.pi * torch.tensor(turns, dtype=torch.float64)
    return torch.stack([angle.sin(), angle.cos()], dim=1)


@datasets.register("series", aliases=["forecast"])
class SeriesFile(SeriesData):
    """A series in the rows of a CSV or Parquet file, to forecast."""

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
        """Read the file; its rows follow each other in time, at equal distances.

        Args:
            path: a .csv or .tsv file (also .gz or .zip), or .parquet.
            target: the column to forecast.
            features: further columns to look back on.
            time: the column of times, such as 2000-06-05T14:30; null: there is none, and no calendar.
            calendar: what of the time is an input: of the day, the week, the year; null: all three.
            lookback: rows that a forecast is made from.
            horizon: rows that are forecast.
            delimiter: what separates cells; null: the one of , ; | and tab that the first line has most of.
            val_fraction: share of the rows, before those of the test, for validation.
            test_fraction: share of the rows, the last ones, for the test.
        """
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
        amounts = read_channels(table, settings)
        self.learn(amounts, read_times(table, settings), settings, val_fraction, test_fraction)


HALF_HOURS = {"target": "megawatts", "features": [], "time": "time", "calendar": ["day", "week"]}


@datasets.register("electricity", aliases=["taylor"])
class Electricity(SeriesData):
    """Demand for electricity in England and Wales, megawatts in each half-hour of 12 weeks from 5 June 2000.

    (Taylor 2003.)
    """

    def __init__(
        self,
        path: Path | None = None,
        lookback: PositiveInt = 336,
        horizon: PositiveInt = 48,
        val_fraction: Rate = 1 / 12,
        test_fraction: Rate = 1 / 6,
    ):
        """Read the file that `scripts/fetch_data electricity` puts in place.

        Args:
            path: taylor.py, whose numbers are read and which is not run; null: where scripts/fetch_data puts it.
            lookback: half-hours that a forecast is made from; 336 are a week.
            horizon: half-hours that are forecast.
            val_fraction: share of the rows, before those of the test, for validation.
            test_fraction: share of the rows, the last ones, for the test.
        """
        path = path or data_folder("electricity", "1 MB", "data=seasonal") / "taylor.py"
        settings = {"path": path, **HALF_HOURS, "lookback": lookback, "horizon": horizon}
        megawatts = torch.tensor(longest_list(path), dtype=torch.float64)
        self.learn(
            megawatts[:, None], half_hours(len(megawatts)), settings, val_fraction, test_fraction
        )


def longest_list(path: Path) -> list[float]:
    """Return the longest list of numbers that is written in a file of Python. The file is read, not run."""
    text = read_text(path)
    try:
        lists = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.List)]
        found = ast.literal_eval(max(lists, key=lambda node: len(node.elts)))
        numbers = torch.tensor(found, dtype=torch.float64)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, RuntimeError) as error:
        raise DataError(
            f"{path} holds no list of numbers ({one_line(error)}); fetch it again"
        ) from error
    if numbers.ndim != 1 or not len(numbers) or not numbers.isfinite().all():
        raise DataError(f"{path} holds no list of finite numbers; fetch it again")
    return numbers.tolist()


def half_hours(count: int) -> list[datetime]:
    start = datetime(2000, 6, 5)
    return [start + timedelta(minutes=30 * row) for row in range(count)]


@datasets.register("seasonal")
class Seasonal(SeriesData):
    """A series made by a formula: half-hours with a wave a day, lower weekends, and noise that dies away slowly.

    100 + 20 sin(2π t / 48) + 8 sin(4π t / 48) - 15 at weekends + n(t), n(t) = 0.8 n(t - 1) + noise · normal.
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
        """Make the series.

        Args:
            weeks: its length, 336 half-hours each.
            noise: standard deviation of what is new in each half-hour.
            seed: of the noise.
            lookback: half-hours that a forecast is made from.
            horizon: half-hours that are forecast.
            val_fraction: share of the rows, before those of the test, for validation.
            test_fraction: share of the rows, the last ones, for the test.
        """
        memory.check_room(
            200 * 336 * weeks, f"seasonal with weeks={weeks}"
        )  # a time and several numbers a half-hour
        t = torch.arange(weeks * 336, dtype=torch.float64)
        new = torch.randn(len(t), generator=seeds.generator(seed, "seasonal"), dtype=torch.float64)
        lasting, drift = 0.0, []
        for number in new.tolist():
            lasting = 0.8 * lasting + noise * number
            drift.append(lasting)
        turn = 2 * math.pi * t / 48
        weekend = (t // 48 % 7 >= 5).double()
        amounts = 100 + 20 * turn.sin() + 8 * (2 * turn).sin() - 15 * weekend + torch.tensor(drift)
        settings = {
            "path": Path("seasonal"),
            **HALF_HOURS,
            "lookback": lookback,
            "horizon": horizon,
        }
        self.learn(
            amounts[:, None], half_hours(len(amounts)), settings, val_fraction, test_fraction
        )
