"""`framework watch`: a live view of runs in the terminal."""

import math
import os
import re
import select
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from framework.errors import RunError
from framework.errors.paths import expanded, shorter
from framework.errors.terminal import print_line, printable, shortened, title
from framework.runs.folder import in_default_root, resolve_run
from framework.runs.overview.live import Curve, LiveRun
from framework.runs.run_files import ACTIVE, RunFiles, folders_in, is_sweep, run_files, trials_in
from framework.runtime.console import console
from framework.runtime.plot import braille, evenly_spaced

from . import help_texts
from .json_output import print_json
from .parsers import JSON, Parser

REFRESH_SECONDS = 1.0
SEARCH_SECONDS = 5.0  # between two searches for new runs
BUDGET_SECONDS = 0.5  # of a refresh; further runs are read in the next ones
MOST_CANDIDATES = 200  # of the newest runs, among which those that are running are found
COLORS = {
    "running": "green",
    "testing": "green",
    "paused": "yellow",
    "done": "cyan",
    "stopped": "yellow",
    "failed": "red",
    "stale": "red",
    "unknown": "dim",
}
MEASURES = (
    "train/samples_per_second",
    "train/seconds_per_epoch",
    "train/communication",
    "train/waiting",
    "train/slowest_process",
)
"""Metrics whose curves come last."""
LINEAR = ("train/learning_rate", *MEASURES)
LOGARITHMIC = 30.0  # ratio of the highest to the lowest value from which a scale is logarithmic
LABEL_WIDTH = 9  # of the values at the left of a curve
CHART_ROWS = 8  # of a curve, title and axis included, at least
CHART_COLUMNS = 38
MOST_DETAILS = 7  # lines on the selected run
RESULTS = ("train/loss", "val/", "test/")
"""The metrics that are printed without a terminal, by the beginning of their names."""
MOST_VALUES = 8  # of these metrics
MOST_WARNING = 300  # characters without a terminal
GAP = "  "


def watch(arguments: list[str]) -> None:
    """Run `framework watch`."""
    parser = Parser("watch", "Show runs and sweeps live in the terminal.", help_texts.WATCH)
    runs = "folders of runs or sweeps (default: the runs that are running, or the latest one)"
    parser.add_argument("runs", nargs="*", default=[], type=expanded, metavar="RUN", help=runs)
    root = "folder of runs, in which the default is found (default: runs)"
    parser.add_argument("--root", type=expanded, default=Path("runs"), metavar="DIR", help=root)
    once = "print the present state as JSON, once"
    parser.add_argument("--json", **JSON | {"help": once})
    args = parser.parse_args(arguments)
    watched = Watched(args.runs, args.root)
    if args.json:
        watched.refresh(budget=math.inf)
        print_json({"runs": [run_as_dict(run) for run in watched.runs]})
        return
    screen = console()
    if screen.is_terminal and not screen.is_dumb_terminal:
        View(watched, screen).show()
        return
    watched.refresh(budget=math.inf)
    for run in watched.runs:
        print_line(run_line(run))


class Watched:
    """The runs that are shown.

    Args:
        paths: folders of runs and sweeps; none for those that are running.
        root: the folder of all runs.

    Attributes:
        runs: those of the paths, and the trials of the sweeps.
        is_sweep: whether all of them are trials of sweeps.

    Raises:
        RunError: a path is neither a run nor a sweep, or there is no run in the root.
    """

    def __init__(self, paths: Sequence[Path], root: Path):
        self.paths = [in_default_root(path) for path in paths]
        self.root = root
        self.runs: list[LiveRun] = []
        self.searched = -math.inf
        self.next_read = 0
        for path in self.paths:
            if not is_sweep(path):
                run_files(path)
        self._search()
        if not self.runs:
            where = ", ".join(map(str, paths)) if paths else str(root)
            raise RunError(f"there is no run in {where}")

    @property
    def is_sweep(self) -> bool:
        return all(is_sweep(run.path.parent) for run in self.runs)

    def refresh(self, budget: float = BUDGET_SECONDS) -> None:
        """Read what is new; with many runs, some of them in the next call.

        Args:
            budget: the seconds after which the others wait for the next call.
        """
        began = time.monotonic()
        if began - self.searched > SEARCH_SECONDS:
            self._search()
        for _ in range(len(self.runs)):
            self.runs[self.next_read % len(self.runs)].refresh()
            self.next_read += 1
            if time.monotonic() - began > budget:
                return

    def _search(self) -> None:
        """Add new runs, such as further trials of a sweep."""
        self.searched = time.monotonic()
        known = {run.path for run in self.runs}
        for path in self.paths or current_runs(self.root):
            folder = path if is_sweep(path) else resolve_run(path)
            members = trials_in(folder) if is_sweep(folder) else [folder]
            for run in members:
                if run not in known:
                    known.add(run)
                    self.runs.append(LiveRun(run, label_of(run, self.root)))


