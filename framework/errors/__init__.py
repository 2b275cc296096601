"""Errors of the framework, and texts for their messages."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from reprlib import Repr
from typing import Any, Self

from .terminal import printable, shortened


@dataclass(frozen=True)
class Facts:
    """What is known about a problem besides its text; None for what is not known.

    Attributes:
        setting: the path of a setting, such as "optimizer.lr", or an option, such as "--port".
        value: its value.
        expected: the type, range or choices of a correct value, in words.
        source: where the value was written: "command line", or a file and a line.
        suggestion: a correct name that is similar.
    """

    setting: str | None = None
    value: Any = None
    expected: str | None = None
    source: str | None = None
    suggestion: str | None = None


class Problem(str):
    """A line of a message with the facts about its problem."""

    facts: Facts

    def __new__(cls, text: str, facts: Facts) -> Self:
        problem = super().__new__(cls, text)
        problem.facts = facts
        return problem

    @classmethod
    def of(cls, text: str) -> "Problem":
        """Return a text as a problem, of which nothing else is known if it is only a text."""
        return text if isinstance(text, Problem) else cls(text, Facts())


class FrameworkError(Exception):
    """A user error. The command line prints it without traceback and exits with status 2."""

    exit_status = 2
    facts = Facts()

    def with_facts(self, facts: Facts) -> Self:
        """Set the facts about the problem, and return the error."""
        self.facts = facts
        return self

    def with_text(self, text: str) -> "FrameworkError":
        """Return an error of the same class and attributes with another text.

        `__init__` is not called, because a subclass may take other arguments than a text.
        """
        cls = type(self)
        error = cls.__new__(cls, text)
        error.__dict__.update(vars(self))
        return error


def wrong_option(option: str, value: Any, expected: str) -> FrameworkError:
    """Return the error of an option of a command that has a wrong value.

    Args:
        option: such as "--points".
        value: its value.
        expected: the type, range or choices of a correct value, in words.
    """
    error = FrameworkError(f"{option} {value}: expected {expected}")
    return error.with_facts(Facts(option, value, expected))


class UnknownName(FrameworkError):
    """No part of a kind has this name."""


class DuplicateName(FrameworkError):
    """Two parts of a kind are registered under one name."""


class ContractError(FrameworkError):
    """A part violates the contract of its kind: a wrong signature or base class."""


class SettingError(FrameworkError):
    """The value of a setting has a wrong type or is out of range, or the setting does not exist."""


class ConfigError(FrameworkError):
    """The composed experiment has problems.

    Args:
        problems: all of them, one line each.
    """

    def __init__(self, problems: Iterable[str]):
        self.problems: list[str] = []
        for problem in problems:
            text = printable(problem)
            if isinstance(problem, Problem):
                text = Problem(text, problem.facts)
            self.problems.append(text)
        super().__init__("\n".join(self.problems))

    def with_text(self, text: str) -> "ConfigError":
        return ConfigError(text.splitlines())


def problems_of(error: FrameworkError) -> list[Problem]:
    """Return the problems of an error: those of a ConfigError, otherwise one."""
    if not isinstance(error, ConfigError) or not error.problems:
        return [Problem(str(error) or type(error).__name__, error.facts)]
    return [Problem.of(text) for text in error.problems]


class PluginError(FrameworkError):
    """A plugin file or package could not be loaded."""


class PartExit(FrameworkError):
    """The code of a part calls `sys.exit`."""


class DataError(FrameworkError):
    """Data is missing, empty, unreadable or does not fit the task or the model."""


class BuildError(FrameworkError):
    """A part cannot be built with these settings or shapes."""


class RunError(FrameworkError):
    """A run folder is missing, in use, not writable or damaged."""


class DiskFull(RunError):
    """The disk is full. It ends a sweep; a resumed sweep trains the trial again."""


class CheckpointError(FrameworkError):
    """A checkpoint cannot be written or is damaged."""


class CheckpointDiskFull(CheckpointError, DiskFull):
    """The disk is full, so that a checkpoint cannot be written."""


class ShortRepr(Repr):
    """Shows plain values as Python writes them, and other objects by their name or type.

    The limits keep the text of a large collection cheap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = 10
        self.maxlist = 20
        self.maxtuple = 20
        self.maxstring = 60

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, Enum):
            return str(x)
        if isinstance(x, str):
            return self.repr_str(str(x), level)
        if isinstance(x, int | float | complex | PurePath | None):
            return repr(x)
        if isinstance(x, tuple):
            return self.repr_tuple(tuple(x), level)
        if isinstance(x, list):
            return self.repr_list(list(x), level)
        name = getattr(x, "__name__", None)  # of a class or function
        if isinstance(name, str):
            return name
        return with_article(type(x).__name__)


SHORT = ShortRepr()


def short(value: object, most: int = 60, quote: bool = True) -> str:
    """Return a value for a message: `'fast'`, `[1, 2]`, `relu` for a function, `a Tensor`.

    Args:
        value: any object.
        most: the largest number of characters; the middle of a longer text is left out.
        quote: show a text in quotation marks.
    """
    if isinstance(value, str) and not quote:
        return shortened(value, most)
    return shortened(SHORT.repr(value), most)


def nearest(word: str, options: Iterable[str]) -> str | None:
    """Return the option that is most similar to `word`; None if none is similar.

    Upper case, hyphens and underscores do not count: "LeakyReLU" is similar to "leaky_relu".
    """
    by_letters = {letters(option): str(option) for option in options}
    close = difflib.get_close_matches(letters(word), by_letters, n=1, cutoff=0.55)
    return by_letters[close[0]] if close else None


def letters(word: object) -> str:
    """Return a name in lower case without hyphens and underscores."""
    return str(word).lower().replace("-", "").replace("_", "")


def did_you_mean(word: str, options: Iterable[str], most: int = 12) -> str:
    """Return "did you mean 'x'?" if an option is similar to `word`, else the list of options.

    Args:
        word: an unknown name.
        options: the known names.
        most: how many of them are listed.
    """
    options = sorted(options)
    close = nearest(word, options)
    if close is not None:
        return f"did you mean {close!r}?"
    if not options:
        return "none is available"
    more = ", ..." if len(options) > most else ""
    return f"available: {', '.join(options[:most])}{more}"


def suggestion(word: str, options: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" if an option is similar to `word`, else ""."""
    close = nearest(word, options)
    return "" if close is None else f"; did you mean {close!r}?"


def with_article(noun: str) -> str:
    """Return a noun with "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiouAEIOU" else f"a {noun}"
