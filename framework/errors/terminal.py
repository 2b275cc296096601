"""Safe text for the terminal: names and values from untrusted files cannot control it.

Every text that a command prints passes through `printable` (one line) or `printable_lines` (text
with its own line breaks). They escape, as in a Python string, control characters, characters that
separate lines, and characters that are invisible or change the direction of a line.
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

# Control characters, U+2028 and U+2029, and the "default ignorable" characters of Unicode, except
# the joiners and the variation selectors 15 and 16 of emoji.
HIDDEN = (
    r"\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    r"\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# Joiners belong to words in Persian and in Indian scripts, and to emoji. Next to Latin letters they
# are only invisible.
JOINER = r"(?<![^\x00-\u02ff])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\u02ff])"
# Halves of surrogate pairs. Those that stand for bytes of file names that are not UTF-8 are kept,
# except for control characters.
SURROGATE = r"[\ud800-\udc9f\udd00-\udfff]"
UNSAFE = re.compile(f"[{HIDDEN}]|{JOINER}|{SURROGATE}")
BYTES = re.compile(r"[\udc80-\udcff]{2,}")
WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")
COMPLETED = re.compile(r"[\w+~.=/,:@%\[\]-]+")


def printable(text: object) -> str:
    """Return a text on one line, with all characters escaped that could control a terminal."""
    plain = str(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return UNSAFE.sub(escape, decode_bytes(plain))


def printable_lines(text: object) -> str:
    """Return a text with its own line breaks and tabs; `printable` escapes everything else."""
    lines = str(text).replace("\r\n", "\n").split("\n")
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in lines)


def decode_bytes(text: str) -> str:
    """Return a text with surrogates that stand for single bytes of UTF-8 decoded."""

    def decode(match: re.Match[str]) -> str:
        return match[0].encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")

    return BYTES.sub(decode, text)


def escape(match: re.Match[str]) -> str:
    """Return a character as in a Python string."""
    return match[0].encode("unicode_escape").decode("ascii")


def shortened(text: object, most: int = LONGEST_WORD) -> str:
    """Return a text of at most `most` characters; the middle of a longer one becomes "..."."""
    plain = str(text)
    if len(plain) <= most:
        return plain
    end = most // 3
    return f"{plain[: most - end - 3]}...{plain[len(plain) - end :]}"


def title(name: object) -> str:
    """Return a name as a table shows it: printable and shortened."""
    return shortened(printable(name), LONGEST_NAME)


def message_line(text: object) -> str:
    """Return a line of a message: printable, with long words and long lines shortened."""
    line = printable(shortened(text, 100 * LONGEST_LINE))
    line = WORD.sub(lambda word: shortened(word[0]), line)
    return shortened(line, LONGEST_LINE)


def message_lines(texts: list[str]) -> list[str]:
    """Return the lines of a message, at most `MOST_LINES` of them."""
    lines = [message_line(text) for text in texts[:MOST_LINES]]
    if len(texts) > MOST_LINES:
        lines.append(f"... and {len(texts) - MOST_LINES:,} more")
    return lines


def print_line(text: object = "", file: IO[str] | None = None, flush: bool = False) -> None:
    """Print a text on one line, by default to stdout."""
    print(printable(text), file=file or sys.stdout, flush=flush)


def print_message(text: object) -> None:
    """Print a line of a message on stdout."""
    print(message_line(text), flush=True)


def print_note(text: object) -> None:
    """Print a line of a message on stderr."""
    print(message_line(text), file=sys.stderr, flush=True)


def can_redraw(stream: IO[str]) -> bool:
    """Return whether a stream is a terminal that can show a live display.

    A command that a notebook starts with `!` has a terminal too, but the notebook appends whatever
    is written to it. The kernel of the notebook sets MPLBACKEND for its commands.
    """
    if os.environ.get("MPLBACKEND", "").endswith("backend_inline"):
        return False
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def note(text: object) -> None:
    """Print a note of a command on stderr, as a line that names the program."""
    if prints_notes():
        print_note(f"framework: {text}")


def prints_notes() -> bool:
    """Return whether this process prints notes and warnings: of several, the main one does."""
    return os.environ.get("RANK", "0") == "0"


def completed(words: list[str]) -> list[str]:
    """Return the words that TAB may complete: words without code for the shell to execute."""
    return [word for word in words if COMPLETED.fullmatch(word) and printable(word) == word]


def print_traceback(error: BaseException) -> None:
    """Print an error with its traceback on stderr. Lines of its message are indented."""
    for part in traceback.format_exception(error):
        first, *others = printable_lines(part).split("\n")
        lines = [first]
        links_errors = part.startswith("\n")  # "The above exception was the direct cause ..."
        for line in others:
            is_indented = not line or line[0].isspace()
            lines.append(line if is_indented or links_errors else f"    {line}")
        print("\n".join(lines), end="", file=sys.stderr)
    sys.stderr.flush()


@contextmanager
def printable_warnings() -> Iterator[None]:
    """Print warnings as printable text; those of the framework as one line without source."""
    if not prints_notes():
        with warnings.catch_warnings(action="ignore"):
            yield
        return
    default_format = warnings.formatwarning

    def format_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if is_own(filename):
            return message_line(f"framework: warning: {message}") + "\n"
        source = None if line is None else printable(line)
        file = printable(filename)
        return printable_lines(
            default_format(message_line(message), category, file, lineno, source)
        )

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = default_format


def is_own(filename: str) -> bool:
    """Return whether a file belongs to this package or to the built-in plugins."""
    folders = [os.path.dirname(os.path.dirname(__file__))]
    folders += getattr(sys.modules.get("framework_plugins"), "__path__", [])
    return any(filename.startswith(os.path.join(folder, "")) for folder in folders)
