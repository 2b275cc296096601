"""Curves in the terminal, drawn with braille characters.

This module does not import torch: `framework watch` uses it.
"""

import math
from collections.abc import Iterable, Sequence

DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))
"""The bits of a braille character, which has 2 columns of 4 dots, by column from the bottom up."""
BLANK = 0x2800


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
    scale = (high - low) or 1.0
    cells = [[BLANK] * columns for _ in range(rows)]
    last: int | None = None
    for x in range(2 * columns if values else 0):
        value = values[round(x * (len(values) - 1) / max(2 * columns - 1, 1))]
        if not math.isfinite(value):
            last = None
            continue
        y = min(dots - 1, max(0, round((value - low) / scale * (dots - 1))))
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
