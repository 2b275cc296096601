"""Plots of parts in the terminal, for `framework show`: from overrides to charts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from framework.errors import Facts, SettingError, did_you_mean, nearest
from framework.errors.terminal import printable
from framework.runtime.display.axis import Axis
from framework.runtime.display.plot import TextChart, text_columns

from .tables import Part, value_text

PLOTTED = ("activation", "scheduler", "loss", "initializer", "optimizer")
"""The kinds of `curves.MEASURES`, without importing torch."""
PLAIN_WIDTH = 80  # where no terminal limits the width
NARROWEST = 34
WIDEST = 64
ROWS = 10
MOST_CURVES = 12


def read_settings(overrides: Sequence[str], parts: Sequence[Part]) -> list[dict[str, list[Any]]]:
    """Return the settings of each part, from overrides such as "activation.alpha=0.5".

    A setting of several values, as in "optimizer.momentum=0,0.9", gives a curve for each.

    Raises:
        SettingError: none of the parts has a setting, or an override cannot be read.
    """
    from hydra.errors import HydraException  # only a command with overrides needs Hydra

    from framework.composition.override_syntax import parse, swept_values

    settings: list[dict[str, list[Any]]] = [{} for _ in parts]
    for text in overrides:
        key = text.partition("=")[0]
        try:
            _, override = parse(text)
        except HydraException:
            raise SettingError(f"{text}: expected KIND.SETTING=VALUE") from None
        values = swept_values(override) if override.is_sweep_override() else [override.value()]
        if not values:  # of glob(...) or interval(...)
            raise SettingError(f"{text}: expected a value, or several as in 0.1,0.2")
        found = False
        known = []
        for part, own in zip(parts, settings, strict=True):
            for setting in part["settings"]:
                name = f"{part['key']}.{setting['name']}"
                known.append(name)
                if name == key:
                    own[setting["name"]] = values
                    found = True
        if not found:
            error = SettingError(f"{key}: no such setting; {did_you_mean(key, known)}")
            raise error.with_facts(Facts(key, value=values, suggestion=nearest(key, known)))
    return settings


def variants(settings: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield the combinations of the values of settings."""
    for values in product(*settings.values()):
        yield dict(zip(settings, values, strict=True))


def plot_parts(
    parts: Sequence[Part], settings: Sequence[Mapping[str, Sequence[Any]]], steps: int | None
) -> "list[Plotted]":
    """Measure the curves of parts; those of kinds without curves are left out.

    Args:
        parts: from `find_part`; they are registered.
        settings: of each part, from `read_settings`.
        steps: of schedules and optimizers; None for their defaults.

    Raises:
        SettingError: a setting has a wrong value, or there are too many curves.
    """
    from .curves import NotPlotted, curves_of, maker_of

    count = 0
    for part, values in zip(parts, settings, strict=True):
        if part["kind"] in PLOTTED:
            count += math.prod(map(len, values.values()))
    if count > MOST_CURVES:
        raise SettingError(f"{count:,} curves in a plot: expected at most {MOST_CURVES}")
    found = []
    for part, values in zip(parts, settings, strict=True):
        if part["kind"] not in PLOTTED:
            continue
        for variant in variants(values):
            texts = [f"{name}={value_text(value)}" for name, value in variant.items()]
            plotted = Plotted(part, " ".join([part["name"], *texts]), variant)
            maker = maker_of(part["kind"], part["name"], variant)
            try:
                plotted.curves = curves_of(maker, steps)
            except NotPlotted as error:
                plotted.problem = str(error)
            found.append(plotted)
    return found


class Plotted:
    """A part with settings, and its curves or the reason why it has none."""

    def __init__(self, part: Part, label: str, settings: dict[str, Any]):
        self.part = part
        self.label = label
        self.settings = settings
        self.curves: Any = None
        self.problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        if self.problem is not None:
            return {"settings": self.settings, "problem": self.problem}
        numbers: dict[str, Any] = self.curves.numbers
        return {"settings": self.settings} | numbers


