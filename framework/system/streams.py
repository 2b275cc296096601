"""The standard streams of a command, whatever the terminal can encode, and when they are closed."""

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any


def prepare_streams() -> None:
    """Let stdout and stderr replace characters that they cannot encode, and discard output to closed ones.

    Python sets a stream that was closed before the start to None. Its descriptor would be given to
    the next file that is opened.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (never closed)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = outlasting(sys.stdout)
    sys.stderr = outlasting(sys.stderr)
    set_errors(sys.stdout, "replace")
    set_errors(sys.stderr, "backslashreplace")


class Terminal(io.FileIO):
    """A terminal, to which writing is possible after it is closed: then the output is discarded."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        return len(data)


def outlasting(stream: Any) -> Any:
    """Return a stream of the standard streams which a terminal that is closed does no harm to."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # the same where PYTHONUNBUFFERED is set
    if type(raw) is not io.FileIO or not raw.isatty():
        return stream
    stream.flush()
    terminal: Any = Terminal(raw.fileno(), "w", closefd=False)
    if raw is not buffer:
        terminal = io.BufferedWriter(terminal)
    return io.TextIOWrapper(
        terminal, stream.encoding, stream.errors, line_buffering=True, write_through=True
    )


def set_errors(stream: Any, errors: str) -> None:
    """Set what a text stream does with a character that it cannot encode."""
    if not hasattr(stream, "reconfigure"):
        return
    if stream.errors == "surrogateescape" and stream.encoding.lower() == "utf-8":
        return  # the bytes of file names that are no UTF-8 are printed as they are
    with suppress(ValueError, OSError):  # a stream that has been closed
        stream.reconfigure(errors=errors)


def silence_broken_streams() -> None:
    """Discard what is not printed yet, after the reader of a pipe has ended.

    Otherwise Python reports an error at exit.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(null, stream.fileno())
