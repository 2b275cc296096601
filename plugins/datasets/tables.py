"""Data sets of rows and named columns: a CSV or Parquet file, diamonds, flights, and scikit-learn's small tables."""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from framework import Data, DataError, PositiveInt, Rate, TensorSplit, datasets, did_you_mean, paths
from framework_plugins.datasets.readers.arrays import (
    Scaling,
    Targets,
    Texts,
    as_targets,
    check_digits,
    data_folder,
    learn_scale,
    scaled,
    split_rows,
)
from framework_plugins.datasets.readers.tables import (
    Categories,
    Cells,
    Column,
    Encoding,
    Table,
    as_column,
    as_numbers,
    as_texts,
    encode,
    encoded,
    learn_column,
    read_table,
    widths,
)

Answers = Any
"""Targets of a file: an array of truth values or numbers, or Texts."""
INTEGER = re.compile(r"[+-]?[0-9]+")


class TableData(Data):
    """Rows of named columns, in memory.

    A column of numbers becomes one input, standardised; an empty cell becomes the mean, and, where the training split
    has empty cells, is 1 in a second input. A column of texts becomes an input of 0 or 1 for each of its texts, empty
    cells being one more where the training split has some; a text that training never saw is 0 in all of them.
    Or it becomes one input, the index of its text, for models that embed it: 0 is what training never saw.
    Means, deviations, quantiles and texts are those of the training split, and so is the scale of the targets.
    """

    learnt: Sequence[dict[str, Any]]
    """How each column becomes inputs, see `learn_column`."""

    def learn(
        self,
        table: Mapping[str, Column],
        targets: Targets,
        encoding: Encoding,
        scaling: Scaling,
        name: str,
        rows: Mapping[str, Tensor],
    ) -> None:
        """Set the attributes of Data, from all rows and the numbers of those that each split has."""
        self.rows = rows
        self.refit = partial(self.learn, table, targets, encoding, scaling, name)
        self.strata = targets.tensor if targets.kind == "class" else None
        chosen = rows["train"]
        self.learnt = [
            learn_column(label, column[chosen], encoding, name) for label, column in table.items()
        ]
        if not (encoding.normalize or encoding.quantile):
            for label, column in table.items():
                check_column(label, column[chosen], name)
        inputs, answers = encode(table, self.learnt), targets.tensor
        self.columns = widths(self.learnt) if encoding.categories == "index" else ()
        if targets.kind == "value":
            self.scale = learn_scale(answers, rows["train"], scaling, name)
            answers = scaled(answers, self.scale)
        for part, taken in rows.items():
            setattr(self, part, TensorSplit(inputs[taken], answers[taken]))
        self.in_shape, self.out_shape = tuple(inputs.shape[1:]), targets.out_shape
        self.target, self.classes = targets.kind, targets.classes

    def facts(self) -> dict[str, Any]:
        """Return the columns in the order of the inputs."""
        return {"columns": list(self.learnt), "target": self.target, "classes": list(self.classes)}

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read the feature columns of a CSV or Parquet file; its other columns are passed over."""
        table = read_table(path, facts.get("delimiter"))
        return encode(
            {c["name"]: read_like(c, table, path) for c in facts["columns"]}, facts["columns"]
        )


@datasets.register("table", aliases=["csv", "parquet"])
class TableFile(TableData):
    """Rows from a CSV or Parquet file, with columns of numbers and of texts, and empty cells."""

    def __init__(
        self,
        path: Path,
        target: str,
        features: list[str] | None = None,
        ignore: list[str] | None = None,
        categorical: list[str] | None = None,
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
        """Read the file; its first line names the columns.

        A number has the digits 0 to 9 and may have a sign, a decimal point and an exponent; 3_400 and 1,5 are texts.

        Args:
            path: a .csv or .tsv file (also .gz or .zip), or .parquet.
            target: the column to predict.
            features: the columns to predict from; null: all others.
            ignore: columns to leave out, such as names and row numbers.
            categorical: columns whose numbers are codes, to be encoded like texts.
            target_kind: null infers it: texts and at most 20 different integers are classes.
            test_path: a file with the official test set; test_fraction is not used then.
            delimiter: what separates cells; null: the one of , ; | and tab that the first line has most of.
            max_categories: a column with more different texts than this is refused.
            val_fraction: share of the rows drawn for validation, in the proportions of the classes.
            test_fraction: share of the rows drawn for the test.
            split_seed: seed of the drawing.
            normalize: standardise columns of numbers by the training split.
            quantile: turn numbers into normal scores by the training split's quantiles instead; outliers come nearer.
            categories: one_hot: an input of 0 or 1 for each text; index: one input, for models that embed categories.
            mark_missing: give empty cells an input, or a category, of their own in columns that have some in training.
            scale_target: train on values that are standardised, also after their logarithm; metrics and predictions
                are in the target's own unit.
        """
        path = path.expanduser()
        self.delimiter = delimiter
        table = self.read(path)
        labels = choose(table, target, features, ignore or [], path)
        columns = feature_columns(table, labels, categorical or [], path)
        answers, test_rows = (
            target_cells(table[need(target, table, path)], target, target_kind, path),
            0,
        )
        del table  # its texts: numbers are in memory once
        if test_path is not None:
            answers, test_rows = self.append(
                test_path.expanduser(), columns, answers, target, target_kind
            )
        targets = as_targets(answers, target_kind, name=f"{path}, column {target!r}")

        own = len(targets.tensor) - test_rows
        strata = targets.tensor[:own] if targets.kind == "class" else torch.zeros(own)
        rows = split_rows(strata, val_fraction, 0.0 if test_rows else test_fraction, split_seed)
        if test_rows:
            rows["test"] = torch.arange(own, own + test_rows)
        encoding = Encoding(normalize, quantile, categories, mark_missing, max_categories)
        self.learn(columns, targets, encoding, scale_target, str(path), rows)

    def read(self, path: Path) -> Table:
        """Read the file's columns."""
        return read_table(path, self.delimiter)

    def append(
        self,
        path: Path,
        columns: dict[str, Column],
        answers: Answers,
        target: str,
        kind: str | None,
    ) -> tuple[Answers, int]:
        """Add the rows of the official test set to the columns; return all targets and the number of those rows."""
        table = read_table(path, self.delimiter)
        for label, column in columns.items():
            like = {"name": label, "texts": None} if isinstance(column, Texts) else {"name": label}
            columns[label] = joined(column, read_like(like, table, path))
        cells = table[need(target, table, path)]
        return joined_answers(answers, target_cells(cells, target, kind, path)), len(cells)

    def facts(self) -> dict[str, Any]:
        """Return the columns in the order of the inputs, and what separates cells."""
        return super().facts() | {"delimiter": self.delimiter}