def as_documents(parts: Sequence[Part], plotted: Sequence[Plotted]) -> list[dict[str, Any]]:
    """Return each part for JSON; one with curves has their numbers as "plots"."""
    documents = []
    for part in parts:
        own = [each.as_dict() for each in plotted if each.part is part]
        documents.append(part | {"plots": own} if own else part)
    return documents


def render(plotted: Sequence[Plotted], width: int) -> RenderableType:
    """Return the charts of parts, and a line about each.

    Args:
        plotted: from `plot_parts`.
        width: characters of a line.
    """
    panels: dict[Any, list[tuple[str, Any]]] = {}
    for each in plotted:
        if each.curves is None:
            continue
        for curve in each.curves.curves:
            label = f"{each.label}, {curve.label}" if curve.label else each.label
            panels.setdefault(curve.panel, []).append((label, curve))
    lines: list[Text] = []
    remaining = list(panels.items())
    most = max(1, min(4, width // (NARROWEST + 2)))
    while remaining:
        across = min(most, len(remaining))
        if len(remaining) == 4 and most == 3:
            across = 2
        size = min(WIDEST, (width - 2 * (across - 1)) // across)
        row = remaining[:across]
        remaining = remaining[across:]
        charts = [chart_of(panel, curves, size) for panel, curves in row]
        lines += [*text_columns(charts, size), Text()]
    for each in plotted:
        note = each.curves.note if each.problem is None else f"not plotted: {each.problem}"
        lines.append(Text.assemble((printable(each.label), "bold"), f"  {printable(note)}"))
    if any(each.part["kind"] == "activation" and each.problem is None for each in plotted):
        rule = "saturates: |f'| is below 1 % of its maximum for x from -10 to 10"
        lines.append(Text(rule, "dim"))
    return Group(*lines)


def chart_of(panel: Any, curves: Sequence[tuple[str, Any]], columns: int) -> list[Text]:
    """Return the lines of a chart.

    Args:
        panel: a `curves.Panel`.
        curves: a label and a `curves.Curve` for each.
        columns: its width in characters.
    """
    if panel.surface is not None:
        return surface_chart(panel.surface, curves, columns)
    x = [value for _, curve in curves for value in curve.x]
    y = [value for _, curve in curves for value in curve.y if math.isfinite(value)]
    log = panel.log
    if log:
        y = [value for value in y if value > 1e-30]
        log = bool(y) and max(y) > 10 * min(y)
    low = min(y, default=0.0)
    high = max(y, default=1.0)
    if not log:
        low = min(low, 0.0)
        high = max(high, 0.0) * 1.05
    chart = TextChart(
        panel.title,
        Axis(min(x), max(x)),
        Axis(low, high, log),
        columns=columns,
        rows=ROWS,
        x_label=panel.x_label,
    )
    chart.grid()
    for label, curve in curves:
        text = printable(label) if len(curves) > 1 else ""
        chart.line(list(zip(curve.x, curve.y, strict=True)), text)
    return chart.lines()


def surface_chart(surface: Any, curves: Sequence[tuple[str, Any]], columns: int) -> list[Text]:
    """Return the lines of the paths on a surface with its contour lines.

    Each path has its letter within it and where it ends; "o" is the start, and "x" the minimum.
    """
    from .curves import contour_points

    left, right, bottom, top = surface.window
    x = Axis(left, right)
    y = Axis(bottom, top)
    chart = TextChart(surface.name, x, y, columns=columns, rows=ROWS + 4)
    chart.scatter(contour_points(surface, 2 * chart.columns, 4 * chart.rows))
    for number, (label, curve) in enumerate(curves):
        letters = [0.3 + 0.12 * (number % 5), 1.0]
        chart.line(list(zip(curve.x, curve.y, strict=True)), printable(label), letters)
    for (across, up), character in ((surface.minimum, "x"), (surface.start, "o")):
        chart.mark(across, up, character)
    return chart.lines()
