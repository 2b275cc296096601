"""Curves in the terminal, drawn with braille characters.

This module does not import torch: `framework watch` uses it.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from types import MappingProxyType

from rich.color import Color
from rich.style import Style
from rich.text import Text

from .axis import Axis

DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))
"""The bits of a braille character, which has 2 columns of 4 dots, by column from the bottom up."""
BLANK = 0x2800
STYLES = ("cyan", "yellow", "magenta", "green", "red", "blue")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LABEL_WIDTH = 9  # characters at the left of `with_labels`


def braille(
    values: Sequence[float],
    columns: int,
    rows: int,
    low: float = 0.0,
    high: float | None = None,
    joined: bool = False,
) -> list[str]:
    """Draw values as lines of braille characters, from the top down.

    Args:
        values: evenly spaced along the x axis; one that is not finite is left out.
        columns: the number of characters in a line.
        rows: the number of lines.
        low: the value at the bottom.
        high: the value at the top; by default the largest absolute value.
        joined: whether to fill the gap to the previous value in steep parts.
    """
    dots = 4 * rows
    if high is None:
        high = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
    axis = Axis(low, high)
    cells = [[BLANK] * columns for _ in range(rows)]
    last: int | None = None
    for x in range(2 * columns if values else 0):
        value = values[round(x * (len(values) - 1) / max(2 * columns - 1, 1))]
        if not math.isfinite(value):
            last = None
            continue
        share = min(1.0, max(0.0, axis.position(value)))
        y = round(share * (dots - 1))
        gap = range(y, y + 1)
        if joined and last is not None and last != y:
            gap = range(last + 1, y + 1) if last < y else range(y, last)
        for dot in gap:
            cells[rows - 1 - dot // 4][x // 2] |= DOTS[x % 2][dot % 4]
        last = y
    return ["".join(map(chr, line)) for line in cells]


def evenly_spaced(
    points: Iterable[tuple[float, float]], count: int, first: float, last: float
) -> list[float]:
    """Return the means of points in intervals of equal width, for `braille`.

    An interval without a point between others has a value on the line between its neighbors; before
    the first point and after the last one it is NaN.

    Args:
        points: (x, y) by x; those whose y is not finite are left out.
        count: the number of intervals.
        first: the x at the left.
        last: the x at the right.
    """
    width = (last - first) or 1.0
    sums = [0.0] * count
    counts = [0] * count
    for x, y in points:
        if math.isfinite(y) and first <= x <= last:
            index = min(count - 1, int((x - first) / width * count))
            sums[index] += y
            counts[index] += 1
    values = [math.nan] * count
    before: int | None = None
    for index in range(count):
        if not counts[index]:
            continue
        values[index] = sums[index] / counts[index]
        if before is not None:
            step = (values[index] - values[before]) / (index - before)
            for between in range(before + 1, index):
                values[between] = values[before] + step * (between - before)
        before = index
    return values


def with_labels(drawn: Sequence[str], top: str, bottom: str, below: str) -> list[Text]:
    """Return lines of `braille` with labels of the y axis at the left, and a line below.

    Args:
        drawn: the lines.
        top: the label of the first line.
        bottom: the label of the last line.
        below: the text below the lines, see `ends`.
    """
    labels = [""] * len(drawn)
    labels[-1] = bottom
    labels[0] = top
    lines = []
    for label, dots in zip(labels, drawn, strict=True):
        lines.append(Text.assemble((f"{label:>{LABEL_WIDTH}} ", "dim"), (dots, "cyan")))
    return [*lines, Text(f"{'':>{LABEL_WIDTH}} {below}", "dim")]


def ends(first: str, last: str, columns: int, middle: str = "") -> str:
    """Return a line for the x axis: its beginning, a text in the middle, and its end."""
    return f"{first}{middle:^{max(0, columns - len(first) - len(last))}}{last}"


class TextChart:
    """A chart of curves in the terminal, with axes and a legend.

    If it has several curves, each has its letter on the curve and in the legend, so that they can
    be told apart without colors.

    Args:
        title: above the chart.
        x: the axis from left to right.
        y: the axis from the bottom up.
        columns: the width in characters, with the labels.
        rows: the lines between the axes; the title, the labels of the x axis and the legend need
            further lines.
        x_label: what x is.
    """

    def __init__(
        self, title: str, x: Axis, y: Axis, *, columns: int, rows: int = 12, x_label: str = ""
    ):
        self.title = title
        self.x = x
        self.y = y
        self.x_label = x_label
        self.rows = rows
        self.labels = dict(self._row_labels())
        self.label_width = max(map(len, self.labels.values()), default=0)
        self.columns = max(8, columns - self.label_width - 1)
        self.dots = [[0] * self.columns for _ in range(rows)]
        self.styles = [["dim"] * self.columns for _ in range(rows)]
        self.characters: dict[tuple[int, int], str] = {}
        self.curves: list[tuple[str, list[tuple[int, int]], int]] = []

    def grid(self) -> None:
        """Draw dotted lines where x is 0 and where y is 0."""
        zero = self._dot(0.0, 0.0)
        for column in range(0, 2 * self.columns, 3):
            self._set(column, zero[1], "dim")
        for row in range(0, 4 * self.rows, 2):
            self._set(zero[0], row, "dim")

    def scatter(self, points: Iterable[tuple[float, float]], style: str = "dim") -> None:
        """Draw single dots."""
        for x, y in points:
            self._set(*self._dot(x, y), style)

    def mark(self, x: float, y: float, character: str) -> None:
        """Write a character at a point, over the curves."""
        column, row = self._dot(x, y)
        if 0 <= column < 2 * self.columns and 0 <= row < 4 * self.rows:
            self.characters[self.rows - 1 - row // 4, column // 2] = character

    def line(
        self, points: Sequence[tuple[float, float]], label: str, letters: Sequence[float] = ()
    ) -> None:
        """Draw a curve; it is interrupted at values that are not finite or far from the axes.

        Args:
            points: (x, y).
            label: its text in the legend; "" for none.
            letters: where its letter is written, as fractions of the points; by default four
                places along the curve.
        """
        number = len(self.curves)
        style = STYLES[number % len(STYLES)]
        drawn: list[tuple[int, int]] = []
        before: tuple[int, int] | None = None
        for x, y in points:
            if not (math.isfinite(self.x.position(x)) and math.isfinite(self.y.position(y))):
                before = None
                continue
            dot = self._dot(x, y)
            if dot == before:
                continue
            new = [dot] if before is None else list(between(before, dot))
            drawn += [each for each in new if self._set(*each, style)]
            before = dot
        if not letters:
            shift = (number % 3) * 0.08
            letters = [0.08 + shift, 0.33 + shift, 0.58 + shift, 0.8 + shift / 2]
        places = [drawn[round(at * (len(drawn) - 1))] for at in letters] if drawn else []
        self.curves.append((label, places, number))

    def lines(self) -> list[Text]:
        """Return the lines: title, curves with the labels of both axes, legend."""
        characters: dict[tuple[int, int], tuple[str, str]] = {}
        if len(self.curves) > 1:
            for _, places, number in self.curves:
                for column, row in places:
                    place = (self.rows - 1 - row // 4, column // 2)
                    characters[place] = (LETTERS[number], f"bold {STYLES[number % len(STYLES)]}")
        for place, character in self.characters.items():
            characters[place] = (character, "bold")
        found = [Text(" " * (self.label_width + 1)).append(self.title, "bold")]
        for row in range(self.rows):
            text = Text().append(f"{self.labels.get(row, ''):>{self.label_width}} ", "dim")
            for column in range(self.columns):
                bits = chr(BLANK + self.dots[row][column])
                text.append(*characters.get((row, column), (bits, self.styles[row][column])))
            found.append(text)
        labels = " " * (self.label_width + 1) + self._column_labels()
        found.append(Text().append(labels, "dim"))
        for label, _, number in self.curves:
            if label:
                letter = f"{LETTERS[number]} " if len(self.curves) > 1 else ""
                text = Text(" " * (self.label_width + 1))
                found.append(text.append(f"{letter}{label}", STYLES[number % len(STYLES)]))
        return found

    def _row_labels(self) -> Iterator[tuple[int, str]]:
        """Yield the rows that have a label, and the labels."""
        last = self.rows
        for value, label in self.y.ticks(max(2, self.rows // 3)):
            row = self.rows - 1 - round(self.y.position(value) * (4 * self.rows - 1)) // 4
            if 0 <= row < last:
                yield row, label
                last = row

    def _column_labels(self) -> str:
        """Return the labels below the curves, and what x is if there is room for it."""
        cells = [" "] * (self.columns + 1)
        free = 0
        for value, label in self.x.ticks(max(2, self.columns // 10)):
            middle = self.x.position(value) * (self.columns - 1)
            start = round(middle - (len(label) - 1) / 2)
            start = min(max(start, 0), self.columns - len(label))
            if start >= free:
                cells[start : start + len(label)] = label
                free = start + len(label) + 2
        line = "".join(cells)
        if not self.x_label:
            return line.rstrip()
        gaps = [match.span() for match in re.finditer(" +", line)]
        widest = max(end - start for start, end in gaps) if gaps else 0
        around = 4 if widest >= len(self.x_label) + 4 else 2
        fitting = [gap for gap in gaps if gap[1] - gap[0] >= len(self.x_label) + around]
        if not fitting:
            return line.rstrip()
        start = (fitting[-1][0] + fitting[-1][1] - len(self.x_label)) // 2
        return (line[:start] + self.x_label + line[start + len(self.x_label) :]).rstrip()

    def _dot(self, x: float, y: float) -> tuple[int, int]:
        """Return the column and row, from the bottom, of a point among the dots."""
        across = min(max(self.x.position(x), -10.0), 10.0)
        up = min(max(self.y.position(y), -10.0), 10.0)
        return round(across * (2 * self.columns - 1)), round(up * (4 * self.rows - 1))

    def _set(self, column: int, row: int, style: str) -> bool:
        """Draw a dot; return whether it is between the axes."""
        if not (0 <= column < 2 * self.columns and 0 <= row < 4 * self.rows):
            return False
        line = self.rows - 1 - row // 4
        if style != "dim" and self.styles[line][column // 2] == "dim":
            self.dots[line][column // 2] = 0  # a curve replaces the grid
        elif style == "dim" and self.styles[line][column // 2] != "dim":
            return False
        self.dots[line][column // 2] |= DOTS[column % 2][row % 4]
        self.styles[line][column // 2] = style
        return True


def between(start: tuple[int, int], end: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the dots of a line from after its start to its end."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    for step in range(1, steps + 1):
        share = step / steps
        yield (
            round(start[0] + share * (end[0] - start[0])),
            round(start[1] + share * (end[1] - start[1])),
        )


def text_columns(blocks: Sequence[Sequence[Text]], width: int) -> list[Text]:
    """Return blocks of lines next to each other, each `width` characters wide, with gaps of 2."""
    found = []
    for parts in zip_longest(*blocks):
        line = Text()
        for part in parts:
            cell = Text() if part is None else part.copy()
            cell.truncate(width, overflow="ellipsis", pad=True)
            line.append_text(cell).append("  ")
        line.rstrip()
        found.append(line)
    return found


SHADES = " .:-=+*#%@"
"""Characters from low to high, for output without colors."""


def resampled(rows: Sequence[Sequence[float]], columns: int, lines: int) -> list[list[float]]:
    """Return values on a grid of another size, by bilinear interpolation; the corners stay.

    Args:
        rows: at least two rows of at least two values.
        columns: values in a row of the result, at least 2.
        lines: rows of the result, at least 2.
    """
    across = [x * (len(rows[0]) - 1) / (columns - 1) for x in range(columns)]
    found = []
    for y in range(lines):
        place = y * (len(rows) - 1) / (lines - 1)
        below = min(int(place), len(rows) - 2)
        part = place - below
        line = []
        for x in across:
            left = min(int(x), len(rows[0]) - 2)
            near = x - left
            low = mixed(rows[below][left], rows[below][left + 1], near)
            high = mixed(rows[below + 1][left], rows[below + 1][left + 1], near)
            line.append(mixed(low, high, part))
        found.append(line)
    return found


def half_blocks(
    pixels: Sequence[Sequence[tuple[int, int, int]]],
    marks: Mapping[tuple[int, int], str] = MappingProxyType({}),
) -> list[Text]:
    """Return an image as lines of half blocks, each with two pixels, one above the other.

    Args:
        pixels: rows of (red, green, blue) from 0 to 255; an even number of rows.
        marks: characters by (column, row) of the pixel that they replace.
    """
    found = []
    for number, (upper, lower) in enumerate(zip(pixels[::2], pixels[1::2], strict=True)):
        line = Text()
        for column, (above, below) in enumerate(zip(upper, lower, strict=True)):
            color = Color.from_rgb(*above)
            mark = marks.get((column, 2 * number)) or marks.get((column, 2 * number + 1))
            if mark is None:
                line.append("▀", Style(color=color, bgcolor=Color.from_rgb(*below)))
                continue
            contrast = "black" if sum(above) > 3 * 128 else "white"
            line.append(mark, Style(color=contrast, bgcolor=color, bold=True))
        found.append(line)
    return found


def mixed(first: float, second: float, share: float) -> float:
    """Return a value between two others; one with share 0 has no effect, also if it is NaN."""
    if share == 0:
        return first
    return second if share == 1 else first + (second - first) * share


def shade(share: float) -> str:
    """Return the character for a value from 0 to 1; "?" for NaN."""
    if not math.isfinite(share):
        return "?"
    return SHADES[min(len(SHADES) - 1, max(0, int(share * len(SHADES))))]
