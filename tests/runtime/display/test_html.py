"""HTML for notebooks: text of strangers is escaped, and small curves are drawn."""

import math
import re

import pytest

from framework.runtime.display import html

HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e&\"'"


def test_all_text_is_escaped():
    shown = html.table([(HOSTILE, 3)], head=(HOSTILE,)) + html.paragraph(HOSTILE, bold=True)
    assert shown.count("&lt;script&gt;") == 3
    assert "<script" not in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "\\u202e&amp;&quot;&#x27;" in shown


def test_markup_is_not_escaped_again():
    assert html.table([(html.small_curve([(0, 1.0), (1, 2.0)]),)]).count("<svg") == 1


def test_a_long_text_is_shortened():
    assert len(html.escaped("x" * 10_000)) == html.LONGEST_TEXT


def corners(curve):
    points = re.search(r'points="([^"]*)"', curve)[1]
    return [tuple(map(float, pair.split(","))) for pair in points.split()]


def test_a_small_curve_fills_its_image():
    assert corners(html.small_curve([(0, 1.0), (5, 3.0), (10, 2.0)])) == [
        (1.0, 23.0),
        (60.0, 1.0),
        (119.0, 12.0),
    ]
    log = html.small_curve([(0, 100.0), (1, 10.0), (2, 1.0)], log=True)
    assert [y for _, y in corners(log)] == [1.0, 12.0, 23.0]


@pytest.mark.parametrize(
    "points",
    [[], [(0, 1.0)], [(0, 1.0), (1, math.nan)], [(0, math.inf), (1, -math.inf)]],
    ids=["empty", "one", "nan", "infinite"],
)
def test_a_curve_needs_two_finite_values(points):
    assert html.small_curve(points) == ""


@pytest.mark.parametrize("log", [False, True])
def test_a_curve_of_extreme_values_has_finite_corners(log):
    values = [1e308, 5e-324, 1e308, 1e308] if log else [1e308, -1e308, 1e308, 0.0]
    curve = html.small_curve(list(enumerate(values)), log)
    assert "nan" not in curve
    assert "inf" not in curve


def test_a_constant_curve_of_large_values_is_at_the_bottom():
    assert {y for _, y in corners(html.small_curve([(0, 1e16), (1, 1e16)]))} == {23.0}
