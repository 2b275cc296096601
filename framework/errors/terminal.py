"""Text for the terminal. Names and values from files, which may come from a stranger, cannot control it.

Every text that a command prints passes through `printable` (one line) or `printable_lines` (text with line breaks of
its own). Escaped, as in a Python string, are control characters, characters that separate lines, and characters that
are not shown or that change the direction of a line.
"""

import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

LONGEST_WORD = 300  # characters of a word in a message
LONGEST_NAME = 60  # characters of a name in a table
LONGEST_LINE = 2_000  # characters of a line of a message
MOST_LINES = 50  # lines of a message

# Control characters, U+2028 and U+2029, and what Unicode calls "default ignorable", save the variation selectors
# 15 and 16 of emoji and the joiners.
HIDDEN = (
    r"\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e"
    r"\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff"
)
# Joiners are letters of words in Persian and in Indian scripts, and of emoji; beside Latin letters they only hide.
JOINER = r"(?<![^\x00-\u02ff])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\u02ff])"
# Halves of surrogate pairs; those of bytes of file names that are no UTF-8 are kept, except for control characters.
SURROGATE = r"[\ud800-\udc9f\udd00-\udfff]"
UNSAFE = re.compile(f"[{HIDDEN}]|{JOINER}|{SURROGATE}")
BYTES = re.compile(r"[\udc80-\udcff]{2,}")
WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")
COMPLETED = re.compile(r"[\w+~.=/,:@%\[\]-]+")


def printable(text: object) -> str:
    """Return a text on one line, with everything escaped that could control a terminal or forge a line."""
    plain = str(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return UNSAFE.sub(escape, joined(plain))


def printable_lines(text: object) -> str:
    """Return a text with its own line breaks and tabs; everything else is escaped as by `printable`."""
    lines = str(text).replace("\r\n", "\n").split("\n")
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines)


def joined(text: str) -> str:
    """Return a text in which bytes that stand one by one, as surrogates, are the character that they encode."""
    return BYTES.sub(
        lambda run: run[0].encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape"),
        text,
    )


def escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def shortened(text: object, most: int = LONGEST_WORD) -> str:
    """Return a text of at most so many characters: of a longer one the beginning and the end, with ... between."""
    plain = str(text)
    if len(plain) <= most:
        return plain
    end = most // 3
    return f"{plain[: most - end - 3]}...{plain[len(plain) - end :]}"


def title(name: object) -> str:
    """Return a name as a table shows it: printable and shortened."""
    return shortened(printable(name), LONGEST_NAME)


def message_line(text: object) -> str:
    """Return a line of a message: printable, with long words and long lines shortened in the middle."""
    words = WORD.sub(
        lambda word: shortened(word[0]), printable(shortened(text, 100 * LONGEST_LINE))
    )
    return shortened(words, LONGEST_LINE)


def message_lines(texts: list[str]) -> list[str]:
    """Return the lines of a message, at most `MOST_LINES` of them."""
    left_out = len(texts) - MOST_LINES
    lines = [message_line(text) for text in texts[:MOST_LINES]]
    return [*lines, f"... and {left_out:,} more"] if left_out > 0 else lines


def print_line(text: object = "", file: IO[str] | None = None, flush: bool = False) -> None:
    """Print a text on one line, to stdout if no file is given."""
    print(printable(text), file=file or sys.stdout, flush=flush)


def print_message(text: object) -> None:
    """Print a line of a message on stdout."""
    print(message_line(text), flush=True)


def print_note(text: object) -> None:
    """Print a line of a message on stderr."""
    print(message_line(text), file=sys.stderr, flush=True)


def note(text: object) -> None:
    """Print a note of a command on stderr, as a line that names the program."""
    print_note(f"framework: {text}")


def completed(words: list[str]) -> list[str]:
    """Return the words that TAB may put on a command line: those in which a shell finds nothing to execute."""
    return [word for word in words if COMPLETED.fullmatch(word) and printable(word) == word]


def print_traceback(error: BaseException) -> None:
    """Print an error with its traceback on stderr. Lines of its message are indented."""
    for part in traceback.format_exception(error):
        lines = printable_lines(part).split("\n")
        if not part.startswith("\n"):  # otherwise it says how two errors belong together
            lines[1:] = [
                line if line[:1].isspace() or not line else f"    {line}" for line in lines[1:]
            ]
        print("\n".join(lines), end="", file=sys.stderr)
    sys.stderr.flush()


def is_own(filename: str) -> bool:
    """Whether a file is one of this package or of the built-in plugins."""
    plugins = sys.modules.get("framework_plugins")
    folders = [os.path.dirname(os.path.dirname(__file__)), *getattr(plugins, "__path__", ())]
    return any(filename.startswith(os.path.join(folder, "")) for folder in folders)


@contextmanager
def printable_warnings() -> Iterator[None]:
    """Print warnings without what could control the terminal; those of this package as a line without its source."""
    before = warnings.formatwarning

    def formatted(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ):
        if is_own(filename):
            return message_line(f"framework: warning: {message}") + "\n"
        source = None if line is None else printable(line)
        text = before(message_line(message), category, printable(filename), lineno, source)  # type: ignore[arg-type]
        return printable_lines(text)

    warnings.formatwarning = formatted  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = before