class ScikitTable(TableData):
    """A small table that comes with scikit-learn."""

    source: ClassVar[str]

    def __init__(
        self,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
        normalize: bool = True,
    ):
        """Read the table.

        Args:
            val_fraction: share of the rows drawn for validation, in the proportions of the classes.
            test_fraction: share of the rows drawn for the test.
            split_seed: seed of the drawing.
            normalize: standardise each column by the training split.
        """
        import sklearn.datasets  # half a second, for those who use it

        read = getattr(sklearn.datasets, f"load_{self.source}")()
        cells = torch.from_numpy(read.data.T).double().contiguous()
        columns: dict[str, Column] = {
            str(label): row for label, row in zip(read.feature_names, cells, strict=True)
        }
        named = [str(label) for label in getattr(read, "target_names", ())]
        targets = as_targets(read.target, "class" if named else "value", named, self.source)
        strata = targets.tensor if named else torch.zeros(len(targets.tensor))
        rows = split_rows(strata, val_fraction, test_fraction, split_seed)
        self.learn(columns, targets, Encoding(normalize), "standard", self.source, rows)


@datasets.register("iris")
class Iris(ScikitTable):
    """150 flowers of three species, by four lengths (Fisher 1936)."""

    source = "iris"


@datasets.register("wine")
class Wine(ScikitTable):
    """178 wines of three growers, by 13 chemical measures (Aeberhard and Forina 1992, UCI)."""

    source = "wine"


@datasets.register("breast_cancer")
class BreastCancer(ScikitTable):
    """569 tumours, malignant or benign, by 30 measures of their cell nuclei (Wolberg and others 1993, UCI)."""

    source = "breast_cancer"


@datasets.register("diabetes")
class Diabetes(ScikitTable):
    """442 patients, by ten measures; the target is the disease's progress in a year, 25 to 346 (Efron et al. 2004)."""

    source = "diabetes"


