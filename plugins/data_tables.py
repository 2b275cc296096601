"""Data sets of rows and named columns: a CSV or Parquet file, and scikit-learn's small tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from framework_plugins.arrays import Targets, as_targets, split_rows
from framework_plugins.tables import Cell, Table, as_column, as_text, each, read_table
from torch import Tensor

from framework import Data, PositiveInt, Rate, TensorSplit, datasets
from framework.errors import DataError, did_you_mean


class TableData(Data):
    """Rows of named columns, in memory.

    A column of numbers becomes one input, standardised; an empty cell becomes the mean. A column of texts becomes an
    input of 0 or 1 for each of its texts; an empty cell, or a text that training never saw, is 0 in all of them.
    Means, deviations and texts are those of the training split.
    """

    columns: Sequence[dict[str, Any]]
    """How each column becomes inputs: {"name", "fill", "mean", "std"} of numbers, {"name", "texts"} of texts."""

    def learn(
        self, table: Table, targets: Targets, rows: Mapping[str, Tensor], normalize: bool, most_texts: int, name: str
    ) -> None:
        """Set the attributes of Data, from all rows and the numbers of those that each split has."""
        chosen = rows["train"].tolist()
        self.columns = [
            learn_column(label, [cells[row] for row in chosen], normalize, most_texts, name)
            for label, cells in table.items()
        ]
        inputs = encode(table, self.columns)
        for part, taken in rows.items():
            setattr(self, part, TensorSplit(inputs[taken], targets.tensor[taken]))
        self.in_shape, self.out_shape = tuple(inputs.shape[1:]), targets.out_shape
        self.target, self.classes = targets.kind, targets.classes

    def facts(self) -> dict[str, Any]:
        """Return the columns in the order of the inputs."""
        return {"columns": list(self.columns), "target": self.target, "classes": list(self.classes)}

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read the feature columns of a CSV or Parquet file; its other columns are passed over."""
        table = read_table(path, facts.get("delimiter"))
        return encode({c["name"]: read_like(c, table, path) for c in facts["columns"]}, facts["columns"])


@datasets.register("table", aliases=["csv", "parquet"])
class TableFile(TableData):
    """Rows from a CSV or Parquet file; a column of texts is encoded one-hot, an empty number becomes the mean."""

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
    ):
        """Read the file; its first line names the columns.

        Args:
            path: a .csv or .tsv file (also .gz), or .parquet.
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
        """
        path = path.expanduser()
        self.delimiter = delimiter
        table = read_table(path, delimiter)
        labels = choose(table, target, features, ignore or [], path)
        for label in categorical or []:
            need(label, table, path)
        columns = {
            label: as_column(
                table[label], label, path, label in (categorical or []) or None, f", or categorical=[{label}]"
            )
            for label in labels
        }
        answers, test_rows = target_cells(table[need(target, table, path)], target, target_kind, path), 0
        if test_path is not None:
            answers, test_rows = self.append(test_path.expanduser(), columns, answers, target, target_kind)
        targets = as_targets(answers, target_kind, name=f"{path}, column {target!r}")

        own = len(answers) - test_rows
        strata = targets.tensor[:own] if targets.kind == "class" else torch.zeros(own)
        rows = split_rows(strata, val_fraction, 0.0 if test_rows else test_fraction, split_seed)
        if test_rows:
            rows["test"] = torch.arange(own, own + test_rows)
        self.learn(columns, targets, rows, normalize, max_categories, str(path))

    def append(
        self, path: Path, columns: Table, answers: list[Any], target: str, kind: str | None
    ) -> tuple[list[Any], int]:
        """Add the rows of the official test set to the columns; return all targets and the number of those rows."""
        table = read_table(path, self.delimiter)
        for label, cells in columns.items():
            like = {"name": label, "texts": None} if is_text(cells) else {"name": label}
            cells.extend(read_like(like, table, path))
        more = target_cells(table[need(target, table, path)], target, kind, path)
        return answers + more, len(more)

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
        columns = {str(label): cells for label, cells in zip(read.feature_names, read.data.T.tolist(), strict=True)}
        named = [str(label) for label in getattr(read, "target_names", ())]
        targets = as_targets(read.target, "class" if named else "value", named, self.source)
        strata = targets.tensor if named else torch.zeros(len(targets.tensor))
        rows = split_rows(strata, val_fraction, test_fraction, split_seed)
        self.learn(columns, targets, rows, normalize, 0, self.source)


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


