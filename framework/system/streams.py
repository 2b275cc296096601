"""Standard streams that cannot encode a character, or are closed."""

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any


def prepare_streams() -> None:
    """Make stdout and stderr replace characters that they cannot encode; discard output if closed.

    A closed stdin is empty.

    Python sets a stream that was closed before the start to None. The next opened file would get
    its descriptor.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # never closed
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # never closed
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # never closed
    sys.stdout = closable(sys.stdout)
    sys.stderr = closable(sys.stderr)
    set_errors(sys.stdout, "replace")
    set_errors(sys.stderr, "backslashreplace")


class Terminal(io.FileIO):
    """A terminal; output after it is closed is discarded."""

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


def closable(stream: Any) -> Any:
    """Return a standard stream that ignores that its terminal is closed."""
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
    """Set the handling of characters that a text stream cannot encode: "replace", for example."""
    if not hasattr(stream, "reconfigure"):
        return
    if stream.errors == "surrogateescape" and stream.encoding.lower() == "utf-8":
        return  # bytes of file names that are not UTF-8 are printed unchanged
    with suppress(ValueError, OSError):  # the stream is closed
        stream.reconfigure(errors=errors)


def silence_broken_streams() -> None:
    """Discard buffered output after the reader of a pipe has ended.

    Otherwise Python reports an error at exit.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(null, stream.fileno())
