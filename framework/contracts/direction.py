"""The direction of a metric: whether low or high values are better."""

from collections.abc import Iterable
from typing import Literal

from .metric import Metric

Direction = Literal["min", "max"]


def metric_directions(metrics: Iterable[Metric]) -> dict[str, Direction]:
    """Return the direction of the loss and of each metric, by name."""
    directions: dict[str, Direction] = {"loss": "min"}
    for metric in metrics:
        directions[metric.name] = "max" if metric.better == "higher" else "min"
    return directions


def direction_sign(direction: Direction) -> float:
    """Return the factor that makes high values the better ones: 1 for "max", -1 for "min"."""
    return 1.0 if direction == "max" else -1.0