def current_runs(root: Path) -> list[Path]:
    """Return the runs in a root that are running, otherwise the latest one.

    In place of the trials of a sweep it is the sweep.
    """
    found: list[tuple[int, Path]] = []
    for experiment in folders_in(root):
        for path in folders_in(experiment):
            members = folders_in(path) if is_sweep(path) else [path]
            for run in members:
                written = status_time(run)
                if written is not None:
                    found.append((written, run))
    newest = [run for _, run in sorted(found, reverse=True)[:MOST_CANDIDATES]]
    current = [run for run in newest if RunFiles(run).state in ACTIVE] or newest[:1]
    paths = [run.parent if is_sweep(run.parent) else run for run in current]
    return sorted(dict.fromkeys(paths))


def status_time(run: Path) -> int | None:
    """Return the time of the last change of status.json; None if the folder has none."""
    try:
        return os.lstat(run / "status.json").st_mtime_ns
    except OSError:
        return None


def label_of(run: Path, root: Path) -> str:
    """Return a short name of a run: below the root, of a trial in its sweep."""
    if is_sweep(run.parent):
        return printable(run.name)
    try:
        return printable(str(run.relative_to(root)))
    except ValueError:
        return printable(shorter(str(run)))


# without a terminal


def run_line(run: LiveRun) -> str:
    """Return the present state of a run in one line, the warnings at the end."""
    parts = [str(run.path), run.state, f"step {progress_text(run)}", speed_text(run), eta_text(run)]
    if run.checkpoint is not None:
        parts.append(f"saved {age_text(run.checkpoint[1])} ago")
    results = [metric for metric in metrics_of([run]) if metric.startswith(RESULTS)]
    curves = run.metrics.curves
    parts += [f"{title(metric)} {number(curves[metric].last)}" for metric in results[:MOST_VALUES]]
    remarks = [run.process_text(), run.reason, *run.warnings()]
    parts += [shortened(text, MOST_WARNING) for text in remarks]
    return GAP.join(printable(part) for part in parts if part)


def run_as_dict(run: LiveRun) -> dict[str, Any]:
    """Return the present state of a run for JSON; see conf/README.md."""
    step, age = run.checkpoint or (None, None)
    metrics = {}
    for metric in metrics_of([run]):
        curve = run.metrics.curves[metric]
        lowest, lowest_step = curve.lowest or (None, None)
        highest, highest_step = curve.highest or (None, None)
        metrics[metric] = {
            "last": curve.last,
            "lowest": lowest,
            "lowest_step": lowest_step,
            "highest": highest,
            "highest_step": highest_step,
        }
    return {
        "path": str(run.path),
        "state": run.state,
        "reason": run.reason or None,
        "step": run.step,
        "total_steps": run.total_steps or None,
        "samples_per_second": run.samples_per_second,
        "eta_seconds": run.eta_seconds,
        "checkpoint_step": step,
        "checkpoint_age": age,
        "processes": run.processes or None,
        "metrics": metrics,
        "warnings": list(run.warnings()),
    }


def progress_text(run: LiveRun) -> str:
    """Return the steps, such as "1,234 of 16,000 (8%)"."""
    if not run.total_steps:
        return f"{run.step:,}"
    return f"{run.step:,} of {run.total_steps:,} ({run.step / run.total_steps:.0%})"


def speed_text(run: LiveRun) -> str:
    """Return the samples per second of a running run; "" if they are not known."""
    speed = run.samples_per_second
    return "" if speed is None else f"{speed:,.0f} samples/s"


