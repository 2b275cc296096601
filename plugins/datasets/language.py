"""Long texts for language models: Python's standard library, the Bible, and files of the user."""

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework import (
    Data,
    DataError,
    PositiveInt,
    Preparation,
    Rate,
    Shape,
    Shown,
    WindowSplit,
    datasets,
)

from .preparations.texts import Tokens
from .readers.data_files import read_text
from .readers.fetched import cache_folder, fetch_command
from .readers.tokenizers import TokenizerPart, load_tokenizer

CHUNK = 50_000  # characters that are encoded at once


class LanguageData(Data):
    """One text, split in its order; inputs are windows of tokens, shape (length,).

    The targets are the same windows, one token later (see `WindowSplit`), so the target is "none".
    The tokenizer is fitted on the training part and kept in the run, for `predict --prompt`. A part
    of a prompt that it does not know, such as a character that training does not have, becomes the
    unknown token, which is printed as �.

    Attributes:
        characters: the number of characters of each token, shape (vocabulary,), for metrics per
            character.
        fitted_on, held_out: the texts of the training and the test split.
    """

    characters: Tensor

    def split(
        self,
        text: str,
        tokenizer: TokenizerPart,
        length: int,
        overlap: float,
        val_fraction: float,
        test_fraction: float,
        measured: int | None,
    ) -> None:
        """Fit the tokenizer, and set the splits: train, val and test in the order of the text."""
        self.tokenizer = tokenizer()
        self.name = tokenizer.entry.name
        test_start = len(text) - round(test_fraction * len(text))
        val_start = test_start - round(val_fraction * len(text))
        self.fitted_on = text[:val_start]
        self.held_out = text[test_start:][:measured]
        self.tokenizer.fit(chunks(self.fitted_on))
        self.characters = torch.tensor(self.tokenizer.characters())
        self.train = WindowSplit(self.tokens(self.fitted_on), length, tokenizer=self.tokenizer)
        self.val = self.windows(text[val_start:test_start][:measured], length, overlap)
        self.test = self.windows(self.held_out, length, overlap)
        self.in_shape = (length,)
        self.out_shape = (length, self.tokenizer.size)
        self.target = "none"

    def windows(self, text: str, length: int, overlap: float) -> WindowSplit | None:
        """Return a text that is not trained on as overlapping windows; None for an empty text."""
        return WindowSplit(self.tokens(text), length, int(overlap * length)) if text else None

    def tokens(self, text: str) -> Tensor:
        """Return the ids of a text, shape (tokens,)."""
        ids = [self.tokenizer.encode(chunk) for chunk in chunks(text)]
        return torch.cat([torch.tensor(chunk, dtype=torch.int32) for chunk in ids])

    def facts(self) -> dict[str, Any]:
        """Return the fitted tokenizer."""
        return {"tokenizer": self.name, "learned": self.tokenizer.state()}

    @classmethod
    def preparation(cls, facts: dict[str, Any], in_shape: Shape) -> Preparation | None:
        return Tokens(facts, in_shape[0], classifies=False)

    @classmethod
    def show(cls, inputs: Tensor, facts: dict[str, Any]) -> Shown:
        tokenizer = load_tokenizer(facts)
        return Shown({"text": [str(tokenizer.decode(row)) for row in inputs.tolist()]})

    @classmethod
    def encode(cls, text: str, facts: dict[str, Any]) -> Tensor:
        return torch.tensor(load_tokenizer(facts).encode(text), dtype=torch.int64)

    @classmethod
    def decode(cls, tokens: Sequence[int], facts: dict[str, Any]) -> str:
        return str(load_tokenizer(facts).decode(tokens))


