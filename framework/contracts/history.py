"""The values that a run has logged, by tag: curves for a plot or a table."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from framework.data import SPLITS
from framework.errors import FrameworkError, did_you_mean, short
from framework.errors.terminal import title
from framework.runtime.display import html

if TYPE_CHECKING:  # it imports torch, which the lists of runs do not need
    from .direction import Direction

MOST_POINTS = 100_000
"""Points of a curve in memory."""
MOST_TAGS = 10_000
MOST_ROWS = 100  # tags that a notebook lists
COLUMNS = 3  # charts side by side
CHART_SIZE = (4.5, 3.2)  # inches
LARGEST = 1e100  # matplotlib fails with values near the largest float
FEW_POINTS = 20  # a curve of so few points has marks on them


class Point(NamedTuple):
    """A logged value, and the step after which it was logged."""

    step: int
    value: float


class Curve:
    """The logged values of one tag, in the order of the steps.

    Of many values, every second, fourth, ... one is a point of the curve, and the last one.

    Args:
        direction: "min" or "max", whichever values are better; None if that is not known.
        most_points: the largest number of points, at least 2.
    """

    def __init__(self, direction: "Direction | None" = None, most_points: int = MOST_POINTS):
        self.direction = direction
        self._most_points = most_points
        self._stride = 1  # of the values that are points
        self._count = 0  # of the values
        self._steps = array("q")
        self._values = array("d")
        self._lowest = (math.inf, 0)  # the value and its step
        self._highest = (-math.inf, 0)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Point]:
        for step, value in zip(self._steps, self._values, strict=True):
            yield Point(step, value)

    def __repr__(self) -> str:
        return f"Curve({len(self)} values, last={self.last.value:g} at step {self.last.step})"

    @property
    def steps(self) -> list[int]:
        """The steps after which the values were logged."""
        return self._steps.tolist()

    @property
    def values(self) -> list[float]:
        """The values; one that is not finite is included."""
        return self._values.tolist()

    @property
    def last(self) -> Point:
        """The last value."""
        return Point(self._steps[-1], self._values[-1])

    @property
    def min(self) -> Point | None:
        """The lowest finite value, the first of equal ones; None if there is none."""
        return as_point(*self._lowest)

    @property
    def max(self) -> Point | None:
        """The highest finite value, the first of equal ones; None if there is none."""
        return as_point(*self._highest)

    @property
    def best(self) -> Point | None:
        """`min` or `max`, by the direction; None if that is not known, or no value is finite."""
        if self.direction is None:
            return None
        return self.min if self.direction == "min" else self.max

    def add(self, step: int, value: float) -> None:
        """Append a value; it replaces the last one if the step is the same."""
        steps = self._steps
        if steps and steps[-1] == step:
            self._values[-1] = value
        else:
            if (self._count - 1) % self._stride:  # it was a point as the last one only
                steps.pop()
                self._values.pop()
            if len(steps) == self._most_points:
                del steps[1::2]
                del self._values[1::2]
                self._stride *= 2
            steps.append(step)
            self._values.append(value)
            self._count += 1
        if -math.inf < value < self._lowest[0]:
            self._lowest = (value, step)
        if self._highest[0] < value < math.inf:
            self._highest = (value, step)


def as_point(value: float, step: int) -> Point | None:
    """Return a value with its step; None for an infinite value, which stands for none."""
    return Point(step, value) if math.isfinite(value) else None


def quantity(tag: str) -> str:
    """Return what a tag measures, without the name of the split: "loss" for "val/loss"."""
    split, _, name = tag.partition("/")
    return name if name and split in SPLITS else tag


def short_number(value: float) -> str:
    """Return a value with four digits, and thousands in full: 0.1234, 31,706."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def is_logarithmic(curves: Iterable[Curve]) -> bool:
    """Return whether a logarithmic axis suits curves: positive values over a factor of ten.

    Not for those of which high values are better, such as accuracies, which end at 1.
    """
    lowest = math.inf
    highest = -math.inf
    for curve in curves:
        if curve.direction == "max":
            return False
        if curve.min is not None and curve.max is not None:
            lowest = min(lowest, curve.min.value)
            highest = max(highest, curve.max.value)
    return 0 < lowest <= highest / 10


