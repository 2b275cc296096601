"""Tables in Markdown, for the loggers and for model cards."""

import re
import textwrap
from collections.abc import Iterable, Sequence

MARKUP = re.compile(r"[\\`*\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    texts: int | None = None,
    wrap: int | None = None,
) -> str:
    """Return a table.

    Args:
        head: the titles of the columns; they may have several lines.
        rows: the cells of each row, see `cell`.
        texts: the number of columns of texts, aligned to the left; the others, aligned to the
            right, have numbers. None: all have texts.
        wrap: the characters after which a text continues on a new line. TensorBoard makes the other
            columns too narrow for their words if a column has a long line.
    """
    numbers = 0 if texts is None else len(head) - texts
    rule = "|" + "---|" * (len(head) - numbers) + "--:|" * numbers
    lines = [line([str(title).split("\n") for title in head]), rule]
    for row in rows:
        cells = []
        for content in row:
            text = " ".join(str(content).split())
            cells.append([text] if wrap is None else textwrap.wrap(text, wrap))
        lines.append(line(cells))
    return "\n".join(lines)


def line(cells: Iterable[Sequence[str]]) -> str:
    """Return a line of a table; each cell has lines of text."""
    texts = ["<br>".join(map(cell, lines)) for lines in cells]
    return f"| {' | '.join(texts)} |"


def cell(content: object) -> str:
    """Return a text for a cell: on one line, without markup of tables and HTML."""
    text = " ".join(str(content).split())
    return text.replace("|", "\\|").replace("<", "&lt;")


def literal(text: str) -> str:
    """Return a text that is shown as it is, such as __init__ or a*b*c."""
    return MARKUP.sub(r"\\\g<0>", text)