def chunks(text: str) -> Iterator[str]:
    """Yield a text in chunks that end with a line, so that no token is cut."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + CHUNK) + 1 or len(text)
        yield text[start:end]
        start = end


@datasets.register("stdlib_source")
class StandardLibrarySource(LanguageData):
    """The source of Python's standard library without its tests. Needs no file.

    The .py files are read in sorted order; they differ a little between versions of Python.

    Args:
        tokenizer: converts text to ids.
        length: tokens of a window.
        overlap: share of a window that is only context, in validation and test.
        val_fraction: share of the text for validation, before the test.
        test_fraction: share of the text for the test, at its end.
        measured: maximum number of characters for validation, and for the test, from their
            start; null for all.
        characters: number of characters to read from the start; null for all.
    """

    def __init__(
        self,
        tokenizer: TokenizerPart = "char",
        length: PositiveInt = 256,
        overlap: Rate = 0.25,
        val_fraction: Rate = 0.01,
        test_fraction: Rate = 0.1,
        measured: PositiveInt | None = 200_000,
        characters: PositiveInt | None = None,
    ):
        library = Path(sysconfig.get_paths()["stdlib"])
        text = ""
        for file in sorted(library.rglob("*.py")):
            if characters is not None and len(text) >= characters:
                break
            if is_source(file.relative_to(library)):
                text += read_source(file)
        if not text:
            raise DataError(
                f"{library} does not have the source of Python's standard library; "
                "use another data set"
            )
        self.split(
            text[:characters], tokenizer, length, overlap, val_fraction, test_fraction, measured
        )


def is_source(file: Path) -> bool:
    """Return whether a file of the library is neither a test nor an installed package."""
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return not excluded & set(file.parts)


def read_source(file: Path) -> str:
    """Return the text of a file, or "" if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


@datasets.register("bible")
class Bible(LanguageData):
    """The King James Bible, 4.4 million characters; the test is Revelation, at its end.

    `scripts/fetch_data bible` downloads the file.

    Args:
        tokenizer: converts text to ids.
        length: tokens of a window.
        overlap: share of a window that is only context, in validation and test.
        val_fraction: share of the text for validation, before the test.
        test_fraction: share of the text for the test, at its end.
        measured: maximum number of characters for validation, and for the test, from their
            start; null for all.
        path: the text file; null: where scripts/fetch_data puts it.
    """

    def __init__(
        self,
        tokenizer: TokenizerPart = "char",
        length: PositiveInt = 256,
        overlap: Rate = 0.25,
        val_fraction: Rate = 0.01,
        test_fraction: Rate = 0.1,
        measured: PositiveInt | None = 200_000,
        path: Path | None = None,
    ):
        path = path.expanduser() if path is not None else cache_folder() / "bible" / "kjv.txt"
        if not path.is_file():
            raise DataError(
                f"{path} does not exist; fetch it with: {fetch_command('bible')} "
                "(data=stdlib_source needs no file)"
            )
        text = read_text(path)
        if not text:
            raise DataError(f"{path} is empty; fetch it again with: {fetch_command('bible')}")
        self.split(text, tokenizer, length, overlap, val_fraction, test_fraction, measured)


@datasets.register("plain_text")
class PlainText(LanguageData):
    """A UTF-8 text file, or a folder of text files.

    The files of a folder are read in sorted order.

    Args:
        path: a file or a folder.
        pattern: the files of a folder to read, at any depth.
        tokenizer: converts text to ids.
        length: tokens of a window.
        overlap: share of a window that is only context, in validation and test.
        val_fraction: share of the text for validation, before the test.
        test_fraction: share of the text for the test, at its end.
        measured: maximum number of characters for validation, and for the test, from their
            start; null for all.
    """

    def __init__(
        self,
        path: Path,
        pattern: str = "*.txt",
        tokenizer: TokenizerPart = "char",
        length: PositiveInt = 256,
        overlap: Rate = 0.25,
        val_fraction: Rate = 0.05,
        test_fraction: Rate = 0.1,
        measured: PositiveInt | None = 200_000,
    ):
        path = path.expanduser()
        files = sorted(path.rglob(pattern)) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path} has no file {pattern}")
        text = "".join(read_text(file) for file in files)
        if not text:
            raise DataError(f"{path} is empty")
        self.split(text, tokenizer, length, overlap, val_fraction, test_fraction, measured)
