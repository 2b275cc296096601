"""Tables in Markdown, for the loggers and for model cards."""

from collections.abc import Iterable, Sequence


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], texts: int | None = None
) -> str:
    """Return a table.

    Args:
        head: the titles of the columns.
        rows: the cells of each row, see `cell`.
        texts: the number of columns of texts, aligned to the left; the others, aligned to the
            right, have numbers. None: all have texts.
    """
    numbers = 0 if texts is None else len(head) - texts
    rule = "|" + "---|" * (len(head) - numbers) + "--:|" * numbers
    lines = [" | ".join(map(cell, row)) for row in [head, *rows]]
    first, *others = [f"| {line} |" for line in lines]
    return "\n".join([first, rule, *others])


def cell(content: object) -> str:
    """Return a text for a cell: on one line, without markup of tables and HTML."""
    text = " ".join(str(content).split())
    return text.replace("|", "\\|").replace("<", "&lt;")