@datasets.register("diamonds")
class Diamonds(TableFile):
    """53,940 diamonds; the target is the price, 326 to 18,823 dollars, by weight, cut, colour, clarity and size.

    (Wickham, ggplot2; here from plotnine. 146 rows are there twice.)
    """

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
        """Read the file that `scripts/fetch_data diamonds` puts in place.

        Args:
            path: diamonds.csv; null: where scripts/fetch_data puts it.
            val_fraction: share of the rows drawn for validation.
            test_fraction: share of the rows drawn for the test.
            split_seed: seed of the drawing.
            quantile: turn numbers into normal scores by the training split's quantiles; false: standardise them.
            categories: one_hot: an input of 0 or 1 for each text; index: one input, for models that embed categories.
            scale_target: train on prices that are standardised, also after their logarithm; metrics are in dollars.
        """
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


FLIGHT = [
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
WEATHER = [
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
    """327,346 flights from New York in 2013: did one arrive more than 15 minutes late? (Wickham, nycflights13.)

    Known before it leaves: its date, schedule, carrier, places and plane, and the weather at the hour of departure,
    with gaps. Rows are drawn at random, so that the test has other flights of the same hours: a forecast for a day
    to come would do worse.
    """

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
        """Read the files that `scripts/fetch_data flights` puts in place.

        Args:
            path: the folder of flights.csv.zip and weather.csv; null: where scripts/fetch_data puts them.
            plane: use the tail number too, one of 4,000 categories; goes with categories=index.
            val_fraction: share of the rows drawn for validation, in the proportions of the classes.
            test_fraction: share of the rows drawn for the test.
            split_seed: seed of the drawing.
            quantile: turn numbers into normal scores by the training split's quantiles; false: standardise them.
            categories: one_hot: an input of 0 or 1 for each text; index: one input, for models that embed categories.
        """
        self.features = [*FLIGHT, "weekday", *["tailnum"] * plane, *WEATHER]
        super().__init__(
            (path or data_folder("flights", "9 MB", "data=breast_cancer")) / "flights.csv.zip",
            "late",
            features=self.features,
            categorical=["weekday"],
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            quantile=quantile,
            categories=categories,
            max_categories=5000 if plane else 200,
        )

    def read(self, path: Path) -> Table:
        """Read the flights that arrived, with whether they were late and the weather where and when they left."""
        import pyarrow
        from pyarrow import compute

        flights, weather = read_table(path), read_table(path.parent / "weather.csv")
        wanted = [*FLIGHT, "tailnum", "year", "time_hour", "arr_delay"]
        for label in wanted:
            need(label, flights, path)
        for label in ("origin", "time_hour", *WEATHER):
            need(label, weather, path.parent / "weather.csv")
        delays = as_column(flights["arr_delay"], "arr_delay", path, text=False)
        arrived = pyarrow.array((~delays.isnan()).numpy())
        table = {label: flights[label].filter(arrived) for label in wanted}
        hours = as_hours(weather)
        backwards = hours[::-1]  # of an hour that is there twice the last row counts
        place = compute.index_in(as_hours(table), value_set=backwards, skip_nulls=True)
        row = compute.subtract(len(hours) - 1, place)
        for label in WEATHER:
            table[label] = weather[label].take(row)
        table["weekday"] = pyarrow.chunked_array([weekdays(table, path)])
        late = (delays[~delays.isnan()] > 15).numpy()
        table["late"] = pyarrow.chunked_array(
            [compute.if_else(pyarrow.array(late), "late", "on time")]
        )
        return table


def as_hours(table: Table) -> Any:
    """Return where and when each row was, as one text."""
    from pyarrow import compute

    return compute.binary_join_element_wise(
        table["origin"], table["time_hour"], "\n"
    ).combine_chunks()


def weekdays(table: Table, path: Path) -> Any:
    """Return the day of the week of each row, such as "Tue"."""
    import pyarrow
    from pyarrow import compute

    days = compute.binary_join_element_wise(table["year"], table["month"], table["day"], "-")
    codes, known = encoded(days)
    names = []
    for day in known:
        try:
            names.append(date(*map(int, day.split("-"))).strftime("%a"))
        except ValueError as error:
            raise DataError(
                f"{path}: {day!r} of the columns year, month and day is no date: {error}"
            ) from error
    return pyarrow.array([*names, None]).take(pyarrow.array((codes % (len(names) + 1)).numpy()))


def check_column(label: str, column: Column, name: str) -> None:
    """Raise DataError for a column of numbers that float32 cannot hold as they are."""
    if not isinstance(column, Texts):
        numbers = column[~column.isnan()]
        check_digits(numbers[:, None], f"{name}: the numbers of column {label!r}", "normalize=true")


def feature_columns(
    table: Table, labels: Sequence[str], categorical: Sequence[str], path: Path
) -> dict[str, Column]:
    """Return the columns as numbers or texts; those in `categorical` as texts."""
    for label in categorical:
        need(label, table, path)
    return {
        label: as_column(
            table[label],
            label,
            path,
            label in categorical or None,
            f", or {paths.override('categorical', [label])}",
        )
        for label in labels
    }


def choose(
    table: Table, target: str, features: Sequence[str] | None, ignore: Sequence[str], path: Path
) -> list[str]:
    """Return the feature columns. Raises DataError for a name that no column has."""
    for label in (target, *(features or ()), *ignore):
        need(label, table, path)
    if features and target in features:
        raise DataError(f"{path}: {target!r} is the target and cannot be a feature too")
    chosen = [label for label in features or table if label not in (target, *ignore)]
    if not chosen:
        raise DataError(
            f"{path}: no column is left to predict {target!r} from; it has {', '.join(table)}"
        )
    return chosen


def need(label: str, table: Table, path: Path) -> str:
    if label not in table:
        raise DataError(f"{path} has no column {label!r}; {did_you_mean(label, table)}")
    return label


def read_like(column: dict[str, Any], table: Table, path: Path) -> Column:
    """Return the cells of a column whose kind is known."""
    label = need(column["name"], table, path)
    return as_column(table[label], label, path, "texts" in column)


def joined(first: Column, second: Column) -> Column:
    """Return a column of the rows of two, which are both numbers or both texts."""
    if not isinstance(first, Texts):
        return torch.cat([first, second])
    places = {text: place for place, text in enumerate(first.known)}
    renumbered = [places.setdefault(text, len(places)) for text in second.known]
    codes = torch.tensor([*renumbered, -1])[second.codes]
    return Texts(torch.cat([first.codes, codes]), list(places))


def joined_answers(first: Answers, second: Answers) -> Answers:
    """Return the targets of two files. Where those of one are numbers and of the other texts, all are texts."""
    import numpy

    if isinstance(first, Texts) and isinstance(second, Texts):
        return joined(first, second)
    return numpy.concatenate([as_array(first), as_array(second)])


def as_array(answers: Answers) -> Any:
    import numpy

    if not isinstance(answers, Texts):
        return answers
    return numpy.array(answers.known)[answers.codes.numpy()]


def target_cells(cells: Cells, label: str, kind: str | None, path: Path) -> Answers:
    """Return targets as whole numbers, where all are, else as numbers or texts. Raises DataError for an empty cell."""
    import pyarrow

    values, wrong = as_numbers(cells)
    if values.isnan().any():
        row = int(values.isnan().nonzero()[0, 0])
        raise DataError(
            f"{path}, row {row + 1}: the target {label!r} is empty; fill it in or drop the row"
        )
    if pyarrow.types.is_boolean(cells.type):  # of a Parquet file, which knows its types
        return cells.to_numpy()
    if pyarrow.types.is_floating(cells.type):
        return cells.cast("float64").to_numpy()
    if wrong is None and (values == values.floor()).all():
        integers = as_integers(cells)
        if integers is not None:
            return integers
    if kind == "class":
        return as_texts(cells)
    column = as_column(
        cells, label, path, False if kind == "value" else None, ", or say target_kind=class"
    )
    return column if isinstance(column, Texts) else column.numpy()


def as_integers(cells: Cells) -> Any:
    """Return cells that are whole numbers as an array of integers; None if one is written otherwise, such as 1.0."""
    import numpy
    import pyarrow

    try:
        return cells.cast("int64").to_numpy()
    except pyarrow.ArrowInvalid:  # a sign +, blanks, an integer beyond int64
        texts = as_texts(cells)
    if not all(INTEGER.fullmatch(text) for text in texts.known):
        return None
    return numpy.array([int(text) for text in texts.known])[texts.codes.numpy()]