def eta_text(run: LiveRun) -> str:
    """Return the remaining time of a running run; "" if it is not known."""
    seconds = run.eta_seconds
    return "" if seconds is None else f"ETA {clock(seconds)}"


def checkpoint_text(run: LiveRun) -> str:
    """Return the step and the age of the last checkpoint; "" without one."""
    if run.checkpoint is None:
        return ""
    step, age = run.checkpoint
    return f"step {step:,}, {age_text(age)} ago"


def age_text(seconds: float) -> str:
    """Return a time in its largest unit, such as "12 s" or "3 h"."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def clock(seconds: float) -> str:
    """Return a time as 1:02 or 1:00:02."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"


def number(value: float) -> str:
    """Return a number with four digits."""
    return f"{value:.4g}"


def metrics_of(runs: Sequence[LiveRun]) -> list[str]:
    """Return the metrics of runs: losses, those of validation, others, measures of time."""
    found = dict.fromkeys(metric for run in runs for metric in run.metrics.curves)
    found = {metric: None for metric in found if any_points(runs, metric)}

    def rank(metric: str) -> tuple[bool, bool, bool]:
        split, _, name = metric.partition("/")
        return metric in MEASURES, name != "loss", split != "val"

    return sorted(found, key=rank)


def curves_of(run: LiveRun) -> list[str]:
    """Return the metrics of a run with values at several steps."""
    curves = run.metrics.curves
    return [metric for metric in metrics_of([run]) if len(curves[metric].points) > 1]


def any_points(runs: Sequence[LiveRun], metric: str) -> bool:
    """Return whether a run has a value of a metric."""
    return any(metric in run.metrics.curves and run.metrics.curves[metric].points for run in runs)


# in a terminal


