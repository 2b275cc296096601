"""Charts in the terminal."""

import math

from rich.text import Text

from framework.runtime.display.axis import Axis
from framework.runtime.display.plot import TextChart, ends, half_blocks, text_columns, with_labels


def plain(chart):
    return [line.plain for line in chart.lines()]


def test_a_line_goes_from_corner_to_corner_and_stops_at_missing_values():
    chart = TextChart("diagonal", Axis(0, 1), Axis(0, 1), columns=20, rows=4)
    chart.line([(0, 0), (1, 1)], "")
    title, *rows, below = plain(chart)
    assert title.strip() == "diagonal"
    filled = [[cell > "\u2800" for cell in row[-chart.columns :]] for row in rows]
    assert filled[0][-1]
    assert filled[-1][0]
    assert [row.index(True) for row in filled] == sorted(row.index(True) for row in filled)[::-1]
    assert below.split()[0] == "0"
    gap = TextChart("", Axis(0, 2), Axis(0, 1), columns=20, rows=4)
    gap.line([(0, 0), (1, math.nan), (2, 0)], "")
    dots = [character for row in plain(gap)[1:-1] for character in row if character > "\u2800"]
    assert len(dots) == 2


def test_several_curves_have_letters_and_one_has_none():
    chart = TextChart("", Axis(0, 1), Axis(0, 1), columns=30, rows=4)
    chart.line([(0, 0.2), (1, 0.2)], "low")
    assert not any("a" in line for line in plain(chart)[1:5])
    chart.line([(0, 0.9), (1, 0.9)], "high")
    lines = plain(chart)
    assert sum(line.count("a") for line in lines[1:5]) == 4
    assert sum(line.count("b") for line in lines[1:5]) == 4
    assert [line.strip() for line in lines[-2:]] == ["a low", "b high"]


def test_values_outside_of_the_axes_are_not_drawn():
    chart = TextChart("", Axis(0, 1), Axis(0, 1, log=False), columns=20, rows=4)
    chart.line([(0, 5), (1, 5)], "")
    chart.mark(3, 3, "x")
    assert not any(character > "\u2800" or character == "x" for character in "".join(plain(chart)))


def test_a_logarithmic_axis_leaves_out_zero():
    chart = TextChart("", Axis(0, 1), Axis(0.01, 1, log=True), columns=20, rows=4)
    chart.line([(0, 0.0), (1, 0.0)], "none")
    chart.line([(0, 0.1), (1, 0.1)], "middle")
    assert any(line.strip().startswith("b middle") for line in plain(chart))


def test_blocks_side_by_side_are_padded_and_cut():
    lines = text_columns([[Text("ab"), Text("c")], [Text("defghij")]], 4)
    assert [line.plain for line in lines] == ["ab    def…", "c"]


def test_labels_are_at_both_ends():
    lines = with_labels(["xx", "yy", "zz"], "9", "0", ends("a", "b", 2))
    assert [line.plain[6:] for line in lines] == ["  9 xx", "    yy", "  0 zz", "    ab"]
    assert ends("1", "20", 9, "log") == "1 log  20"


def test_half_blocks_have_two_pixels_each():
    (line,) = half_blocks([[(255, 0, 0)], [(0, 0, 255)]])
    assert line.plain == "▀"
    style = line.spans[0].style
    assert style.color.get_truecolor() == (255, 0, 0)
    assert style.bgcolor.get_truecolor() == (0, 0, 255)
