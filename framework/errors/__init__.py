"""What a person did that cannot be done, in words for the person at the terminal."""

import difflib
from collections.abc import Iterable

from .terminal import printable


class FrameworkError(Exception):
    """A mistake that its maker can mend; the command line prints it without a traceback and exits with 2."""

    exit_status = 2

    def with_text(self, text: str) -> "FrameworkError":
        """Return an error of the same class and attributes with another text.

        It does not call `__init__`, which may take other arguments than a text.
        """
        cls = type(self)
        error = cls.__new__(cls, text)
        error.__dict__.update(vars(self))
        return error


class UnknownName(FrameworkError):
    """No part of that kind has this name."""


class DuplicateName(FrameworkError):
    """Two files registered a part of one kind under one name."""


class ContractError(FrameworkError):
    """A part does not keep the contract of its kind (a wrong signature, a wrong base class)."""


class SettingError(FrameworkError):
    """A setting has a value that its type, range or choices forbid, or no part has such a setting."""


class ConfigError(FrameworkError):
    """The composed experiment has problems; `problems` holds all of them, one line each."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(map(printable, problems))
        super().__init__("\n".join(self.problems))

    def with_text(self, text: str) -> "ConfigError":
        return ConfigError(text.splitlines())


class PluginError(FrameworkError):
    """A plugin file or package could not be loaded."""


class PartExit(FrameworkError):
    """Code of a part calls `sys.exit`."""


class DataError(FrameworkError):
    """Data is missing, empty, unreadable or does not fit the task or the model."""


class BuildError(FrameworkError):
    """A part refused the settings or the shapes that it was given."""


class RunError(FrameworkError):
    """A run folder is missing, taken, unwritable or not what it should be."""


class DiskFull(RunError):
    """A disk has no room. A sweep ends then, and trains the trial again when it is resumed."""


class CheckpointError(FrameworkError):
    """A checkpoint cannot be written, or does not verify."""


class CheckpointDiskFull(CheckpointError, DiskFull):
    """A disk has no room for a checkpoint."""


def nearest(word: str, options: Iterable[str]) -> str | None:
    """Return the option that looks most like `word` ("LeakyReLU" like "leaky_relu"), or None when none is close."""
    by_letters = {plain(option): str(option) for option in options}
    close = difflib.get_close_matches(plain(word), by_letters, n=1, cutoff=0.55)
    return by_letters[close[0]] if close else None


def plain(word: object) -> str:
    return str(word).lower().replace("-", "").replace("_", "")


def short(value: object) -> str:
    """Return a value as it is written, or what it is, for a message."""
    plain = isinstance(value, str | int | float | list | tuple | None)
    return repr(value)[:60] if plain else getattr(value, "__name__", f"a {type(value).__name__}")


def did_you_mean(word: str, options: Iterable[str], most: int = 12) -> str:
    """Return "did you mean 'x'?" when one option is close, else the list of options."""
    options = sorted(options)
    close = nearest(word, options)
    if close is not None:
        return f"did you mean {close!r}?"
    listed = ", ".join(options[:most]) + (", ..." if len(options) > most else "")
    return f"there is: {listed}" if options else "there is none"