class View:
    """The live view: a table of runs, the selected run, and its curves."""

    def __init__(self, watched: Watched, screen: Console):
        self.watched = watched
        self.screen = screen
        self.selected = 0
        self.page = 0  # of curves

    def show(self) -> None:
        """Show the runs until the key q or a signal."""
        live = Live(console=self.screen, screen=True, auto_refresh=False)
        with keyboard() as keys, live:
            while True:
                self.watched.refresh()
                live.update(Group(*self.lines(*self.screen.size)), refresh=True)
                deadline = time.monotonic() + REFRESH_SECONDS
                while (left := deadline - time.monotonic()) > 0:
                    pressed = keys.wait(left)
                    if not pressed:
                        continue
                    if not all(self.press(key) for key in pressed):
                        return
                    live.update(Group(*self.lines(*self.screen.size)), refresh=True)

    def press(self, key: str) -> bool:
        """React to a key; return False to quit."""
        if key in ("q", "Q"):
            return False
        if key in ("up", "k", "down", "j", "tab"):
            step = -1 if key in ("up", "k") else 1
            self.selected = (self.selected + step) % len(self.watched.runs)
            self.page = 0
        if key in ("left", "h", "right", "l"):
            self.page += 1 if key in ("right", "l") else -1
        return True

    def lines(self, width: int, height: int) -> list[Text]:
        """Return the lines of the screen."""
        runs = self.watched.runs
        run = runs[min(self.selected, len(runs) - 1)]
        lines = [self.header(width)]
        lines += self.table(width, max(2, height // 3))
        details = list(self.details(run))[: max(1, min(MOST_DETAILS, height // 4))]
        lines += [Text(), *details]
        keys = Text("q quit   ↑ ↓ run   ← → curves", style="dim")
        rows = height - len(lines) - 1
        lines += self.charts(run, width, rows)
        lines += [Text()] * max(0, height - len(lines) - 1)
        lines = [*lines[: height - 1], keys]
        for line in lines:
            line.no_wrap = True
            line.truncate(width, overflow="ellipsis")
        return lines

    def header(self, width: int) -> Text:
        """Return the numbers of runs by state, and the time."""
        counts: dict[str, int] = {}
        for run in self.watched.runs:
            counts[run.state] = counts.get(run.state, 0) + 1
        text = Text("framework watch  ", style="bold")
        for state in COLORS:
            if state in counts:
                text.append(f"{counts[state]} {state}  ", style=COLORS[state])
        now = time.strftime("%H:%M:%S")
        text.append(" " * max(0, width - len(text.plain) - len(now)))
        return text.append(now, style="dim")

    def table(self, width: int, most: int) -> Iterator[Text]:
        """Yield a line for each run, or for those around the selected one."""
        runs = self.watched.runs
        names = [metric for metric in metrics_of(runs) if metric.startswith("val/")][:2]
        names = names or [metric for metric in metrics_of(runs) if metric == "train/loss"]
        columns = ["state", "step", "ETA", "samples/s", "saved", *names]
        first = min(max(0, self.selected - most // 2), max(0, len(runs) - most))
        shown = runs[first : first + most]
        rows = [cells(run, names) for run in shown]
        widths = []
        for index, column in enumerate(columns):
            texts = [row[index] for row in rows]
            widths.append(max([len(title(column)), *map(len, texts)]))
        labels = max([8, *(len(run.label) for run in shown)])
        optional = [3, 4, 2, len(columns) - 1]  # left out in this order if the line is too long
        left_out: set[int] = set()
        for index in optional:
            kept = [size for at, size in enumerate(widths) if at not in left_out]
            if min(labels, 20) + sum(kept) + 2 * len(kept) + 2 > width:
                left_out.add(index)
        kept = [size for at, size in enumerate(widths) if at not in left_out]
        labels = max(8, min(labels, width - sum(kept) - 2 * len(kept) - 2))
        more = len(runs) - len(shown)
        head = f"  {'run' if not more else f'run ({len(runs)})':<{labels}}"
        for index, (column, size) in enumerate(zip(columns, widths, strict=True)):
            if index not in left_out:
                head += f"  {title(column):>{size}}" if index else f"  {title(column):<{size}}"
        yield Text(head, style="dim")
        for position, (run, row) in enumerate(zip(shown, rows, strict=True), first):
            is_selected = position == self.selected
            line = Text("▸ " if is_selected else "  ", style="bold" if is_selected else "")
            line.append(f"{shortened(run.label, labels):<{labels}}")
            for index, (text, size) in enumerate(zip(row, widths, strict=True)):
                if index in left_out:
                    continue
                if index == 0:
                    line.append(f"  {text:<{size}}", style=COLORS.get(run.state, ""))
                else:
                    line.append(f"  {text:>{size}}")
            yield line

    def details(self, run: LiveRun) -> Iterator[Text]:
        """Yield lines on the selected run, the warnings at the end."""
        line = Text(run.label, style="bold")
        line.append(f"  {run.state}", style=COLORS.get(run.state, ""))
        line.append(f"  step {progress_text(run)}", style="not bold")
        for text in (speed_text(run), eta_text(run)):
            if text:
                line.append(f"  {text}", style="not bold")
        yield line
        saved = checkpoint_text(run)
        yield Text(f"checkpoint {saved}" if saved else "no checkpoint")
        if run.process_text():
            yield Text(run.process_text())
        several = curves_of(run)
        single = [metric for metric in metrics_of([run]) if metric not in several]
        if single:
            values = [f"{title(m)} {number(run.metrics.curves[m].last)}" for m in single]
            yield Text("  ".join(values))
        color = COLORS.get(run.state, "") if run.reason else "yellow"
        for warning in ([run.reason] if run.reason else []) + list(run.warnings()):
            yield Text.assemble(("! ", f"bold {color}"), (printable(warning), color))

    def charts(self, run: LiveRun, width: int, rows: int) -> list[Text]:
        """Return the curves of a run as a grid that fills the width and a number of lines."""
        metrics = curves_of(run)
        if not metrics or rows < 4:
            return []
        across = max(1, min(len(metrics), width // CHART_COLUMNS))
        down = max(1, min(math.ceil(len(metrics) / across), rows // CHART_ROWS))
        pages = math.ceil(len(metrics) / (across * down))
        self.page %= pages
        first = self.page * across * down
        shown = metrics[first : first + across * down]
        lines: list[Text] = []
        last_step = max(run.step, 1)
        for start in range(0, len(shown), across):
            row = shown[start : start + across]
            size = width // across
            height = rows // down
            charts = [chart(m, run.metrics.curves[m], size - 2, height, last_step) for m in row]
            for parts in zip(*charts, strict=True):
                line = Text()
                for part in parts:
                    part.truncate(size - 2, overflow="ellipsis", pad=True)
                    line.append_text(part).append("  ")
                lines.append(line)
        return lines


def cells(run: LiveRun, metrics: Sequence[str]) -> list[str]:
    """Return the cells of a run in the table: state, step, ETA, speed, checkpoint, metrics."""
    step = f"{run.step:,}"
    if run.total_steps:
        step += f" {run.step / run.total_steps:>4.0%}"
    eta = "" if run.eta_seconds is None else clock(run.eta_seconds)
    speed = "" if run.samples_per_second is None else f"{run.samples_per_second:,.0f}"
    saved = "" if run.checkpoint is None else age_text(run.checkpoint[1])
    row = [run.state, step, eta, speed, saved]
    for metric in metrics:
        curve = run.metrics.curves.get(metric)
        row.append("" if curve is None or not curve.points else number(curve.last))
    return row


def chart(metric: str, curve: Curve, width: int, height: int, last_step: int) -> list[Text]:
    """Return the lines of a curve: its title, the plot, and the steps.

    Args:
        metric: its name.
        curve: its values.
        width: the number of characters in a line.
        height: the number of lines.
        last_step: the step at the right.
    """
    columns = max(4, width - LABEL_WIDTH - 1)
    rows = max(1, height - 3)
    heading = Text(title(metric), style="bold").append(f" {number(curve.last)}", style="not bold")
    values = evenly_spaced(curve.points, 2 * columns, 0, last_step)
    finite = [value for value in values if math.isfinite(value)]
    low = min(finite, default=0.0)
    high = max(finite, default=1.0)
    lines = [heading]
    if low == high:  # in the middle
        low -= abs(low) or 1.0
        high += abs(high) or 1.0
    bottom = low
    top = high
    if metric not in LINEAR and low > 0 and high > LOGARITHMIC * low:
        heading.append("  log scale", style="dim not bold")
        values = [math.log(value) for value in values]
        bottom = math.log(low)
        top = math.log(high)
    labels = [""] * rows
    labels[-1] = number(low)
    labels[0] = number(high)
    drawn = braille(values, columns, rows, bottom, top, joined=True)
    for label, dots in zip(labels, drawn, strict=True):
        lines.append(Text.assemble((f"{label:>{LABEL_WIDTH}} ", "dim"), (dots, "cyan")))
    last = f"{last_step:,}"
    axis = f"{'':>{LABEL_WIDTH}} step 0{last:>{max(0, columns - 6)}}"
    return [*lines, Text(axis, style="dim"), Text()][:height]


class Keys:
    """Reads keys from a terminal; without one, no key is ever pressed."""

    KEY: ClassVar = re.compile(rb"\x1b[\[O][0-9;]*[A-Za-z~]|[\x00-\xff]")
    NAMES: ClassVar = {
        b"\x1b[A": "up",
        b"\x1b[B": "down",
        b"\x1b[C": "right",
        b"\x1b[D": "left",
        b"\x1bOA": "up",
        b"\x1bOB": "down",
        b"\x1bOC": "right",
        b"\x1bOD": "left",
        b"\x1b[Z": "up",  # shift and tab
        b"\t": "tab",
    }

    def __init__(self, descriptor: int | None):
        self.descriptor = descriptor

    def wait(self, seconds: float) -> list[str]:
        """Return the names of the keys that are pressed within some seconds."""
        if self.descriptor is None:
            time.sleep(seconds)
            return []
        ready, _, _ = select.select([self.descriptor], [], [], seconds)
        if not ready:
            return []
        pressed = os.read(self.descriptor, 64)
        if not pressed:  # the terminal was closed
            return ["q"]
        found = self.KEY.findall(pressed)
        return [self.NAMES.get(key, key.decode("ascii", errors="ignore")) for key in found]


@contextmanager
def keyboard() -> Iterator[Keys]:
    """Read single keys from standard input in a block, if it is a terminal."""
    if not sys.stdin.isatty():
        yield Keys(None)
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before: Any = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield Keys(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
