"""`framework diff`: print the differences between runs."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from framework.contracts.history import Curve
from framework.errors import FrameworkError, RunError, did_you_mean, short
from framework.errors.paths import in_package
from framework.errors.terminal import note, printable, title
from framework.runs.folder import in_default_root
from framework.runs.overview.diff import (
    UNKNOWN,
    Diff,
    MetricValue,
    Row,
    Setting,
    compare,
    curves_of,
    same_content,
)
from framework.runs.run_files import RunFiles, is_sweep, run_files, trials_in
from framework.runtime.display.console import console, empty_table
from framework.runtime.display.plot import braille, ends, evenly_spaced, with_labels

from . import help_texts
from .json_output import print_json
from .parsers import JSON, RUN, Parser
from .units import duration, small_duration, value_text

MOST_RUNS = 8
MOST_CURVES = 3
CURVE_ROWS = 6
WIDEST_CURVE = 60
NARROWEST_CURVE = 16
DEFAULT_WIDTH = 100  # of the curves, where the width of the terminal is not known
LONGEST_VALUE = 60
MOST_TRIALS = 4  # in the message on a sweep without a best trial
MEASURES = ("train/learning_rate", "train/samples_per_second")


def diff(arguments: list[str]) -> None:
    """Run `framework diff`."""
    parser = Parser("diff", "Print the differences between runs.", help_texts.DIFF)
    parser.add_argument(
        "runs", nargs="+", **RUN | {"metavar": "RUN", "help": "folders of runs or sweeps"}
    )
    names = "metrics whose curves are drawn, e.g. val/loss,val/accuracy"
    parser.add_argument("--curves", metavar="METRICS", help=names)
    parser.add_argument("--json", **JSON)
    args = parser.parse_args(arguments)
    if not 2 <= len(args.runs) <= MOST_RUNS:
        parser.error(f"diff: expected 2 to {MOST_RUNS} runs, got {len(args.runs)}")
    found = compare([compared_run(path) for path in args.runs])
    if args.json:
        print_json(found.as_dict())
        return
    metrics = chosen_metrics(found, args.curves)
    output = console()
    width = output.width if sys.stdout.isatty() else DEFAULT_WIDTH
    output.print(Group(*rendered(found, metrics, width)))


def compared_run(path: Path) -> RunFiles:
    """Return the files of a run; of a sweep, those of its best trial.

    Raises:
        RunError: there is no such run, or the sweep has no best trial.
    """
    sweep = in_default_root(path)
    if not is_sweep(sweep):
        return run_files(path)
    if not (sweep / "best").is_dir():
        names = ", ".join(str(trial) for trial in trials_in(sweep)[:MOST_TRIALS])
        advice = f"; compare its trials, such as {names}" if names else ""
        raise RunError(f"{sweep} is a sweep without a best trial yet{advice}")
    best = run_files(sweep / "best")
    note(f"{sweep} is a sweep: its best trial {best.name} is compared")
    return best


def chosen_metrics(found: Diff, names: str | None) -> list[str]:
    """Return the metrics whose curves are drawn.

    Raises:
        FrameworkError: no run has logged one of them.
    """
    known = [row.name for row in found.metrics]
    if names is not None:
        chosen = names.split(",")
        for name in chosen:
            if name not in known:
                advice = did_you_mean(name, known)
                raise FrameworkError(f"--curves {name}: no run has logged it; {advice}")
        return chosen
    monitors = [run.monitor for run in found.runs]
    chosen = [name for name in ("val/loss", "train/loss", *monitors) if name in known]
    chosen += [name for name in known if name.startswith("val/")]
    return list(dict.fromkeys(name for name in chosen if name is not None))[:MOST_CURVES]


def rendered(found: Diff, metrics: Sequence[str], width: int) -> Iterator[RenderableType]:
    """Yield the parts of the comparison."""
    yield from section(found, "settings", found.settings, setting_cell)
    if not found.settings:
        yield Text("settings: no difference", "bold")
    if found.hidden:
        text = f"and {found.hidden} defaults of parts or settings that only some runs have"
        yield Text(text, "dim")
    yield from section(found, "code", found.code, text_cell)
    if not found.code:
        yield from headline("code: " + code_summary(found))
    yield from section(found, "versions", found.versions, text_cell)
    yield from section(found, "data", found.data, text_cell)
    content = same_content(found.runs)
    if content is not None and not found.data:
        yield from headline("data: the same content (sha256)")
    elif content is None and not found.data:
        yield from headline("data: no difference is recorded")
    rows = [row for row in found.metrics if row.name not in MEASURES]

    def metric(row: Row, index: int) -> Text:
        return metric_cell(row, index, best_index(row, found.runs[0].direction(row.name)))

    yield from section(found, "metrics", rows, metric)
    yield from section(found, "time", time_rows(found.time), text_cell)
    for name in metrics:
        yield from curve_panels(found, name, width)
    for name, events in zip(found.names, found.events, strict=True):
        for event in events:
            yield Text(f"{title(name)}: told: {printable(event)}")
    for name, problems in zip(found.names, found.problems, strict=True):
        for problem in problems:
            yield Text(f"{title(name)}: {printable(problem)}", "yellow")


def headline(text: str) -> Iterator[RenderableType]:
    """Yield a blank line and a line that stands for a section."""
    yield Text()
    yield Text(text, "bold")


def code_summary(found: Diff) -> str:
    """Return what is known about the code of runs without a difference."""
    commits = [run.provenance.get("git_commit") for run in found.runs]
    if None in commits:
        return "the same sources of parts (no git commit is recorded)"
    return f"the same commit {short(commits[0], 15, quote=False)}, changes and sources of parts"


def section(
    found: Diff, name: str, rows: Sequence[Row], cell: Callable[[Row, int], Text]
) -> Iterator[RenderableType]:
    """Yield a table with a column for each run; nothing without rows."""
    if not rows:
        return
    if name != "settings":
        yield Text()
    table = empty_table()
    table.add_column(Text(name), overflow="fold")
    for run in found.names:
        table.add_column(Text(title(run)), overflow="fold")
    for row in rows:
        cells = [cell(row, index) for index in range(len(row.values))]
        table.add_row(Text(title(row.name)), *cells)
    yield table


def setting_cell(row: Row, index: int) -> Text:
    """Return the value of a setting, and its source."""
    setting: Setting | None = row.values[index]
    if setting is None:
        return Text("-", "dim")
    text = Text(value_text(setting.value, LONGEST_VALUE))
    if setting.source != UNKNOWN:
        text.append(f"  ({printable(source_text(setting))})", "dim")
    return text


def source_text(setting: Setting) -> str:
    """Return the source of a setting without the folders of this machine.

    The place of a default in the code is left out: `framework explain` prints it.
    """
    if setting.is_default:
        return setting.source.partition(" (")[0]
    place, separator, rest = setting.source.partition(": ")
    return f"{in_package(place)}{separator}{rest}" if os.path.isabs(place) else setting.source


def text_cell(row: Row, index: int) -> Text:
    """Return a value."""
    value = row.values[index]
    return Text("-", "dim") if value is None else Text(value_text(value, LONGEST_VALUE))


def metric_cell(row: Row, index: int, best: int | None) -> Text:
    """Return the last value of a metric, and the best one with its step."""
    value: MetricValue | None = row.values[index]
    if value is None:
        return Text("-", "dim")
    text = Text(f"{value.last.value:.4g}", "bold" if index == best else "")
    if value.best is not None and value.best.value != value.last.value:
        text.append(f"  (best {value.best.value:.4g} at step {value.best.step:,})", "dim")
    return text


def best_index(row: Row, direction: str | None) -> int | None:
    """Return the run with the best value of a metric; None if that is not known."""
    bests = []
    for index, value in enumerate(row.values):
        if value is not None and value.best is not None:
            bests.append((value.best.value, index))
    if direction is None or len({value for value, _ in bests}) < 2:
        return None
    return (max(bests) if direction == "max" else min(bests))[1]


def time_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows on the time in the units of the terminal, without empty ones."""
    shown: list[Row] = []
    for row in rows:
        values = [time_value(row.name, value) for value in row.values]
        if row.name == "total_steps" and shown:
            steps = zip(shown[-1].values, values, strict=True)
            shown[-1].values = [f"{step} of {total}" if total else step for step, total in steps]
        elif any(value is not None for value in values):
            shown.append(Row(TIME_NAMES.get(row.name, row.name), values))
    return shown


