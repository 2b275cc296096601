"""Long texts to learn a language model from: Python's standard library, the Bible, files of your own."""

import math
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from framework import Data, DataError, PartOf, PositiveInt, Rate, Registry, WindowSplit, datasets
from framework_plugins.datasets.readers.arrays import cache_folder, fetching
from framework_plugins.datasets.readers.data_files import read_text

Tokens = Annotated[Callable[..., Any], PartOf("tokenizer")]
PIECE = 50_000  # characters that are made into tokens at once


class LanguageData(Data):
    """One text, cut into training, validation and test in its order; inputs are windows of tokens, (length,).

    The targets are the same windows one token on (see `WindowSplit`); the target is "none", for there is nothing beside
    the text. The tokenizer is fitted on the training part and kept in the run, for `predict --prompt`; what it does not
    know of a prompt (characters that training has not) is the unknown token, which is shown as �.

    Attributes:
        characters: how many characters each token stands for, shape (vocabulary,): a figure per character needs it.
        fitted_on, held_out: the characters of the training and of the test split.
    """

    characters: Tensor

    def learn(
        self,
        text: str,
        tokenizer: Tokens,
        length: int,
        overlap: float,
        val_fraction: float,
        test_fraction: float,
        measured: int | None,
    ) -> None:
        """Set the attributes of Data; the test split is the end of the text, the validation split lies before it."""
        self.tokenizer, self.name = tokenizer(), tokenizer.entry.name  # type: ignore[attr-defined]
        test = len(text) - round(test_fraction * len(text))
        val = test - round(val_fraction * len(text))
        self.fitted_on, self.held_out = text[:val], text[test:][:measured]
        self.tokenizer.fit(pieces(self.fitted_on))
        self.characters = torch.tensor(self.tokenizer.characters())
        self.train = WindowSplit(self.tokens(self.fitted_on), length, tokenizer=self.tokenizer)
        shared = int(overlap * length)
        for part, cut in (("val", text[val:test][:measured]), ("test", self.held_out)):
            setattr(self, part, WindowSplit(self.tokens(cut), length, shared) if cut else None)
        self.in_shape, self.out_shape, self.target = (
            (length,),
            (length, self.tokenizer.size),
            "none",
        )

    def tokens(self, text: str) -> Tensor:
        """Return a text's ids as one row."""
        return torch.cat(
            [
                torch.tensor(self.tokenizer.encode(piece), dtype=torch.int32)
                for piece in pieces(text)
            ]
        )

    def facts(self) -> dict[str, Any]:
        """Return the tokenizer with all that it has learned."""
        return {"tokenizer": self.name, "learned": self.tokenizer.state()}

    @classmethod
    def encode(cls, text: str, facts: dict[str, Any]) -> Tensor:
        return torch.tensor(known_tokenizer(facts).encode(text), dtype=torch.int64)

    @classmethod
    def decode(cls, tokens: Sequence[int], facts: dict[str, Any]) -> str:
        return known_tokenizer(facts).decode(tokens)


def known_tokenizer(facts: dict[str, Any]) -> Any:
    tokenizer = Registry.every["tokenizer"].build(facts["tokenizer"])
    tokenizer.load(facts["learned"])
    return tokenizer


def pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces that end with a line, so that no token is cut."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


@datasets.register("stdlib_source")
class StandardLibrarySource(LanguageData):
    """The source of Python's standard library without its tests, module after module. Needs no file."""

    def __init__(
        self,
        tokenizer: Tokens = "char",
        length: PositiveInt = 256,
        overlap: Rate = 0.25,
        val_fraction: Rate = 0.01,
        test_fraction: Rate = 0.1,
        measured: PositiveInt | None = 200_000,
        characters: PositiveInt | None = None,
    ):
        """Read the .py files in the order of their names; what they are differs a little between versions of Python.

        Args:
            tokenizer: what makes ids of text.
            length: tokens of a window.
            overlap: share of a window that only gives context, where it is measured.
            val_fraction: share of the text for validation, before the test.
            test_fraction: share of the text that is held out for the test, at its end.
            measured: most characters of what is held out that are measured, from the first on; null for all.
            characters: how much of the text to take, from its beginning; null for all.
        """
        library = Path(sysconfig.get_paths()["stdlib"])
        text = ""
        for file in sorted(library.rglob("*.py")):
            if is_source(file.relative_to(library)) and len(text) < (characters or math.inf):
                text += read(file)
        if not text:
            raise DataError(
                f"{library} has not the source of Python's standard library; take another data=..."
            )
        self.learn(
            text[:characters], tokenizer, length, overlap, val_fraction, test_fraction, measured
        )


def is_source(file: Path) -> bool:
    others = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return not others & set(file.parts)


def read(file: Path) -> str:
    """Return a text, or nothing where it is no UTF-8 (some files of the library are so on purpose)."""
    try:
        return file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


@datasets.register("bible")
class Bible(LanguageData):
    """The King James Bible, 4.4 million characters (`scripts/fetch_data bible`); Revelation is at its end."""

    def __init__(
        self,
        tokenizer: Tokens = "char",
        length: PositiveInt = 256,
        overlap: Rate = 0.25,
        val_fraction: Rate = 0.01,
        test_fraction: Rate = 0.1,
        measured: PositiveInt | None = 200_000,
        path: Path | None = None,
    ):
        """Read the text.

        Args:
            tokenizer: what makes ids of text.
            length: tokens of a window.
            overlap: share of a window that only gives context, where it is measured.
            val_fraction: share of the text for validation, before the test.
            test_fraction: share of the text that is held out for the test, at its end.
            measured: most characters of what is held out that are measured, from the first on; null for all.
            path: the text; null: where scripts/fetch_data puts it.
        """
        path = path.expanduser() if path is not None else cache_folder() / "bible" / "kjv.txt"
        if not path.is_file():
            raise DataError(
                f"there is no {path}; fetch it ({fetching('bible')}), or take data=stdlib_source"
            )
        text = read_text(path)
        if not text:
            raise DataError(f"{path} is empty; fetch it again ({fetching('bible')})")
        self.learn(text, tokenizer, length, overlap, val_fraction, test_fraction, measured)


@datasets.register("plain_text")
class PlainText(LanguageData):
    """A text file of your own, or a folder of them, UTF-8."""

    def __init__(
        self,
        path: Path,
        pattern: str = "*.txt",
        tokenizer: Tokens = "char",
        length: PositiveInt = 256,
        overlap: Rate = 0.25,
        val_fraction: Rate = 0.05,
        test_fraction: Rate = 0.1,
        measured: PositiveInt | None = 200_000,
    ):
        """Read the file, or the files in the order of their names.

        Args:
            path: a file or a folder.
            pattern: which files of a folder, at any depth.
            tokenizer: what makes ids of text.
            length: tokens of a window.
            overlap: share of a window that only gives context, where it is measured.
            val_fraction: share of the text for validation, before the test.
            test_fraction: share of the text that is held out for the test, at its end.
            measured: most characters of what is held out that are measured, from the first on; null for all.
        """
        path = path.expanduser()
        files = sorted(path.rglob(pattern)) if path.is_dir() else [path]
        if not files:
            raise DataError(f"{path} has no {pattern}")
        text = "".join(read_text(file) for file in files)
        if not text:
            raise DataError(f"{path} is empty")
        self.learn(text, tokenizer, length, overlap, val_fraction, test_fraction, measured)
