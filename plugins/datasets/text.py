"""Texts with classes: e-mails, docstrings, a folder or table of your own. Inputs are token ids (length,); 0 pads."""

import ast
import csv
import io
import json
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from framework import (
    Data,
    DataError,
    NonNegativeInt,
    PartOf,
    PositiveInt,
    RaggedSplit,
    Rate,
    Registry,
    datasets,
    did_you_mean,
    memory,
    seeds,
    short,
)
from framework_plugins.datasets.readers.arrays import cache_folder, fetching
from framework_plugins.datasets.readers.data_files import one_line, read_bytes, read_text

Tokens = Annotated[Callable[..., Any], PartOf("tokenizer")]
Rows = Mapping[str, Tensor]

PACKAGES = "asyncio concurrent ctypes distutils email encodings http idlelib importlib json lib2to3 logging"
PACKAGES += " multiprocessing tkinter unittest urllib xml"
FEWEST = 40  # docstrings of a package that is to be a class


class TextData(Data):
    """Texts of one class each, in memory as token ids.

    The tokenizer is fitted on the training texts and kept in the run, for `predict`. Of a text with more than
    `max_length` tokens the first `max_length` count; one without any is a single unknown token.
    """

    def learn(
        self,
        texts: Sequence[str],
        labels: Sequence[int],
        classes: Sequence[str],
        tokenizer: Tokens,
        max_length: int,
        bucket: int,
        rows: Rows,
    ) -> None:
        """Set the attributes of Data; `rows` says which texts each split has."""
        self.rows = rows
        self.refit = partial(self.learn, texts, labels, classes, tokenizer, max_length, bucket)
        self.strata = torch.tensor(labels)
        self.tokenizer, self.name, self.max_length = tokenizer(), tokenizer.entry.name, max_length  # type: ignore[attr-defined]
        numbers = {part: taken.tolist() for part, taken in rows.items()}
        self.tokenizer.fit(texts[row] for row in numbers["train"])
        for part, taken in numbers.items():
            encoded = {row: ids_of(texts[row], self.tokenizer, max_length) for row in taken}
            chosen = (
                taken if part == "train" else sorted(taken, key=lambda row: len(encoded[row]))
            )  # less padding
            answers = torch.tensor([labels[row] for row in chosen])
            setattr(
                self,
                part,
                RaggedSplit([encoded[row] for row in chosen], answers, bucket=bucket)
                if chosen
                else None,
            )
        self.in_shape, self.out_shape, self.target, self.classes = (
            (max_length,),
            (len(classes),),
            "class",
            classes,
        )
        self.vocabulary = self.tokenizer.size
        self.texts = {part: [texts[row] for row in taken] for part, taken in numbers.items()}
        self.labels = {part: [labels[row] for row in taken] for part, taken in numbers.items()}

    def facts(self) -> dict[str, Any]:
        """Return the tokenizer with all that it has learned."""
        return {
            "tokenizer": self.name,
            "learned": self.tokenizer.state(),
            "max_length": self.max_length,
        }

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read texts: the lines of a .txt file, or the text column of a .csv, .tsv or .jsonl file."""
        if path.suffix == ".txt":
            texts = read_text(path).removesuffix("\n").split("\n")
        else:
            texts = [row[0] for row in read_rows(path, [facts.get("text", "text")])]
        if not any(texts):
            raise DataError(f"{path} has no texts; a .txt file has one in each line")
        tokenizer = known_tokenizer(facts)
        encoded = [ids_of(text, tokenizer, facts["max_length"]) for text in texts]
        memory.check_room(
            8 * len(encoded) * facts["max_length"],
            f"{len(encoded)} texts of {facts['max_length']} tokens",
        )
        inputs = torch.zeros(len(encoded), facts["max_length"], dtype=torch.int64)
        for row, ids in enumerate(encoded):
            inputs[row, : len(ids)] = ids
        return inputs


def known_tokenizer(facts: Mapping[str, Any]) -> Any:
    """Return the tokenizer of a run, as it was fitted."""
    tokenizer = Registry.every["tokenizer"].build(facts["tokenizer"])
    tokenizer.load(facts["learned"])
    return tokenizer


def ids_of(text: str, tokenizer: Any, max_length: int) -> Tensor:
    cut = text[: 64 * max_length]  # what lies behind cannot count, and may be long
    return torch.tensor(tokenizer.encode(cut)[:max_length] or [1], dtype=torch.int32)


def drawn(labels: Sequence[int], val_fraction: float, test_fraction: float, seed: int) -> Rows:
    """Return the rows of three splits, drawn in the proportions of the classes."""
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for label in sorted(set(labels)):
        own = [row for row, other in enumerate(labels) if other == label]
        mixed = [own[place] for place in seeds.order(seed, label, len(own)).tolist()]
        val, test = round(val_fraction * len(own)), round(test_fraction * len(own))
        rows["val"] += mixed[:val]
        rows["test"] += mixed[val : val + test]
        rows["train"] += mixed[val + test :]
    return {part: torch.tensor(sorted(taken), dtype=torch.int64) for part, taken in rows.items()}


@datasets.register("docstrings")
class Docstrings(TextData):
    """Docstrings of Python's standard library; the class is the package that has it. Needs no file."""

    def __init__(
        self,
        tokenizer: Tokens = "word",
        max_length: PositiveInt = 128,
        bucket: NonNegativeInt = 16,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
    ):
        """Read the packages that come with this Python, so that the texts differ a little between its versions.

        Args:
            tokenizer: what makes ids of text.
            max_length: most tokens of a text; the rest is cut off.
            bucket: batches of a pool that is sorted by length; 0 for none.
            val_fraction: share of the texts drawn for validation, in the proportions of the classes.
            test_fraction: share of the texts drawn for the test.
            split_seed: seed of the drawing.
        """
        library = Path(sysconfig.get_paths()["stdlib"])
        found = {package: list(docstrings(library / package)) for package in PACKAGES.split()}
        classes = [package for package, texts in found.items() if len(texts) >= FEWEST]
        if len(classes) < 2:
            raise DataError(
                f"{library} has not the source of Python's standard library, so there are no docstrings"
            )
        owners = {
            text: label for label, package in enumerate(classes) for text in found[package]
        }  # each text once
        texts, labels = list(owners), list(owners.values())
        rows = drawn(labels, val_fraction, test_fraction, split_seed)
        self.learn(texts, labels, classes, tokenizer, max_length, bucket, rows)


