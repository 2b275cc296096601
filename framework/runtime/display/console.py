"""Tables and colors on the terminal."""

import sys
from collections.abc import Iterator
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from framework.errors.terminal import printable, printable_lines

PLAIN_WIDTH = 10_000  # where no terminal limits the width, nothing is cut or wrapped


class PrintableConsole(Console):
    """A console that escapes control characters and reads no markup in strings."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as text on one line."""
        return super().render_str(printable(text), **(options | {"markup": False, "emoji": False}))

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield the printed segments; line breaks belong to the layout and are kept."""
        for segment in super().render(renderable, options):
            if segment.control is None:
                yield Segment(printable_lines(segment.text), segment.style)
            else:
                yield segment


def empty_table() -> Table:
    """Return a table without borders."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def console(file: IO[str] | None = None) -> Console:
    """Return a console for a file, by default standard output.

    On a terminal it is as wide as the terminal and has colors; in a pipe or file it is plain and
    does not wrap lines.
    """
    file = file or sys.stdout
    width = None if file.isatty() else PLAIN_WIDTH
    # In a notebook, rich would ignore the file and its width.
    return PrintableConsole(file=file, highlight=False, width=width, force_jupyter=False)