def choose(table: Table, target: str, features: Sequence[str] | None, ignore: Sequence[str], path: Path) -> list[str]:
    """Return the feature columns. Raises DataError for a name that no column has."""
    for label in (target, *(features or ()), *ignore):
        need(label, table, path)
    if features and target in features:
        raise DataError(f"{path}: {target!r} is the target and cannot be a feature too")
    chosen = [label for label in features or table if label not in (target, *ignore)]
    if not chosen:
        raise DataError(f"{path}: no column is left to predict {target!r} from; it has {', '.join(table)}")
    return chosen


def need(label: str, table: Table, path: Path) -> str:
    if label not in table:
        raise DataError(f"{path} has no column {label!r}; {did_you_mean(label, table)}")
    return label


def learn_column(label: str, cells: Sequence[Cell], normalize: bool, most_texts: int, name: str) -> dict[str, Any]:
    """Return how a column becomes inputs, from its cells in the training split."""
    if is_text(cells):
        texts = sorted({str(cell) for cell in cells if cell is not None})
        if not texts:
            raise nothing_in(label, name)
        if len(texts) > most_texts:
            raise DataError(
                f"{name}: column {label!r} has {len(texts)} different texts; leave it out (ignore=[{label}]) or raise "
                f"max_categories, now {most_texts}"
            )
        return {"name": label, "texts": texts}
    values = torch.tensor(cells, dtype=torch.float64)
    known = values[~values.isnan()]
    if not len(known):
        raise nothing_in(label, name)
    mean, std = known.mean().item(), known.std(correction=0).item() or 1.0  # of a constant, 0 / 1
    return {"name": label, "fill": mean, "mean": mean if normalize else 0.0, "std": std if normalize else 1.0}


def nothing_in(label: str, name: str) -> DataError:
    return DataError(f"{name}: column {label!r} is empty in the training split; leave it out: ignore=[{label}]")


def encode(table: Mapping[str, Sequence[Cell]], columns: Sequence[dict[str, Any]]) -> Tensor:
    """Return inputs (rows, features) as float32, contiguous."""
    return torch.cat([encode_column(table[column["name"]], column) for column in columns], dim=1)


def encode_column(cells: Sequence[Cell], column: dict[str, Any]) -> Tensor:
    if "texts" in column:
        places = {text: place for place, text in enumerate(column["texts"])}
        encoded = torch.zeros(len(cells), len(places) + 1)  # the last place is for what is not known, and cut off
        encoded[torch.arange(len(cells)), [places.get(cell, len(places)) for cell in cells]] = 1
        return encoded[:, :-1]
    values = torch.tensor(cells, dtype=torch.float64).nan_to_num(column["fill"])
    return ((values - column["mean"]) / column["std"]).float()[:, None]


def is_text(cells: Sequence[Cell]) -> bool:
    return cells[0] is None or isinstance(cells[0], str)  # the first speaks for all, after `as_column`


def read_like(column: dict[str, Any], table: Table, path: Path) -> list[Cell]:
    """Return the cells of a column whose kind is known."""
    label = need(column["name"], table, path)
    return as_column(table[label], label, path, "texts" in column)


def target_cells(cells: Sequence[Cell], label: str, kind: str | None, path: Path) -> list[Any]:
    """Return targets as whole numbers, where all are, else as numbers or texts. Raises DataError for an empty cell."""
    texts = each(as_text, cells)
    if None in texts:
        raise DataError(
            f"{path}, row {texts.index(None) + 1}: the target {label!r} is empty; fill it in or drop the row"
        )
    if any(isinstance(cell, bool | float) for cell in cells):  # of a Parquet file, which knows its types
        return list(cells)
    try:
        return [int(str(text)) for text in texts]
    except ValueError:
        if kind == "class":
            return texts
        return as_column(cells, label, path, False if kind == "value" else None, ", or say target_kind=class")