def docstrings(folder: Path) -> Iterator[str]:
    """Yield the docstrings of four words or more of all modules, classes and functions of a package."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for file in sorted(folder.rglob("*.py")):
        if {"test", "tests", "idle_test"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # lib2to3 has files that are wrong on purpose
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
        yield from (text for text in texts if text and len(text.split()) >= 4)


@datasets.register("spam")
class Spam(TextData):
    """SpamAssassin's public corpus of 2002: subject and body of e-mails, ham or spam (`scripts/fetch_data spam`).

    The training mails are the groups easy-ham-1 and spam-1, the test mails the later ones (easy-ham-2, hard-ham-1,
    spam-2), without those that training has: harder than a random split, where one sender's mails are on both sides.
    """

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": ("easy-ham-1", "spam-1"),
        "test": ("easy-ham-2", "hard-ham-1", "spam-2"),
    }

    def __init__(
        self,
        tokenizer: Tokens = "word",
        max_length: PositiveInt = 256,
        bucket: NonNegativeInt = 16,
        val_fraction: Rate = 0.15,
        split_seed: int = 0,
        folder: Path | None = None,
    ):
        """Read the mails.

        Args:
            tokenizer: what makes ids of text.
            max_length: most tokens of a text; the rest is cut off.
            bucket: batches of a pool that is sorted by length; 0 for none.
            val_fraction: share of the training mails drawn for validation, in the proportions of the classes.
            split_seed: seed of the drawing.
            folder: with a folder of .json files for each group; null: where scripts/fetch_data puts it.
        """
        folder = folder.expanduser() if folder is not None else cache_folder() / "spam"
        if not all(
            (folder / group).is_dir() for groups in self.groups.values() for group in groups
        ):
            raise DataError(
                f"{folder} has not the mails; fetch them ({fetching('spam')}), or take data=docstrings"
            )
        owners: dict[str, tuple[int, str]] = {}  # each mail once, where it comes first
        for part, groups in self.groups.items():
            for group in groups:
                for text in read_mails(folder / group):
                    owners.setdefault(text, (int(group.startswith("spam")), part))
        texts, labels = list(owners), [label for label, _ in owners.values()]
        training = [row for row, (_, part) in enumerate(owners.values()) if part == "train"]
        halves = drawn([labels[row] for row in training], val_fraction, 0.0, split_seed)
        testing = [row for row, (_, part) in enumerate(owners.values()) if part == "test"]
        numbers = torch.tensor(training, dtype=torch.int64)
        rows = {part: numbers[halves[part]] for part in ("train", "val")}
        rows["test"] = torch.tensor(testing, dtype=torch.int64)
        self.learn(texts, labels, ["ham", "spam"], tokenizer, max_length, bucket, rows)


def read_mails(folder: Path) -> Iterator[str]:
    """Yield subject and body of the mails in a folder."""
    for file in sorted(folder.glob("*.json")):
        try:
            head, _, body = json.loads(read_bytes(file))["text"].partition("\n\n")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{file} is no mail of the corpus: {error}; fetch it anew") from error
        subject = re.search(r"^Subject:(.*)$", head, re.MULTILINE | re.IGNORECASE)
        yield f"{subject[1].strip() if subject else ''}\n{body.strip()}"


class OwnTexts(TextData):
    """Texts of a person's own, split at random."""

    def split_up(
        self,
        texts: Sequence[str],
        names: Sequence[str],
        fractions: tuple[float, float, int],
        learning: tuple[Tokens, int, int],
    ) -> None:
        """Draw the splits, in the proportions of the classes, and learn."""
        classes = sorted(set(names))
        if len(classes) < 2:
            raise DataError(f"there is one class only, {classes[0]!r}: nothing to tell apart")
        labels = [classes.index(name) for name in names]
        self.learn(texts, labels, classes, *learning, drawn(labels, *fractions))


