"""Texts with classes: e-mails, docstrings, and a folder or table of the user.

Inputs are token ids, shape (length,); 0 is padding.
"""

import ast
import csv
import io
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from framework import (
    Data,
    DataError,
    InputFile,
    InputRows,
    NonNegativeInt,
    PositiveInt,
    Preparation,
    RaggedSplit,
    Rate,
    Scale,
    Shape,
    Shown,
    datasets,
    did_you_mean,
    memory,
    seeds,
    short,
)

from .preparations.texts import Tokens
from .readers.data_files import file_errors, one_line, open_unpacked, read_bytes, read_text
from .readers.fetched import cache_folder, fetch_command
from .readers.targets import known_classes
from .readers.tokenizers import UNKNOWN, TokenizerPart, load_tokenizer

MAX_LINE = 2**26  # characters
Rows = Mapping[str, Tensor]
"""The row numbers of each split."""


class TextData(Data):
    """Texts with a class each, in memory as token ids.

    The tokenizer is fitted on the training texts and kept in the run, for `predict`. A text is cut
    to its first `max_length` tokens; a text without tokens becomes one unknown token.
    """

    input_suffixes = (".txt", ".csv", ".tsv", ".jsonl")

    def fit(
        self,
        texts: Sequence[str],
        labels: Sequence[int],
        classes: Sequence[str],
        tokenizer: TokenizerPart,
        max_length: int,
        bucket: int,
        rows: Rows,
    ) -> None:
        """Fit the tokenizer to the training texts, and set the splits.

        Args:
            texts: all texts.
            labels: the class of each text.
            classes: the names of the classes.
            tokenizer: a factory of tokenizers.
            max_length: maximum number of tokens of a text.
            bucket: number of batches that are sorted by length together; 0 for none.
            rows: the row numbers of each split.
        """
        self.rows = rows
        self.refit = partial(self.fit, texts, labels, classes, tokenizer, max_length, bucket)
        self.strata = torch.tensor(labels)
        self.tokenizer = tokenizer()
        self.name = tokenizer.entry.name
        self.max_length = max_length
        self.in_shape = (max_length,)
        self.out_shape = (len(classes),)
        self.classes = classes
        self.texts: dict[str, list[str]] = {}
        self.labels: dict[str, list[int]] = {}
        self.order: dict[str, list[int]] = {}
        self.tokenizer.fit(texts[row] for row in rows["train"].tolist())
        self.vocabulary = self.tokenizer.size
        for part, chosen in rows.items():
            self.texts[part] = [texts[row] for row in chosen.tolist()]
            self.labels[part] = [labels[row] for row in chosen.tolist()]
            inputs = [encode(text, self.tokenizer, max_length) for text in self.texts[part]]
            order = list(range(len(inputs)))
            if part != "train":
                order.sort(key=lambda row: len(inputs[row]))  # for less padding
            self.order[part] = order
            split = None
            if inputs:
                targets = torch.tensor(self.labels[part])[order]
                split = RaggedSplit(
                    [inputs[row] for row in order],
                    targets,
                    bucket=bucket,
                    tokenizer=self.tokenizer,
                )
            setattr(self, part, split)

    def facts(self) -> dict[str, Any]:
        """Return the fitted tokenizer."""
        return {
            "tokenizer": self.name,
            "learned": self.tokenizer.state(),
            "max_length": self.max_length,
        }

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read the lines of a .txt file, or the text column of a .csv, .tsv or .jsonl file."""
        if path.suffix == ".txt":
            texts = read_text(path).removesuffix("\n").split("\n")
        else:
            texts = [row[0] for row in read_rows(path, [facts.get("text", "text")])]
        if not any(texts):
            raise DataError(f"{path} has no texts; expected one in each line")
        return encode_texts(texts, load_tokenizer(facts), facts["max_length"])

    @classmethod
    def read_chunks(cls, file: InputFile, facts: dict[str, Any]) -> Iterator[InputRows]:
        """Yield the texts of a file as `read_inputs`, or those of standard input.

        Standard input has a text in each line, or for runs with a column of texts the rows of a CSV
        file; or JSON lines.
        """
        tokenizer = load_tokenizer(facts)
        texts: list[str] = []
        ids: dict[str, list[Any]] = {name: [] for name in file.ids}
        first = 1
        for text, cells in text_rows(file, facts):
            texts.append(text)
            for name, value in cells.items():
                ids[name].append(value)
            if len(texts) == file.rows:
                yield InputRows(encode_texts(texts, tokenizer, facts["max_length"]), ids, first)
                first += len(texts)
                texts = []
                ids = {name: [] for name in file.ids}
        if texts:
            yield InputRows(encode_texts(texts, tokenizer, facts["max_length"]), ids, first)
        elif first == 1:
            raise DataError(f"{file.path} has no texts; expected one in each line")

    @classmethod
    def read_labelled(
        cls,
        path: Path,
        facts: dict[str, Any],
        settings: Mapping[str, Any],
        scale: Scale | None = None,
    ) -> RaggedSplit:
        """Read the .txt files of PATH/CLASS/, or a file with a column of texts and of classes."""
        if path.is_dir():
            texts, names = read_text_folder(path)
        else:
            columns = [settings.get("text", "text"), settings.get("label", "label")]
            texts, names = map(list, zip(*read_rows(path, columns), strict=True))
        tokenizer = load_tokenizer(facts)
        classes = known_classes(names, facts["classes"], str(path))
        inputs = [encode(text, tokenizer, facts["max_length"]) for text in texts]
        order = sorted(range(len(inputs)), key=lambda row: len(inputs[row]))  # for less padding
        return RaggedSplit([inputs[row] for row in order], classes[order])

    @classmethod
    def preparation(cls, facts: dict[str, Any], in_shape: Shape) -> Preparation | None:
        return Tokens(facts, facts["max_length"], classifies=True)

    @classmethod
    def show(cls, inputs: Tensor, facts: dict[str, Any]) -> Shown:
        return Shown({"text": decode_texts(inputs, facts)})

    def sample_names(self, split: str, samples: Sequence[int]) -> dict[str, list[Any]]:
        """Return the row of each text in the source, counted from 1."""
        if split not in self.rows:
            return {}
        order = self.order[split]  # splits for measurements are sorted by length
        return {"row": [int(self.rows[split][order[sample]]) + 1 for sample in samples]}


def decode_texts(inputs: Tensor, facts: Mapping[str, Any]) -> list[str]:
    """Return the texts of token ids, shape (texts, length), as the tokenizer of a run reads them.

    Args:
        inputs: ids, 0 for padding.
        facts: "tokenizer" and "learned"; without them (a column of ids), the ids are the text.
    """
    if "learned" not in facts:
        return [" ".join(str(number) for number in row if number) for row in inputs.tolist()]
    tokenizer = load_tokenizer(facts)
    return [str(tokenizer.decode([n for n in row if n])) for row in inputs.tolist()]


def encode_texts(texts: Sequence[str], tokenizer: Any, max_length: int) -> Tensor:
    """Return texts as token ids, padded with 0: shape (texts, max_length)."""
    memory.check_room(8 * len(texts) * max_length, f"{len(texts)} texts of {max_length} tokens")
    inputs = torch.zeros(len(texts), max_length, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids = encode(text, tokenizer, max_length)
        inputs[row, : len(ids)] = ids
    return inputs


def encode(text: str, tokenizer: Any, max_length: int) -> Tensor:
    """Return the first `max_length` ids of a text, or one unknown token."""
    start = text[: 64 * max_length]  # the tokens after it are cut off anyway
    ids = tokenizer.encode(start)[:max_length]
    return torch.tensor(ids or [UNKNOWN], dtype=torch.int32)


def split_texts(
    labels: Sequence[int], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, Tensor]:
    """Return the rows of three splits, each with the same share of each class."""
    rows: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for label in sorted(set(labels)):
        members = [row for row, other in enumerate(labels) if other == label]
        order = seeds.order(seed, label, len(members)).tolist()
        shuffled = [members[index] for index in order]
        val = round(val_fraction * len(members))
        test = round(test_fraction * len(members))
        rows["val"] += shuffled[:val]
        rows["test"] += shuffled[val : val + test]
        rows["train"] += shuffled[val + test :]
    return {part: torch.tensor(sorted(taken), dtype=torch.int64) for part, taken in rows.items()}


PACKAGES = [
    "asyncio",
    "concurrent",
    "ctypes",
    "distutils",
    "email",
    "encodings",
    "http",
    "idlelib",
    "importlib",
    "json",
    "lib2to3",
    "logging",
    "multiprocessing",
    "tkinter",
    "unittest",
    "urllib",
    "xml",
]
MIN_DOCSTRINGS = 40  # of a package that becomes a class


@datasets.register("docstrings")
class Docstrings(TextData):
    """Docstrings of Python's standard library; the class is the package. Needs no file.

    The texts differ a little between versions of Python.

    Args:
        tokenizer: converts text to ids.
        max_length: maximum number of tokens of a text; the rest is cut off.
        bucket: number of batches that are sorted by length together; 0 for none.
        val_fraction: share of the texts for validation, with the same share of each class.
        test_fraction: share of the texts for the test.
        split_seed: seed of the draw.
    """

    def __init__(
        self,
        tokenizer: TokenizerPart = "word",
        max_length: PositiveInt = 128,
        bucket: NonNegativeInt = 16,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
    ):
        library = Path(sysconfig.get_paths()["stdlib"])
        classes: list[str] = []
        label_of: dict[str, int] = {}  # each text once
        for package in PACKAGES:
            found = list(docstrings(library / package))
            if len(found) >= MIN_DOCSTRINGS:
                label_of.update(dict.fromkeys(found, len(classes)))
                classes.append(package)
        if len(classes) < 2:
            raise DataError(
                f"{library} does not contain the source of Python's standard library, which "
                "data=docstrings reads"
            )
        labels = list(label_of.values())
        rows = split_texts(labels, val_fraction, test_fraction, split_seed)
        self.fit(list(label_of), labels, classes, tokenizer, max_length, bucket, rows)


def docstrings(folder: Path) -> Iterator[str]:
    """Yield the docstrings of a package that have four words or more."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for file in sorted(folder.rglob("*.py")):
        if {"test", "tests", "idle_test"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # lib2to3 has files that are wrong on purpose
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and len(text.split()) >= 4:
                yield text


@datasets.register("spam")
class Spam(TextData):
    """SpamAssassin's public corpus of 2002: subject and body of e-mails, with classes ham and spam.

    The training mails are the groups easy-ham-1 and spam-1, the test mails the later groups
    (easy-ham-2, hard-ham-1, spam-2), without mails that training has. This is harder than a random
    split, which has mails of the same sender in training and test. `scripts/fetch_data spam`
    downloads the mails.

    Args:
        tokenizer: converts text to ids.
        max_length: maximum number of tokens of a text; the rest is cut off.
        bucket: number of batches that are sorted by length together; 0 for none.
        val_fraction: share of the training mails for validation, with the same share of each
            class.
        split_seed: seed of the draw.
        folder: the folder with a folder of .json files for each group; null: where
            scripts/fetch_data puts it.
    """

    groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": ("easy-ham-1", "spam-1"),
        "test": ("easy-ham-2", "hard-ham-1", "spam-2"),
    }

    def __init__(
        self,
        tokenizer: TokenizerPart = "word",
        max_length: PositiveInt = 256,
        bucket: NonNegativeInt = 16,
        val_fraction: Rate = 0.15,
        split_seed: int = 0,
        folder: Path | None = None,
    ):
        folder = folder.expanduser() if folder is not None else cache_folder() / "spam"
        labels: dict[str, int] = {}  # each text once, in its first group
        sizes = {}
        for part, groups in self.groups.items():
            for group in groups:
                if not (folder / group).is_dir():
                    raise DataError(
                        f"{folder} does not have the mails of {group}; fetch them with: "
                        f"{fetch_command('spam')} (data=docstrings needs no file)"
                    )
                for text in read_mails(folder / group):
                    labels.setdefault(text, int(group.startswith("spam")))
            sizes[part] = len(labels)
        train_labels = list(labels.values())[: sizes["train"]]
        rows = split_texts(train_labels, val_fraction, 0.0, split_seed)
        rows["test"] = torch.arange(sizes["train"], sizes["test"])
        self.fit(
            list(labels),
            list(labels.values()),
            ["ham", "spam"],
            tokenizer,
            max_length,
            bucket,
            rows,
        )


