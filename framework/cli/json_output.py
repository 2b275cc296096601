"""`--json`: standard output has one JSON document; everything else goes to standard error.

    with json_output(wanted=True) as output:
        print("a note")               # to standard error
        print_json({"value": 1.0})
        output.write(status=0)

Each document is an object whose first key is `schema`, the version of all documents. JSON has
neither NaN nor infinity; they become null.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any, TextIO

from framework.errors import Facts, FrameworkError, Problem, problems_of

OPTION = "--json"
SCHEMA = 1  # of all documents; a key that is removed or changes its meaning raises it


class JsonOutput:
    """The document of one command.

    Attributes:
        document: what the command prints, without `schema`; None before that.
        indent: of its lines, see `print_json`.
        error: the error that ended the command, if any; see `error_as_dict`.
        is_main: whether this process prints; of several processes of a run only one does.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.document: dict[str, Any] | None = None
        self.indent: int | None = 2
        self.error: dict[str, Any] | None = None
        self.is_main = True

    def write(self, status: int) -> None:
        """Write the document, with the error if there is one.

        Args:
            status: the exit status; one other than 0 without a document is an error.

        Raises:
            BrokenPipeError: the reader has ended.
        """
        document = self.document
        error = self.error
        if document is None and error is None and self.is_main and status:
            error = error_as_dict(Interrupted(f"ended with exit status {status}"), status)
        if error is not None:
            document = (document or {}) | {"error": error}
        if document is not None:
            self.stream.write(as_json({"schema": SCHEMA} | document, self.indent) + "\n")
            self.stream.flush()


class Interrupted(FrameworkError):
    """A signal ended the command before it had a result."""


OUTPUT: ContextVar[JsonOutput | None] = ContextVar("OUTPUT", default=None)


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for JSON; help is always text."""
    is_help = "--help" in arguments or "-h" in arguments or arguments[:1] == ["help"]
    is_internal = arguments[:1] in (["complete"], ["process"])
    return OPTION in arguments and not is_help and not is_internal


@contextmanager
def json_output(wanted: bool) -> Iterator[JsonOutput | None]:
    """Send all output to standard error in a block, also that of child processes.

    Args:
        wanted: yield None and change nothing if false.
    """
    if not wanted:
        yield None
        return
    with own_stdout() as stream, redirect_stdout(sys.stderr):
        output = JsonOutput(stream)
        token = OUTPUT.set(output)
        try:
            yield output
        finally:
            OUTPUT.reset(token)


@contextmanager
def own_stdout() -> Iterator[TextIO]:
    """Yield a stream to standard output, whose descriptor is that of standard error in a block."""
    try:
        is_standard = (sys.stdout.fileno(), sys.stderr.fileno()) == (1, 2)
    except (OSError, ValueError):  # a stream in memory
        is_standard = False
    if not is_standard:
        yield sys.stdout
        return
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    stream = open(saved, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # closed below
    try:
        yield stream
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def print_json(document: dict[str, Any], indent: int | None = 2) -> None:
    """Print the document of a command at its end if it has `--json`; a later one replaces it.

    Args:
        document: of dicts, lists, dataclasses, paths, texts and numbers; without `schema`.
        indent: of the lines; None for one line, which takes a third of the time.
    """
    output = OUTPUT.get()
    if output is not None:
        output.document = document
        output.indent = indent


def as_json(document: Any, indent: int | None = 2) -> str:
    """Return a document as JSON; see `print_json` for the arguments."""
    try:
        return json.dumps(document, indent=indent, default=plain, allow_nan=False)
    except (ValueError, TypeError):  # NaN, infinity or a date as a key: `finite` copies all
        return json.dumps(finite(document), indent=indent, default=plain)


def plain(value: Any) -> Any:
    """Return an object that JSON does not have as a dict, list, number or text."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # of numpy or torch
        return value.tolist()
    return str(value)


def finite(value: Any) -> Any:
    """Return a copy of a document in which NaN and infinity are None, and keys are of JSON."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        copied = {}
        for key, item in value.items():
            is_key = key is None or isinstance(key, str | int | float)
            copied[key if is_key else str(key)] = finite(item)
        return copied
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return finite(plain(value))


# errors


def record_error(error: Exception, status: int, text: str) -> None:
    """Add the error that ends a command to its document; see `error_as_dict`."""
    output = OUTPUT.get()
    if output is not None:
        output.error = error_as_dict(error, status, text)


def error_as_dict(error: Exception, status: int, text: str = "") -> dict[str, Any]:
    """Return an error for JSON: the facts of its first problem, and a list of all problems.

    Args:
        error: the error.
        status: the exit status.
        text: the message of an error that is not a FrameworkError.
    """
    if isinstance(error, FrameworkError):
        problems = [problem_as_dict(problem) for problem in problems_of(error)]
    else:
        problems = [problem_as_dict(Problem(text or str(error), Facts()))]
    about = {"type": type(error).__name__, "exit_status": status, "problems": problems}
    return problems[0] | about


def problem_as_dict(problem: Problem) -> dict[str, Any]:
    """Return a problem for JSON: `message` and the facts."""
    return {"message": str(problem)} | asdict(problem.facts)
