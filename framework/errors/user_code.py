"""Errors of user code, shown in one line with their place.

User code is every part, callback, data set or script outside of the framework. Its errors, of any
type, are shown as

    ValueError: the width is odd (mine.py:15 in forward)

The place is the innermost line of the user's own files, not a line of a library that they call.
"""

import linecache
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple

from . import BuildError, FrameworkError
from .paths import INSTALLED, in_package
from .terminal import shortened

OWN_PACKAGES = ("framework", "framework_plugins")
LONGEST_TEXT = 300  # characters of an error's text
PYTHON = sysconfig.get_path("stdlib")
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
"""Installed packages that are not user code."""


class Place(NamedTuple):
    """A line of a file and its function ("" at module level)."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        place = f"{in_package(self.file)}:{self.line}"
        return f"{place} in {self.function}" if self.function else place


def user_place(error: BaseException) -> Place | None:
    """Return the innermost line of user code in the traceback of an error; None if there is none.

    The user's own files have priority over installed packages of third parties. An error without
    user code has the place of its cause, or of an error in the group.
    """
    if isinstance(error, SyntaxError) and Path(error.filename or "").is_file():
        return Place(str(error.filename), error.lineno or 1)
    own: Place | None = None
    third_party: Place | None = None
    for frame, line in frames(error):
        owner = owner_of(frame)
        if owner == "user":
            own = place_of(frame, line)
        elif owner == "third party":
            third_party = place_of(frame, line)
    place = own or third_party
    if place is not None:
        return place
    causes: list[BaseException] = []
    if isinstance(error, BaseExceptionGroup):
        causes += error.exceptions
    if error.__cause__ is not None:
        causes.append(error.__cause__)
    for cause in causes:
        place = user_place(cause)
        if place is not None:
            return place
    return None


def internal_place(error: BaseException) -> Place | None:
    """Return the innermost line of the framework in the traceback of an error."""
    place: Place | None = None
    for frame, line in frames(error):
        if owner_of(frame) == "framework":
            place = place_of(frame, line)
    return place


def frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Yield the frames of an error's traceback and their line numbers, the innermost last."""
    step: TracebackType | None = error.__traceback__
    while step is not None:
        yield step.tb_frame, step.tb_lineno
        step = step.tb_next


def owner_of(frame: FrameType) -> str:
    """Return the owner of a frame's code: "user", "third party", "framework" or "library"."""
    file = frame.f_code.co_filename
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if package in OWN_PACKAGES:
        return "framework"
    if file.startswith("<"):  # generated at run time: there is no line to show
        return "library"
    if any(folder in file for folder in INSTALLED):
        return "library" if package in DEPENDENCIES else "third party"
    return "library" if file.startswith(PYTHON) else "user"


def place_of(frame: FrameType, line: int) -> Place:
    """Return the place of a line in a frame."""
    function = frame.f_code.co_name
    return Place(frame.f_code.co_filename, line, "" if function == "<module>" else function)


def text_of(error: BaseException) -> str:
    """Return an error's text on one line, shortened, also if its own `__str__` fails."""
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception as failure:
        return f"no text, since its __str__ raises {type(failure).__name__}"
    return shortened(" ".join(text.split()), LONGEST_TEXT)


def describe(error: BaseException) -> str:
    """Return an error with its place in user code: "KeyError: 'a' (mine.py:3 in step)"."""
    text = text_of(error)
    if isinstance(error, FrameworkError):
        return text
    place = user_place(error)
    if not text and place is not None:
        text = linecache.getline(place.file, place.line).strip()  # the condition of a bare assert
    if isinstance(error, BaseExceptionGroup):
        text = f"{text}, the first: {describe(error.exceptions[0])}"
    description = type(error).__name__
    if text:
        description += f": {text}"
    if place is not None:
        description += f" ({place})"
    return description


def reason_of(error: BaseException) -> str:
    """Return the error as `describe` shows it; without user code, only its text."""
    if user_place(error) is not None:
        return describe(error)
    return text_of(error) or type(error).__name__


@contextmanager
def user_errors(doing: str = "", kind: type[FrameworkError] = BuildError) -> Iterator[None]:
    """Raise an error of user code as a FrameworkError with its place; other errors pass unchanged.

    Args:
        doing: the activity of the framework, such as "reading the first sample".
        kind: the class of the raised error.
    """
    try:
        yield
    except FrameworkError:
        raise
    except Exception as error:
        if user_place(error) is None:
            raise
        message = describe(error)
        if doing:
            message += f", while {doing}"
        raise kind(message) from error