@datasets.register("text_folder")
class TextFolder(OwnTexts):
    """Text files in a folder for each class: ROOT/CLASS/*.txt, UTF-8."""

    def __init__(
        self,
        path: Path,
        tokenizer: Tokens = "word",
        max_length: PositiveInt = 256,
        bucket: NonNegativeInt = 16,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
    ):
        """Read the files.

        Args:
            path: the folder ROOT; its folders are the classes.
            tokenizer: what makes ids of text.
            max_length: most tokens of a text; the rest is cut off.
            bucket: batches of a pool that is sorted by length; 0 for none.
            val_fraction: share of the texts drawn for validation, in the proportions of the classes.
            test_fraction: share of the texts drawn for the test.
            split_seed: seed of the drawing.
        """
        path = path.expanduser()
        folders = sorted(folder for folder in path.glob("*") if folder.is_dir())
        if not folders:
            raise DataError(
                f"{path} has no folders; it should have one for each class, with .txt files"
            )
        files = {folder: sorted(folder.glob("*.txt")) for folder in folders}
        for folder, own in files.items():
            if not own:
                raise DataError(
                    f"{folder} has no .txt file; a class needs some, or remove its folder"
                )
        texts = [read_text(file) for own in files.values() for file in own]
        names = [folder.name for folder, own in files.items() for _ in own]
        self.split_up(
            texts, names, (val_fraction, test_fraction, split_seed), (tokenizer, max_length, bucket)
        )


@datasets.register("text_table")
class TextTable(OwnTexts):
    """Rows with a text and a class, in a .csv, .tsv or .jsonl file."""

    def __init__(
        self,
        path: Path,
        text: str = "text",
        label: str = "label",
        tokenizer: Tokens = "word",
        max_length: PositiveInt = 256,
        bucket: NonNegativeInt = 16,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
    ):
        """Read the file.

        Args:
            path: a .csv or .tsv file whose first line names the columns, or .jsonl with an object a line.
            text: the column of texts.
            label: the column of classes.
            tokenizer: what makes ids of text.
            max_length: most tokens of a text; the rest is cut off.
            bucket: batches of a pool that is sorted by length; 0 for none.
            val_fraction: share of the rows drawn for validation, in the proportions of the classes.
            test_fraction: share of the rows drawn for the test.
            split_seed: seed of the drawing.
        """
        self.text = text
        texts, names = zip(*read_rows(path.expanduser(), [text, label]), strict=True)
        self.split_up(
            texts, names, (val_fraction, test_fraction, split_seed), (tokenizer, max_length, bucket)
        )

    def facts(self) -> dict[str, Any]:
        """Return the tokenizer, and the column of texts."""
        return super().facts() | {"text": self.text}


def read_rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Return the cells of some columns, row by row. Raises DataError with file and line for a missing or empty one."""
    readers = {".csv": csv_rows, ".tsv": csv_rows, ".jsonl": json_rows}
    if path.suffix not in readers:
        raise DataError(
            f"{path}: the suffix should be .csv, .tsv or .jsonl (or .txt, to predict: a text in each line)"
        )
    rows = [
        [cell(row, column, f"{path}, line {line}") for column in columns]
        for line, row in readers[path.suffix](path)
    ]
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = read_text(path)
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.DictReader(
            io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ","
        )
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: not as many cells as the first line has columns"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(read_text(path), newline=""), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is no JSON: {one_line(error)}") from error
        if not isinstance(row, dict):
            raise DataError(
                f'{path}, line {number} should be an object such as {{"text": ..., "label": ...}}'
            )
        yield number, row


def cell(row: Mapping[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise DataError(f"{where} has no {column!r}; {did_you_mean(column, row)}")
    if not isinstance(row[column], str | int) or not str(row[column]).strip():
        raise DataError(f"{where}: {column!r} should be a text, not {short(row[column])}")
    return str(row[column])
