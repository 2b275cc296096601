"""Tables and small curves as HTML, for `_repr_html_`: how notebooks show an object.

Text may come from the run of a stranger: whatever is not `Markup` is escaped. Nothing here refers
to another address, and nothing is executed.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

from framework.errors.terminal import printable, shortened

from .axis import Axis

WIDTH = 120  # of a curve, in pixels
HEIGHT = 24
LONGEST_TEXT = 200  # characters of a cell
LEFT = "text-align:left;vertical-align:top"


class Markup(str):
    """HTML, which `escaped` returns unchanged."""


def escaped(content: object) -> Markup:
    """Return a text as HTML, on one line and shortened."""
    if isinstance(content, Markup):
        return content
    return Markup(escape(printable(shortened(content, LONGEST_TEXT))))


def paragraph(*contents: object, bold: bool = False) -> Markup:
    """Return texts side by side."""
    inner = " ".join(map(escaped, contents))
    return Markup(f"<p><b>{inner}</b></p>" if bold else f"<p>{inner}</p>")


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ()) -> Markup:
    """Return a table.

    Args:
        rows: the cells of each row, texts or `Markup`.
        head: the titles of the columns.
    """
    lines = ["<table>"]
    if head:
        titles = "".join(f'<th style="{LEFT}">{escaped(title)}</th>' for title in head)
        lines.append(f"<thead><tr>{titles}</tr></thead>")
    for row in rows:
        cells = "".join(f'<td style="{LEFT}">{escaped(cell)}</td>' for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return Markup("\n".join([*lines, "</table>"]))


def small_curve(points: Sequence[tuple[float, float]], log: bool = False) -> Markup:
    """Return a curve without axes as an SVG image; nothing for less than two finite values.

    Args:
        points: (x, y) by x; those whose y is not finite are left out.
        log: whether the y axis is logarithmic. All values must be positive then.
    """
    from .plot import evenly_spaced  # it imports rich

    points = [point for point in points if math.isfinite(point[1])]
    if len(points) < 2:
        return Markup("")
    first = points[0][0]
    last = points[-1][0]
    values = evenly_spaced(points, min(len(points), WIDTH // 2), first, last)
    finite = [value for value in values if math.isfinite(value)]
    if not finite:  # the sum of two values may be too large for a float
        return Markup("")
    axis = Axis(min(finite), max(finite), log)
    corners = []
    for index, value in enumerate(values):
        height = axis.position(value)
        if math.isfinite(height):
            x = 1 + index / max(1, len(values) - 1) * (WIDTH - 2)
            corners.append(f"{x:.1f},{1 + (1 - height) * (HEIGHT - 2):.1f}")
    return Markup(
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<polyline points="{" ".join(corners)}" fill="none" stroke="#0072b2" stroke-width="1.5"/>'
        "</svg>"
    )