TIME_NAMES = {
    "training_seconds": "training",
    "total_seconds": "in all",
    "stacked": "trials in one model",
    "seconds_per_step": "a step",
    "samples_per_second": "samples/s",
}


def time_value(name: str, value: Any) -> Any:
    """Return a number of seconds, steps or samples with its unit."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    if name == "seconds_per_step":
        return small_duration(value)
    if name in ("training_seconds", "total_seconds"):
        return duration(value)
    return f"{value:,.0f}"


def curve_panels(found: Diff, metric: str, width: int) -> Iterator[RenderableType]:
    """Yield the curves of a metric side by side, with common axes."""
    curves = [curves_of(run, [metric])[metric] for run in found.runs]
    points = [point for curve in curves for point in curve if math.isfinite(point.value)]
    if len({step for step, _ in points}) < 2:  # the table of metrics has this value
        return
    low = min(value for _, value in points)
    high = max(value for _, value in points)
    last = max(step for step, _ in points)
    columns = (width - 10) // len(curves) - 2
    columns = max(NARROWEST_CURVE, min(WIDEST_CURVE, columns))
    in_a_row = max(1, (width - 10) // (columns + 2))
    yield Text()
    yield Text(title(metric), "bold")
    for start in range(0, len(curves), in_a_row):
        names = found.names[start : start + in_a_row]
        yield panel_row(curves[start : start + in_a_row], names, (low, high, last), columns)


def panel_row(
    curves: Sequence[Curve], names: Sequence[str], limits: tuple[float, float, float], columns: int
) -> Text:
    """Return some curves side by side: the names, the curves, the steps.

    Args:
        limits: the lowest and the highest value, and the last step, of all curves.
    """
    low, high, last = limits
    drawn = []
    for curve in curves:
        values = evenly_spaced(curve, 2 * columns, 0, last)
        drawn.append(braille(values, columns, CURVE_ROWS, low, high))
    heads = [f"{title(name)[:columns]:<{columns}}" for name in names]
    head = Text(f"{'':>9} {'  '.join(heads)}")
    rows = ["  ".join(parts) for parts in zip(*drawn, strict=True)]
    below = "  ".join([ends("0", f"step {last:,}", columns)] * len(curves))
    return Text("\n").join([head, *with_labels(rows, f"{high:.3g}", f"{low:.3g}", below)])