class History(Mapping[str, Curve]):
    """The curves of a run by tag, such as `history["val/loss"].values`.

    A curve has at most `MOST_POINTS` points: a longer one is thinned out evenly. `last`, `min`,
    `max` and `best` of a curve are exact nevertheless.
    """

    def __init__(self, directions: "Mapping[str, Direction] | None" = None):
        """Begin without values.

        Args:
            directions: by metric, such as {"loss": "min", "accuracy": "max"}.
        """
        self._directions = dict(directions or {})
        self._curves: dict[str, Curve] = {}

    def __getitem__(self, tag: str) -> Curve:
        try:
            return self._curves[tag]
        except KeyError:
            raise KeyError(f"no values of {tag!r} were logged; {self._advice(tag)}") from None

    def __contains__(self, tag: object) -> bool:
        return tag in self._curves

    def __iter__(self) -> Iterator[str]:
        return iter(self._curves)

    def __len__(self) -> int:
        return len(self._curves)

    def __repr__(self) -> str:
        return f"History({', '.join(self)})"

    @property
    def last(self) -> dict[str, float]:
        """The last value of each tag."""
        return {tag: curve.last.value for tag, curve in self._curves.items()}

    @property
    def best(self) -> dict[str, Point]:
        """The best value of each tag whose direction is known, with its step."""
        found = {}
        for tag, curve in self._curves.items():
            if curve.best is not None:
                found[tag] = curve.best
        return found

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append the values of a step."""
        for tag, value in values.items():
            curve = self._curves.get(tag)
            if curve is None:
                if len(self._curves) >= MOST_TAGS:
                    continue
                metric = tag.partition("/")[2] or tag
                curve = Curve(self._directions.get(metric), MOST_POINTS)
                self._curves[tag] = curve
            curve.add(step, value)

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame`: a row for each step, a column for each tag.

        NaN: the tag was not logged at that step.

        Raises:
            FrameworkError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise FrameworkError("history.to_pandas() needs pandas: pip install pandas") from None
        columns = {}
        for tag, curve in self._curves.items():
            columns[tag] = pandas.Series(curve.values, index=curve.steps, dtype="float64")
        table = pandas.DataFrame(columns)
        table.index.name = "step"
        return table.sort_index()

    def plot(self, *names: str) -> list[Any]:
        """Draw curves with matplotlib; those of one quantity, such as the loss, share a chart.

        A notebook shows the charts below the cell. In a script, `matplotlib.pyplot.show()` opens
        them, and `history.plot()[0].figure.savefig("curves.png")` writes them. A curve has a gap at
        values that are not finite or beyond 1e100. The axis of positive values over a factor of ten
        is logarithmic, unless high values are better.

        Args:
            names: quantities or single tags, such as "loss" or "val/loss"; by default the
                quantities of which low or high values are known to be better, or all of them if
                there is none.

        Returns:
            The axes, one for each quantity.

        Raises:
            FrameworkError: matplotlib is not installed, nothing was logged, or no value has one of
                the names.
        """
        try:
            from matplotlib import pyplot
        except ImportError:
            raise FrameworkError(
                "history.plot() needs matplotlib: pip install 'framework[notebook]'"
            ) from None
        charts = self._charts(names)
        columns = min(len(charts), COLUMNS)
        rows = math.ceil(len(charts) / columns)
        width, height = CHART_SIZE
        figure = pyplot.figure(figsize=(columns * width, rows * height), layout="constrained")
        drawn = []
        for position, (name, tags) in enumerate(charts.items(), 1):
            axes = figure.add_subplot(rows, columns, position)
            for tag in tags:
                self._draw(tag, axes)
            if is_logarithmic(self._curves[tag] for tag in tags):
                axes.set_yscale("log")
            axes.set_title(title(name), parse_math=False)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            if any(tag != name for tag in tags):
                axes.legend()
            drawn.append(axes)
        return drawn

    def _draw(self, tag: str, axes: Any) -> None:
        """Draw a curve; each split has its color in all charts."""
        curve = self._curves[tag]
        style: dict[str, Any] = {}
        split = tag.partition("/")[0]
        if split in SPLITS:
            style = {"label": split, "color": f"C{SPLITS.index(split)}"}
        if len(curve) <= FEW_POINTS:
            style |= {"marker": "o", "markersize": 3}
        values = [value if abs(value) < LARGEST else math.nan for value in curve.values]
        axes.plot(curve.steps, values, **style)

    def _charts(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return the tags of each chart by its title, see `plot`."""
        found: dict[str, list[str]] = {}
        for tag in self._curves:
            found.setdefault(quantity(tag), []).append(tag)
        if not found:
            raise FrameworkError("history.plot(): nothing was logged")
        if not names:
            judged = [name for name, tags in found.items() if self._curves[tags[0]].direction]
            names = judged or list(found)
        charts = {}
        for name in names:
            if name in found:
                charts[name] = found[name]
            elif name in self._curves:
                charts[name] = [name]
            else:
                advice = did_you_mean(name, [*found, *self._curves])
                raise FrameworkError(f"history.plot({short(name)}): no such values; {advice}")
        return charts

    def _repr_html_(self) -> str:
        """Return a table for notebooks: the last and the best value of each tag, and its curve."""
        rows = []
        for tag in list(self._curves)[:MOST_ROWS]:
            curve = self._curves[tag]
            best = at = ""
            if curve.best is not None:
                best = short_number(curve.best.value)
                at = f"{curve.best.step:,}"
            drawn = html.small_curve(list(curve), is_logarithmic([curve]))
            rows.append((tag, short_number(curve.last.value), best, at, drawn))
        if not rows:
            return html.paragraph("Nothing was logged.")
        table = html.table(rows, head=("", "last", "best", "at step", ""))
        more = len(self) - len(rows)
        return table + html.paragraph(f"... and {more:,} more") if more else table

    def _advice(self, tag: str) -> str:
        return did_you_mean(tag, self._curves) if self._curves else "nothing was logged"
