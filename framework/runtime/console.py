"""Tables and colours on the terminal."""

import sys
from collections.abc import Iterator
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from framework.errors.terminal import printable, printable_lines

PLAIN_WIDTH = 10_000  # where no terminal limits the width, nothing is cut or wrapped


class PrintableConsole(Console):
    """A console in which no text controls the terminal, and strings have no markup."""

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        """Return a string as text on one line."""
        return super().render_str(printable(text), **(options | {"markup": False, "emoji": False}))

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Yield what is printed. Line breaks stay: the layout has put them where they are."""
        for segment in super().render(renderable, options):
            if segment.control is None:
                yield Segment(printable_lines(segment.text), segment.style)
            else:
                yield segment


def console(file: IO[str] | None = None) -> Console:
    """Return a console: as wide as the terminal and in colour; plain and without wrapping in a pipe or file."""
    file = file or sys.stdout
    return PrintableConsole(
        file=file, highlight=False, width=None if file.isatty() else PLAIN_WIDTH
    )
