"""Tables with named columns: CSV and Parquet files, diamonds, flights, and scikit-learn's."""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from framework import (
    Data,
    DataError,
    InputFile,
    InputRows,
    PositiveInt,
    Preparation,
    Rate,
    Scale,
    Shape,
    Shown,
    TensorSplit,
    datasets,
    paths,
)

from .preparations.tables import Columns
from .readers.columns import Column, Texts, as_column, as_numbers, as_texts, dictionary_encoded
from .readers.dates import DATE_PARTS, TIME_PARTS, date_columns, date_part_column
from .readers.encoding import Categories, Encoding, category_counts, encode, fit_column
from .readers.fetched import data_folder
from .readers.scaling import Scaling, check_digits, fit_scale, scaled, scaled_as_before
from .readers.splits import split_parts, split_rows
from .readers.tables import (
    TABLE_SUFFIXES,
    Cells,
    Table,
    read_table,
    read_table_chunks,
    require_column,
)
from .readers.targets import Targets, as_targets, known_classes

TargetCells = Any
"""The targets of a file: a NumPy array of booleans or numbers, or Texts."""
INTEGER = re.compile(r"[+-]?[0-9]+")


class TableData(Data):
    """Rows of named columns, in memory.

    A column of numbers becomes one input, standardized. An empty cell becomes the mean; if the
    training split has empty cells, a second input is 1 for empty cells. A column of texts becomes
    an input of 0 or 1 for each of its texts, and for empty cells if the training split has some; a
    text that training does not have is 0 in all of them. Or it becomes one input, the index of its
    text, for models that embed it: 0 for a text that training does not have. Means, deviations,
    quantiles, texts and the scale of the targets are those of the training split.

    Attributes:
        column_facts: how each column becomes inputs, see `readers/encoding.py`.
        dates: the columns of dates, whose parts are inputs.
    """

    column_facts: Sequence[dict[str, Any]]
    dates: Sequence[str] = ()
    input_suffixes = TABLE_SUFFIXES
    label: ClassVar[str | None] = None  # the column of targets, if no setting names it

    def fit(
        self,
        table: Mapping[str, Column],
        targets: Targets,
        encoding: Encoding,
        scaling: Scaling,
        name: str,
        rows: Mapping[str, Tensor],
    ) -> None:
        """Fit the encoding to the training rows, and set the splits.

        Args:
            table: the columns of all rows.
            targets: the targets of all rows.
            encoding: how columns become inputs.
            scaling: how targets that are values are scaled.
            name: the name of the data set, for errors.
            rows: the row numbers of each split.
        """
        self.rows = rows
        self.refit = partial(self.fit, table, targets, encoding, scaling, name)
        self.column_facts = []
        for label, column in table.items():
            training = column[rows["train"]]
            source, part = date_source(label, self.dates)
            # The other parts of an empty date do not repeat that it is empty.
            is_repeated = part not in (None, "elapsed")
            own = encoding._replace(mark_missing=False) if is_repeated else encoding
            fitted = fit_column(label, training, own, name)
            if part is not None:
                fitted |= {"source": source, "part": part}
            self.column_facts.append(fitted)
            if not (encoding.normalize or encoding.quantile):
                check_column(label, training, name)
        inputs = encode(table, self.column_facts)
        if encoding.categories == "index":
            self.columns = category_counts(self.column_facts)
        answers = targets.tensor
        if targets.kind == "class":
            self.strata = answers
        if targets.kind == "value":
            self.scale = fit_scale(answers, rows["train"], scaling, name)
            answers = scaled(answers, self.scale)
        for part, chosen in rows.items():
            setattr(self, part, TensorSplit(inputs[chosen], answers[chosen]))
        self.in_shape = tuple(inputs.shape[1:])
        self.out_shape = targets.out_shape
        self.target = targets.kind
        self.classes = targets.classes

    def facts(self) -> dict[str, Any]:
        """Return the columns in the order of the inputs."""
        return {
            "columns": list(self.column_facts),
            "target": self.target,
            "classes": list(self.classes),
        }

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read the feature columns of a CSV or Parquet file, and ignore its other columns."""
        table = read_table(path, facts.get("delimiter"))
        return encode_table(table, facts["columns"], path)

    @classmethod
    def read_chunks(cls, file: InputFile, facts: dict[str, Any]) -> Iterator[InputRows]:
        """Yield the feature columns of a CSV or Parquet file, or of CSV on standard input."""
        columns = facts["columns"]
        sources = [column.get("source", column["name"]) for column in columns]
        needed = dict.fromkeys([*sources, *file.ids])
        first = 1
        for table in read_table_chunks(
            file.path, file.rows, list(needed), facts.get("delimiter"), file.stream
        ):
            ids = {}
            for label in file.ids:
                ids[label] = require_column(table, label, file.path).to_pylist()
            inputs = encode_table(table, columns, file.path, first - 1)
            yield InputRows(inputs, ids, first)
            first += len(inputs)

    @classmethod
    def read_labelled(
        cls,
        path: Path,
        facts: dict[str, Any],
        settings: Mapping[str, Any],
        scale: Scale | None = None,
    ) -> TensorSplit:
        """Read the feature columns and the target of a CSV or Parquet file."""
        label = settings.get("target", cls.label)
        if label is None:
            raise DataError(f"--data {path}: {cls.__name__} does not read files with targets")
        table = read_table(path, facts.get("delimiter"))
        inputs = encode_table(table, facts["columns"], path)
        kind = facts["target"]
        cells = require_column(table, label, path)
        answers = target_cells(cells, label, kind, path)
        name = f"{path}, column {label!r}"
        if kind == "class":
            return TensorSplit(inputs, known_classes(answers, facts["classes"], name))
        amounts = as_targets(answers, kind, name=name).tensor
        return TensorSplit(inputs, scaled_as_before(amounts, scale, name))

    @classmethod
    def preparation(cls, facts: dict[str, Any], in_shape: Shape) -> Preparation | None:
        return Columns(facts["columns"])

    @classmethod
    def show(cls, inputs: Tensor, facts: dict[str, Any]) -> Shown:
        return Shown(Columns(facts["columns"]).cells(inputs))


@datasets.register("table", aliases=["csv", "parquet"])
class TableFile(TableData):
    """Rows of a CSV or Parquet file, with columns of numbers and of texts, and empty cells.

    The first line names the columns. A number has the digits 0 to 9 and may have a sign, a decimal
    point and an exponent; 3_400 and 1,5 are texts.

    Args:
        path: a .csv or .tsv file (also .gz or .zip), or .parquet.
        target: the column to predict.
        features: the columns to predict from; null: all others.
        ignore: columns to leave out, such as names and row numbers.
        categorical: columns whose numbers are codes, to be encoded like texts.
        dates: columns of dates or times in ISO 8601 form, such as 2024-01-31: their inputs are
            year, month, week, day, weekday, day of the year, whether a month, quarter or year
            begins or ends, the elapsed days, and the time of day if there is one.
        target_kind: null infers it: texts and at most 20 different integers are classes.
        test_path: a file with the official test set; test_fraction is not used then.
        delimiter: the separator of the cells; null: the most frequent of , ; | and tab in the
            first line.
        max_categories: a column with more different texts than this is an error.
        val_fraction: share of the rows for validation, with the same share of each class.
        test_fraction: share of the rows for the test.
        split_seed: seed of the draw.
        normalize: standardize columns of numbers by the training split.
        quantile: convert numbers to normal scores by the quantiles of the training split, which
            reduces outliers, instead of standardizing them.
        categories: one_hot: an input of 0 or 1 for each text; index: one input, for models that
            embed categories.
        mark_missing: give empty cells an input, or a category, of their own in columns that
            have some in training.
        scale_target: train on values that are standardized, with log after their logarithm;
            metrics and predictions are in the target's own unit.
    """

    def __init__(
        self,
        path: Path,
        target: str,
        features: list[str] | None = None,
        ignore: list[str] | None = None,
        categorical: list[str] | None = None,
        dates: list[str] | None = None,
        target_kind: Literal["class", "value"] | None = None,
        test_path: Path | None = None,
        delimiter: str | None = None,
        max_categories: PositiveInt = 100,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
        quantile: bool = False,
        categories: Categories = "one_hot",
        mark_missing: bool = True,
        scale_target: Scaling = "standard",
    ):
        path = path.expanduser()
        self.delimiter = delimiter
        self.dates = dates or []
        table = self.read(path)
        labels = choose_features(table, target, features, ignore or [], path)
        columns = feature_columns(table, labels, categorical or [], path, self.dates)
        answers = target_cells(require_column(table, target, path), target, target_kind, path)
        del table  # its texts, so that the columns are in memory once
        sizes = {"train": len(answers)}
        if test_path is not None:
            test_answers = self.append(test_path.expanduser(), columns, target, target_kind)
            answers = concatenate_targets(answers, test_answers)
            sizes["test"] = len(test_answers)
        targets = as_targets(answers, target_kind, name=f"{path}, column {target!r}")
        strata = targets.tensor if targets.kind == "class" else torch.zeros(len(targets.tensor))
        train_strata = strata[: sizes["train"]]
        rows = split_parts(train_strata, sizes, val_fraction, test_fraction, split_seed)
        encoding = Encoding(normalize, quantile, categories, mark_missing, max_categories)
        self.fit(columns, targets, encoding, scale_target, str(path), rows)

    def read(self, path: Path) -> Table:
        """Read the columns of the file."""
        return read_table(path, self.delimiter)

    def append(
        self, path: Path, columns: dict[str, Column], target: str, kind: str | None
    ) -> TargetCells:
        """Append the rows of the official test set to the columns, and return their targets."""
        table = read_table(path, self.delimiter)
        for label, column in columns.items():
            source, part = date_source(label, self.dates)
            cells = require_column(table, source, path)
            if part is not None:
                test_dates = date_part_column(cells, source, part, path)
                columns[label] = concatenate(column, test_dates)
                continue
            test_column = as_column(cells, label, path, text=isinstance(column, Texts))
            columns[label] = concatenate(column, test_column)
        return target_cells(require_column(table, target, path), target, kind, path)

    def facts(self) -> dict[str, Any]:
        """Return the columns in the order of the inputs, and the delimiter."""
        return {**super().facts(), "delimiter": self.delimiter}


class ScikitTable(TableData):
    """A small table that is part of scikit-learn.

    Args:
        val_fraction: share of the rows for validation, with the same share of each class.
        test_fraction: share of the rows for the test.
        split_seed: seed of the draw.
        normalize: standardize each column by the training split.
    """

    source: ClassVar[str]

    def __init__(
        self,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        import sklearn.datasets  # takes half a second

        bunch = getattr(sklearn.datasets, f"load_{self.source}")()
        cells = torch.from_numpy(bunch.data.T).double().contiguous()
        columns: dict[str, Column] = {}
        for label, column in zip(bunch.feature_names, cells, strict=True):
            columns[str(label)] = column
        classes = [str(label) for label in getattr(bunch, "target_names", ())]
        targets = as_targets(bunch.target, "class" if classes else "value", classes, self.source)
        strata = targets.tensor if classes else torch.zeros(len(targets.tensor))
        rows = split_rows(strata, val_fraction, test_fraction, split_seed)
        self.fit(columns, targets, Encoding(normalize), "standard", self.source, rows)


@datasets.register("iris")
class Iris(ScikitTable):
    """150 flowers of three species, by four lengths (Fisher 1936)."""

    source = "iris"


@datasets.register("wine")
class Wine(ScikitTable):
    """178 wines of three growers, by 13 chemical measures (Aeberhard, Forina 1992, UCI)."""

    source = "wine"


@datasets.register("breast_cancer")
class BreastCancer(ScikitTable):
    """569 tumors, malignant or benign, by 30 measures of their cells (Wolberg 1993, UCI)."""

    source = "breast_cancer"


@datasets.register("diabetes")
class Diabetes(ScikitTable):
    """442 patients, by ten measures; the target is the progression in a year, 25 to 346.

    (Efron et al. 2004.)
    """

    source = "diabetes"


@datasets.register("diamonds")
class Diamonds(TableFile):
    """53,940 diamonds; the target is the price, 326 to 18,823 dollars.

    The columns are weight, cut, color, clarity and size (Wickham, ggplot2; here from plotnine).
    146 rows are duplicates. `scripts/fetch_data diamonds` downloads the file.

    Args:
        path: diamonds.csv; null: where scripts/fetch_data puts it.
        val_fraction: share of the rows for validation.
        test_fraction: share of the rows for the test.
        split_seed: seed of the draw.
        quantile: convert numbers to normal scores by the quantiles of the training split;
            false: standardize them.
        categories: one_hot: an input of 0 or 1 for each text; index: one input, for models that
            embed categories.
        scale_target: train on prices that are standardized, with log after their logarithm;
            metrics are in dollars.
    """

    label = "price"

    def __init__(
        self,
        path: Path | None = None,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        quantile: bool = False,
        categories: Categories = "one_hot",
        scale_target: Scaling = "log",
    ):
        super().__init__(
            path or data_folder("diamonds", "2 MB", "data=diabetes") / "diamonds.csv",
            "price",
            target_kind="value",
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            quantile=quantile,
            categories=categories,
            scale_target=scale_target,
        )


FLIGHT_COLUMNS = [
    "month",
    "day",
    "hour",
    "minute",
    "sched_arr_time",
    "carrier",
    "origin",
    "dest",
    "distance",
]
WEATHER_COLUMNS = [
    "temp",
    "dewp",
    "humid",
    "wind_dir",
    "wind_speed",
    "wind_gust",
    "precip",
    "pressure",
    "visib",
]


@datasets.register("flights")
class Flights(TableFile):
    """327,346 flights from New York in 2013: the class is whether one arrived over 15 minutes late.

    (Wickham, nycflights13.) The inputs are known before departure: date, schedule, carrier, places
    and plane, and the weather at the hour of departure, with gaps. Rows are drawn at random, so the
    test has other flights of the same hours: a forecast for a future day would be less accurate.
    `scripts/fetch_data flights` downloads the files.

    Args:
        path: the folder of flights.csv.zip and weather.csv; null: where scripts/fetch_data puts
            them.
        plane: use the tail number too, one of 4,000 categories; for categories=index.
        val_fraction: share of the rows for validation, with the same share of each class.
        test_fraction: share of the rows for the test.
        split_seed: seed of the draw.
        quantile: convert numbers to normal scores by the quantiles of the training split;
            false: standardize them.
        categories: one_hot: an input of 0 or 1 for each text; index: one input, for models that
            embed categories.
    """

    label = "late"

    def __init__(
        self,
        path: Path | None = None,
        plane: bool = False,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        quantile: bool = False,
        categories: Categories = "one_hot",
    ):
        folder = path or data_folder("flights", "9 MB", "data=breast_cancer")
        features = [*FLIGHT_COLUMNS, "weekday"]
        if plane:
            features.append("tailnum")
        super().__init__(
            folder / "flights.csv.zip",
            "late",
            features=features + WEATHER_COLUMNS,
            categorical=["weekday"],
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            quantile=quantile,
            categories=categories,
            max_categories=5000 if plane else 200,
        )

    def read(self, path: Path) -> Table:
        """Read the flights that arrived, with the weather at their place and time of departure."""
        import pyarrow
        from pyarrow import compute

        flights = read_table(path)
        weather_path = path.parent / "weather.csv"
        weather = read_table(weather_path)
        for label in ("origin", "time_hour", *WEATHER_COLUMNS):
            require_column(weather, label, weather_path)
        cells = require_column(flights, "arr_delay", path)
        delays: Any = as_column(cells, "arr_delay", path, text=False)
        arrived = pyarrow.array((~delays.isnan()).numpy())
        table = {}
        for label in (*FLIGHT_COLUMNS, "tailnum", "year", "time_hour"):
            table[label] = require_column(flights, label, path).filter(arrived)
        hours = place_and_hour(weather)
        # Of an hour with two rows the last one counts, so the search begins at the end.
        place_from_end = compute.index_in(
            place_and_hour(table), value_set=hours[::-1], skip_nulls=True
        )
        row = compute.subtract(len(hours) - 1, place_from_end)
        for label in WEATHER_COLUMNS:
            table[label] = weather[label].take(row)
        table["weekday"] = pyarrow.chunked_array([weekdays(table, path)])
        is_late = pyarrow.array((delays[~delays.isnan()] > 15).numpy())
        table["late"] = pyarrow.chunked_array([compute.if_else(is_late, "late", "on time")])
        return table


def place_and_hour(table: Table) -> Any:
    """Return origin and hour of each row as one text."""
    from pyarrow import compute

    joined = compute.binary_join_element_wise(table["origin"], table["time_hour"], "\n")
    return joined.combine_chunks()


def weekdays(table: Table, path: Path) -> Any:
    """Return the day of the week of each row, such as "Tue"."""
    import pyarrow
    from pyarrow import compute

    days = compute.binary_join_element_wise(table["year"], table["month"], table["day"], "-")
    codes, distinct = dictionary_encoded(days)
    names: list[str | None] = []
    for day in distinct:
        try:
            names.append(date(*map(int, day.split("-"))).strftime("%a"))
        except ValueError as error:
            raise DataError(
                f"{path}: {day!r} of the columns year, month and day is not a date: {error}"
            ) from error
    names.append(None)  # of the code -1
    return pyarrow.array(names).take(pyarrow.array((codes % len(names)).numpy()))


def encode_table(
    table: Table, fitted: Sequence[dict[str, Any]], path: Path, skipped: int = 0
) -> Tensor:
    """Return the inputs of a table, shape (rows, inputs).

    Args:
        table: the columns; others than the fitted ones are ignored.
        fitted: how each column becomes inputs, from the training.
        path: the file, for errors.
        skipped: rows of the file before those of the table, for errors.
    """
    columns: dict[str, Column] = {}
    for column in fitted:
        label = column["name"]
        source = column.get("source", label)
        cells = require_column(table, source, path)
        if "part" in column:
            columns[label] = date_part_column(cells, source, column["part"], path, skipped)
            continue
        columns[label] = as_column(cells, label, path, text="texts" in column, skipped=skipped)
    return encode(columns, fitted)


def check_column(label: str, column: Column, name: str) -> None:
    """Raise DataError for a column of numbers that float32 cannot hold as they are."""
    if not isinstance(column, Texts):
        numbers = column[~column.isnan()]
        check_digits(numbers[:, None], f"{name}: the numbers of column {label!r}", "normalize=true")


def date_source(label: str, dates: Sequence[str]) -> tuple[str, str | None]:
    """Return the column of the file that an input column is made of, and the part of its dates."""
    for source in dates:
        part = label.removeprefix(f"{source}:")
        if part in (*DATE_PARTS, *TIME_PARTS):
            return source, part
    return label, None


def feature_columns(
    table: Table,
    labels: Sequence[str],
    categorical: Sequence[str],
    path: Path,
    dates: Sequence[str] = (),
) -> dict[str, Column]:
    """Return the columns as numbers or texts; those in `categorical` as texts.

    A column in `dates` is replaced by the parts of its dates.
    """
    for label in (*categorical, *dates):
        require_column(table, label, path)
    for label in dates:
        if label not in labels:
            raise DataError(
                f"{paths.override('dates', [label])}: {label!r} is the target or left out, and no "
                "feature"
            )
    columns: dict[str, Column] = {}
    for label in labels:
        if label in dates:
            columns.update(date_columns(table[label], label, path))
            continue
        text = True if label in categorical else None
        advice = f", or {paths.override('categorical', [label])}"
        columns[label] = as_column(table[label], label, path, text, advice)
    return columns


def choose_features(
    table: Table, target: str, features: Sequence[str] | None, ignore: Sequence[str], path: Path
) -> list[str]:
    """Return the names of the feature columns.

    Raises:
        DataError: the table does not have a column.
    """
    for label in (target, *(features or ()), *ignore):
        require_column(table, label, path)
    if features and target in features:
        raise DataError(f"{path}: {target!r} is the target and cannot be a feature too")
    chosen = [label for label in features or table if label not in (target, *ignore)]
    if not chosen:
        raise DataError(
            f"{path}: no column is left to predict {target!r} from; columns: {', '.join(table)}"
        )
    return chosen


def concatenate(first: Column, second: Column) -> Column:
    """Return the rows of two columns, which are both numbers or both texts."""
    if not isinstance(first, Texts) or not isinstance(second, Texts):
        return torch.cat([first, second])  # type: ignore[list-item]
    known = {text: code for code, text in enumerate(first.known)}
    renumbered = [known.setdefault(text, len(known)) for text in second.known]
    renumbered.append(-1)  # of the code -1
    codes = torch.tensor(renumbered)[second.codes]
    return Texts(torch.cat([first.codes, codes]), list(known))


def concatenate_targets(first: TargetCells, second: TargetCells) -> TargetCells:
    """Return the targets of two files; if those of one are texts, all become texts."""
    import numpy

    if isinstance(first, Texts) and isinstance(second, Texts):
        return concatenate(first, second)
    return numpy.concatenate([as_array(first), as_array(second)])


def as_array(targets: TargetCells) -> Any:
    """Return targets as a NumPy array of numbers or texts."""
    import numpy

    if not isinstance(targets, Texts):
        return targets
    return numpy.array(targets.known)[targets.codes.numpy()]


def target_cells(cells: Cells, label: str, kind: str | None, path: Path) -> TargetCells:
    """Return targets as integers if all are, else as numbers or texts.

    Raises:
        DataError: a cell is empty, or not a number among numbers.
    """
    import pyarrow

    values, invalid = as_numbers(cells)
    if values.isnan().any():
        row = int(values.isnan().nonzero()[0, 0])
        raise DataError(
            f"{path}, row {row + 1}: the target {label!r} is empty; fill it in or drop the row"
        )
    if pyarrow.types.is_boolean(cells.type):  # only in Parquet files
        return cells.to_numpy()
    if pyarrow.types.is_floating(cells.type):
        return cells.cast("float64").to_numpy()
    if invalid is None and (values == values.floor()).all():
        integers = as_integers(cells)
        if integers is not None:
            return integers
    if kind == "class":
        return as_texts(cells)
    text = False if kind == "value" else None
    column = as_column(cells, label, path, text, ", or set target_kind=class")
    return column if isinstance(column, Texts) else column.numpy()


def as_integers(cells: Cells) -> Any:
    """Return whole numbers as integers; None if a cell is written in another way, such as 1.0."""
    import numpy
    import pyarrow

    try:
        return cells.cast("int64").to_numpy()
    except pyarrow.ArrowInvalid:  # a sign +, blanks, an integer beyond int64
        texts = as_texts(cells)
    if not all(INTEGER.fullmatch(text) for text in texts.known):
        return None
    return numpy.array([int(text) for text in texts.known])[texts.codes.numpy()]
