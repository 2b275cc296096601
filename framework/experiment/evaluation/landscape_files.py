"""Pictures and files of a landscape."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.runtime.display.drawing import (
    COLORS,
    WHITE,
    Axis,
    Chart,
    color_bar,
    contour_map,
    encode_png,
    side_by_side,
)

from .landscape import Landscape
from .reports import finite, write

WIDE = 20.0  # ratio of the highest and the lowest loss, from which the scale is logarithmic
PATH_COLOR = COLORS[1]
CENTER_COLOR = WHITE


def color_scale(landscapes: Sequence[Landscape]) -> Axis:
    """Return the range of the finite losses of all landscapes, logarithmic if it is wide."""
    values = []
    for landscape in landscapes:
        for row in landscape.losses:
            values += [value for value in row if math.isfinite(value)]
    if not values:
        return Axis(0, 1)
    low, high = min(values), max(values)
    return Axis(low, high, log=low > 0 and high > WIDE * low)


def draw_landscapes(landscapes: Sequence[Landscape]) -> Tensor:
    """Return the landscapes side by side with the same colors, as an image (1, 3, H, W)."""
    scale = color_scale(landscapes)
    charts = [draw_landscape(each, scale) for each in landscapes]
    return side_by_side([*charts, color_bar("loss", scale, height=400)])


def draw_landscape(landscape: Landscape, scale: Axis) -> Tensor:
    """Return a map of the loss with the path of the checkpoints; the center is white."""
    x = Axis(landscape.x[0], landscape.x[-1])
    y = Axis(landscape.y[0], landscape.y[-1])
    kind = "main" if landscape.directions == "pca" else "random"
    title = f"{landscape.run.parent.name}/{landscape.run.name}, loss {landscape.center:.4g}"
    chart = Chart(title, x, y, f"first {kind} direction", "second", height=400)
    chart.background(contour_map(torch.tensor(landscape.losses, dtype=torch.float64), scale))
    path = [(each["x"], each["y"]) for each in landscape.path]
    inside = [point for point in path if is_inside(point, x, y)]
    chart.line(path, PATH_COLOR)
    chart.points(inside, PATH_COLOR, radius=4)
    chart.points([(0.0, 0.0)], CENTER_COLOR, radius=3)
    return chart.tensor()


def is_inside(point: tuple[float, float], x: Axis, y: Axis) -> bool:
    """Return whether a point is on the map."""
    return 0 <= x.position(point[0]) <= 1 and 0 <= y.position(point[1]) <= 1


def save_landscapes(landscapes: Sequence[Landscape]) -> list[Path]:
    """Write the picture and the numbers into the folder of the first run; return the files."""
    run = landscapes[0].run
    content = [as_dict(each) for each in landscapes]
    text = json.dumps(content, indent=None, ensure_ascii=False) + "\n"
    return [
        write(run, "landscape.png", encode_png(draw_landscapes(landscapes)[0])),
        write(run, "landscape.json", text),
    ]


def as_dict(landscape: Landscape) -> dict[str, Any]:
    """Return a landscape as JSON types; a loss that is not finite is null."""
    values: dict[str, Any] = finite(asdict(landscape) | {"run": str(landscape.run)})
    return values
