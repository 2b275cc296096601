"""Where an error in user code arose, and how it is shown in one line.

User code is every part, callback, data set or script that is not the framework's own. An error of
it, whatever its type, is shown as

    ValueError: the width is odd (mine.py:15 in forward)

The line is the innermost one of the user's own files, not that of a library which they call.
"""

import linecache
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

from . import BuildError, FrameworkError
from .paths import shorter

OWN = ("framework", "framework_plugins")
LONGEST = 300  # characters of an error's text
PYTHON = sysconfig.get_path("stdlib")
INSTALLED = ("/site-packages/", "/dist-packages/")
DEPENDENCIES = {
    "_pytest",
    "hydra",
    "joblib",
    "numpy",
    "omegaconf",
    "optuna",
    "pandas",
    "PIL",
    "pluggy",
    "pyarrow",
    "pytest",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "soundfile",
    "submitit",
    "tensorboard",
    "tokenizers",
    "torch",
}
"""Installed packages whose lines tell a user nothing of their own code."""


class Place(NamedTuple):
    """A line of a file, and the function that it is in ("" at module level)."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        within = f" in {self.function}" if self.function else ""
        file = shorter(self.file)
        for folder in INSTALLED:
            file = file.rpartition(folder)[2]
        return f"{file}:{self.line}{within}"


def user_place(error: BaseException) -> Place | None:
    """Return the innermost line of user code that an error went through; None if there is none.

    The user's own files come first, then installed packages of third parties.
    """
    if isinstance(error, SyntaxError) and Path(error.filename or "").is_file():
        return Place(str(error.filename), error.lineno or 1)
    own: Place | None = None
    third_party: Place | None = None
    for frame, line in frames(error):
        owner = owner_of(frame)
        if owner == "user":
            own = place_of(frame, line)
        if owner == "third party":
            third_party = place_of(frame, line)
    if own is not None or third_party is not None:
        return own or third_party
    inner = [*error.exceptions] if isinstance(error, BaseExceptionGroup) else []
    causes = [*inner, error.__cause__]
    found = [user_place(cause) for cause in causes if cause is not None]
    return next((place for place in found if place is not None), None)


def internal_place(error: BaseException) -> Place | None:
    """Return the innermost line of the framework that an error went through."""
    found: Place | None = None
    for frame, line in frames(error):
        if owner_of(frame) == "framework":
            found = place_of(frame, line)
    return found


def frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Yield the frames of an error's traceback with their lines, the innermost last."""
    step: TracebackType | None = error.__traceback__
    while step is not None:
        yield step.tb_frame, step.tb_lineno
        step = step.tb_next


def owner_of(frame: FrameType) -> str:
    """Return whose code a frame runs: "user", "third party", "framework" or "library"."""
    file = frame.f_code.co_filename
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if package in OWN:
        return "framework"
    if file.startswith("<"):  # code that is made at run time, of which there is no line to show
        return "library"
    if any(folder in file for folder in INSTALLED):
        return "library" if package in DEPENDENCIES else "third party"
    return "library" if file.startswith(PYTHON) else "user"


def place_of(frame: FrameType, line: int) -> Place:
    function = frame.f_code.co_name
    return Place(frame.f_code.co_filename, line, "" if function == "<module>" else function)


def text_of(error: BaseException) -> str:
    """Return an error's text on one line; it does not fail where the error's own `__str__` does."""
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception as failure:
        return f"no text, since its __str__ raises {type(failure).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def describe(error: BaseException) -> str:
    """Return an error with its place in user code: "KeyError: 'a' (mine.py:3 in step)"."""
    said = text_of(error)
    if isinstance(error, FrameworkError):
        return said
    place = user_place(error)
    if not said and place is not None:
        said = linecache.getline(place.file, place.line).strip()  # a bare assert says nothing else
    if isinstance(error, BaseExceptionGroup):
        said = f"{said}, the first: {describe(error.exceptions[0])}"
    name = type(error).__name__
    described = f"{name}: {said}" if said else name
    return described if place is None else f"{described} ({place})"


def reason_of(error: BaseException) -> str:
    """Return the error as `describe` shows it or, if no user code is involved, its text alone."""
    if user_place(error) is not None:
        return describe(error)
    return text_of(error) or type(error).__name__


@contextmanager
def user_errors(doing: str = "", kind: type[FrameworkError] = BuildError) -> Iterator[None]:
    """Raise an error of user code as a FrameworkError that says where it arose; other errors pass.

    Args:
        doing: what the framework was doing, such as "reading the first sample".
        kind: the class of the error that is raised.
    """
    try:
        yield
    except FrameworkError:
        raise
    except Exception as error:
        if user_place(error) is None:
            raise
        situation = f", while {doing}" if doing else ""
        raise kind(f"{describe(error)}{situation}") from error
