"""Charts and captioned images."""

import math
import sys
from itertools import product

import pytest
import torch

from framework.runtime.display import drawing
from framework.runtime.display.drawing import (
    BLACK,
    COLORS,
    Axis,
    Canvas,
    Chart,
    captioned,
    cut_in_the_middle,
    cut_to_width,
)


@pytest.mark.parametrize(
    ("axis", "labels"),
    [
        (Axis(0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Axis(-3, 3), ["-3", "-2", "-1", "0", "1", "2", "3"]),
        (Axis(1e-5, 1, log=True), ["1e-05", "0.001", "0.1"]),
        (Axis(0.2, 0.7, log=True), ["0.2", "0.7"]),
        (Axis(2, 2), ["2", "2.2", "2.4", "2.6", "2.8", "3"]),
    ],
)
def test_the_ticks_of_an_axis_are_round(axis, labels):
    assert [label for _, label in axis.ticks()] == labels
    assert all(-1e-9 <= axis.position(value) <= 1 + 1e-9 for value, _ in axis.ticks())


def test_a_logarithmic_axis_is_positive():
    assert Axis(0.01, 100, log=True).position(1) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="above 0, not at 0"):
        Axis(0, 1, log=True)


@pytest.mark.parametrize("log", [False, True])
def test_an_axis_of_any_range_has_positions_and_ticks(log):
    numbers = [5e-324, 1e-300, 1.0, 1 + 2**-52, 1e16, 1e17, 1e300, sys.float_info.max]
    if not log:
        numbers += [0.0, *(-number for number in numbers)]
    for low, high in product(numbers, numbers):
        axis = Axis(low, high, log)
        assert axis.low < axis.high
        assert axis.position(axis.low) == 0
        assert axis.position(axis.high) == 1
        assert not any(math.isnan(axis.position(number)) for number in numbers)
        assert 1 <= len(axis.ticks()) < 12


def pixel_of(chart, x, y):
    left, top = chart._pixels(x, y)
    return chart.tensor()[0, :, round(top), round(left)]


def test_a_curve_goes_through_its_points():
    chart = Chart("f", Axis(0, 10), Axis(0, 100))
    chart.line([(0, 0), (5, 50), (10, 100)], COLORS[0], width=6)
    color = torch.tensor(COLORS[0]) / 255
    assert torch.allclose(pixel_of(chart, 5, 50), color, atol=0.02)
    assert pixel_of(chart, 5, 97).mean() > 0.8


def test_a_curve_is_interrupted_where_it_is_not_finite():
    chart = Chart("f", Axis(0, 10), Axis(0, 1))
    chart.line([(0, 0.5), (4, 0.5), (5, math.nan), (6, 0.5), (10, 0.5)], COLORS[0], width=6)
    assert pixel_of(chart, 2, 0.5)[0] < 0.1
    assert pixel_of(chart, 5, 0.5)[0] > 0.8
    assert pixel_of(chart, 8, 0.5)[0] < 0.1


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (2, 1), (8, 4)])
def test_a_legend_covers_no_curve(count, rows):
    images = []
    for label in ("", "a class with a name"):
        chart = Chart("f", Axis(0, 1), Axis(0, 1))
        for number in range(count):
            chart.line([(0, number / 8), (1, number / 8)], COLORS[number], label)
        images.append(chart.tensor())
    without, with_legend = images
    assert torch.equal(with_legend[:, :, : without.shape[2]], without)
    legend = with_legend[0, :, without.shape[2] :]
    assert legend.shape == (3, 16 * rows + 6, drawing.CARD)
    for color in COLORS[:count]:
        difference = (legend - torch.tensor(color).reshape(3, 1, 1) / 255).abs().amax(0)
        assert difference.min() < 0.02


def test_images_are_enlarged_above_their_captions():
    image = captioned(torch.zeros(5, 1, 8, 8), ["one", "two\nlines", "a", "b", "c"])
    assert image.shape == (1, 3, 2 * (72 + 38), drawing.CARD)
    assert image[0, :, 50, 50].max() == 0
    assert image[0, :, 78:94, :70].min() < 0.5  # the first caption


def test_a_caption_is_cut_to_its_width():
    canvas = Canvas(200, 20)
    assert cut_to_width(canvas, "short", 100) == "short"
    cut = cut_to_width(canvas, "a very long caption of an image", 100)
    assert cut.endswith("…")
    assert canvas.draw.textlength(cut, canvas.font) <= 200


def test_a_text_is_dark():
    canvas = Canvas(60, 20)
    canvas.text(30, 10, "text", color=BLACK)
    assert canvas.tensor().min() < 0.5


def test_the_middle_of_a_long_name_is_cut():
    canvas = Canvas(200, 20)
    assert cut_in_the_middle(canvas, "blocks.0", 100) == "blocks.0"
    cut = cut_in_the_middle(canvas, "10 layers.11.attention.output", 100)
    start, end = cut.split("…")
    assert start.startswith("10 lay")
    assert end in ("put", "tput", "utput")
    assert canvas.draw.textlength(cut, canvas.font) <= 200


def test_accents_are_left_out():
    """The font has no letters with accents: it would draw a box for each."""
    with_accents = Canvas(60, 40)
    with_accents.text(30, 10, "Äpfel")
    with_accents.text_upwards(30, 40, "été")
    without = Canvas(60, 40)
    without.text(30, 10, "Apfel")
    without.text_upwards(30, 40, "ete")
    assert torch.equal(with_accents.tensor(), without.tensor())


@pytest.mark.parametrize("log", [False, True])
def test_a_heat_map_shows_numbers_as_colors(log):
    values = torch.tensor([[1.0, 100.0, torch.nan], [10.0, 1.0, 1.0]])
    image = drawing.heat_map("numbers", values, ["one", "two"], ["1", "2", "3"], log)
    assert image.shape[:2] == (1, 3)
    cells = image[0, :, 30:70, 125:278].reshape(3, 2, 20, 3, 51)[:, :, 10, :, 25]
    colors = (cells * 255).round().int()
    assert tuple(colors[:, 0, 0].tolist()) == drawing.HEAT[0]
    assert tuple(colors[:, 0, 1].tolist()) == drawing.HEAT[-1]
    assert tuple(colors[:, 0, 2].tolist()) == drawing.GRAY
    middle = tuple(colors[:, 1, 0].tolist())
    halfway = drawing.pixels_of(drawing.colors_of(torch.tensor([[0.5]])))[0][0]
    assert (middle == halfway) == log, "10 is halfway between 1 and 100 in logarithms"


def test_a_heat_map_without_a_known_number_is_gray():
    image = drawing.heat_map("numbers", torch.full((1, 2), torch.nan), ["one"], ["1", "2"])
    assert (image[0, :, 40, 200] * 255).round().int().tolist() == list(drawing.GRAY)