def read_mails(folder: Path) -> Iterator[str]:
    """Yield subject and body of the mails in a folder."""
    for file in sorted(folder.glob("*.json")):
        try:
            head, _, body = json.loads(read_bytes(file))["text"].partition("\n\n")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{file} is not a mail of the corpus: {error}; fetch it again"
            ) from error
        subject = re.search(r"^Subject:(.*)$", head, re.MULTILINE | re.IGNORECASE)
        yield f"{subject[1].strip() if subject else ''}\n{body.strip()}"


@datasets.register("text_folder")
class TextFolder(TextData):
    """Text files in a folder for each class: ROOT/CLASS/*.txt, UTF-8.

    Args:
        path: the folder ROOT; its sub-folders are the classes.
        tokenizer: converts text to ids.
        max_length: maximum number of tokens of a text; the rest is cut off.
        bucket: number of batches that are sorted by length together; 0 for none.
        val_fraction: share of the texts for validation, with the same share of each class.
        test_fraction: share of the texts for the test.
        split_seed: seed of the draw.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: TokenizerPart = "word",
        max_length: PositiveInt = 256,
        bucket: NonNegativeInt = 16,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
    ):
        texts, names = read_text_folder(path.expanduser())
        classes, labels = number_classes(names)
        rows = split_texts(labels, val_fraction, test_fraction, split_seed)
        self.fit(texts, labels, classes, tokenizer, max_length, bucket, rows)


@datasets.register("text_table")
class TextTable(TextData):
    """Rows with a text and a class, in a .csv, .tsv or .jsonl file.

    Args:
        path: a .csv or .tsv file whose first line names the columns, or a .jsonl file with an
            object in each line.
        text: the column of texts.
        label: the column of classes.
        tokenizer: converts text to ids.
        max_length: maximum number of tokens of a text; the rest is cut off.
        bucket: number of batches that are sorted by length together; 0 for none.
        val_fraction: share of the texts for validation, with the same share of each class.
        test_fraction: share of the texts for the test.
        split_seed: seed of the draw.
    """

    def __init__(
        self,
        path: Path,
        text: str = "text",
        label: str = "label",
        tokenizer: TokenizerPart = "word",
        max_length: PositiveInt = 256,
        bucket: NonNegativeInt = 16,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
    ):
        self.text = text
        texts, names = zip(*read_rows(path.expanduser(), [text, label]), strict=True)
        classes, labels = number_classes(names)
        rows = split_texts(labels, val_fraction, test_fraction, split_seed)
        self.fit(texts, labels, classes, tokenizer, max_length, bucket, rows)

    def facts(self) -> dict[str, Any]:
        """Return the fitted tokenizer, and the column of texts."""
        return {**super().facts(), "text": self.text}


def read_text_folder(path: Path) -> tuple[list[str], list[str]]:
    """Return the texts of PATH/CLASS/*.txt and their classes.

    Raises:
        DataError: there is no folder, or one without texts.
    """
    folders = sorted(folder for folder in path.glob("*") if folder.is_dir())
    if not folders:
        raise DataError(
            f"{path} has no folders; put the .txt files of each class into a folder with its name"
        )
    texts = []
    names = []
    for folder in folders:
        files = sorted(folder.glob("*.txt"))
        if not files:
            raise DataError(f"{folder} has no .txt file; add some, or remove the folder")
        texts += [read_text(file) for file in files]
        names += [folder.name] * len(files)
    return texts, names


def number_classes(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the distinct classes, sorted, and the number of the class of each text."""
    classes = sorted(set(names))
    if len(classes) < 2:
        raise DataError(f"there is only one class, {classes[0]!r}; expected at least two classes")
    label_of = {name: label for label, name in enumerate(classes)}
    return classes, [label_of[name] for name in names]


def read_rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Return the cells of some columns, row by row.

    Raises:
        DataError: the file cannot be read, or a cell is missing or empty; it names file and line.
    """
    readers = {".csv": csv_rows, ".tsv": csv_rows, ".jsonl": json_rows}
    if path.suffix not in readers:
        raise DataError(
            f"{path}: expected the suffix .csv, .tsv or .jsonl "
            "(to predict, also .txt, with a text in each line)"
        )
    rows = []
    for line, row in readers[path.suffix](path):
        rows.append([cell(row, column, f"{path}, line {line}") for column in columns])
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def csv_rows(
    path: Path, lines: Iterable[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the cells of each row.

    Args:
        path: the file.
        lines: its lines; None reads the file.
    """
    if lines is None:
        lines = io.StringIO(read_text(path), newline="")
    limit = csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}, line {reader.line_num}: expected as many cells as the first line has"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def json_rows(
    path: Path, lines: Iterable[str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each line; see `csv_rows`."""
    if lines is None:
        lines = io.StringIO(read_text(path), newline="")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON: {one_line(error)}") from error
        if not isinstance(row, dict):
            raise DataError(
                f'{path}, line {number}: expected an object such as {{"text": ..., "label": ...}}'
            )
        yield number, row


def text_rows(file: InputFile, facts: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the texts of a file, with the cells of `file.ids`, without reading it as a whole."""
    path = file.path
    column = facts.get("text", "text")
    with open_lines(path, file.stream) as lines:
        first = next(lines, "")
        all_lines = chain([first], lines)
        suffix = path.suffix
        if file.stream is not None:
            suffix = ".csv" if "text" in facts else ".txt"
            suffix = ".jsonl" if first.lstrip().startswith("{") else suffix
        if suffix == ".txt":
            if file.ids:
                raise DataError(f"--id {file.ids[0]}: {path} has no named columns")
            for line in all_lines:
                yield line.removesuffix("\n"), {}
            return
        readers = {".csv": csv_rows, ".tsv": csv_rows, ".jsonl": json_rows}
        if suffix not in readers:
            raise DataError(f"{path}: expected the suffix .txt, .csv, .tsv or .jsonl")
        for number, row in readers[suffix](path, all_lines):
            where = f"{path}, line {number}"
            ids = {}
            for name in file.ids:
                if name not in row:
                    raise DataError(f"{where} has no {name!r}; {did_you_mean(name, row)}")
                ids[name] = row[name]
            yield cell(row, column, where), ids


@contextmanager
def open_lines(path: Path, stream: IO[bytes] | None) -> Iterator[Iterator[str]]:
    """Open a UTF-8 file, or a stream, as an iterator of lines."""
    with open_unpacked(path, stream) as raw, file_errors(path):
        text = io.TextIOWrapper(raw, "utf-8-sig")  # type: ignore[type-var]
        try:
            yield checked_lines(text, path)
        finally:
            with suppress(ValueError):  # the file is closed
                text.detach()


def checked_lines(text: IO[str], path: Path) -> Iterator[str]:
    """Yield lines.

    Raises:
        DataError: a line is longer than MAX_LINE, or not UTF-8.
    """
    number = 0
    while True:
        number += 1
        try:
            line = text.readline(MAX_LINE)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 text (line {number} or later); save it as UTF-8"
            ) from error
        if not line:
            return
        if len(line) == MAX_LINE:
            raise DataError(f"{path}, line {number}: longer than {MAX_LINE:,} characters")
        yield line


def cell(row: Mapping[str, Any], column: str, where: str) -> str:
    """Return a cell as a text.

    Raises:
        DataError: the cell is missing, empty or not a text.
    """
    if column not in row:
        raise DataError(f"{where} has no {column!r}; {did_you_mean(column, row)}")
    if not isinstance(row[column], str | int) or not str(row[column]).strip():
        raise DataError(f"{where}: expected a text as {column!r}, got {short(row[column])}")
    return str(row[column])
