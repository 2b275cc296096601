"""The live view of runs in the terminal: a table, the curves of a run, and the keys."""

import math
import os
import re
import select
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from framework.contracts.history import Curve
from framework.errors.terminal import printable, shortened, title
from framework.runs.overview.live import LiveRun
from framework.runs.overview.watched import Watched
from framework.runs.run_state import State
from framework.runtime.display.plot import (
    LABEL_WIDTH,
    braille,
    ends,
    evenly_spaced,
    text_columns,
    with_labels,
)

from .live_text import (
    MEASURES,
    age_text,
    checkpoint_text,
    clock,
    curves_of,
    eta_text,
    four_digits,
    last_text,
    metrics_of,
    progress_text,
    speed_text,
)

REFRESH_SECONDS = 1.0
COLORS: dict[State, str] = {
    "running": "green",
    "testing": "green",
    "paused": "yellow",
    "done": "cyan",
    "stopped": "yellow",
    "failed": "red",
    "stale": "red",
    "unknown": "dim",
}
LINEAR = ("train/learning_rate", *MEASURES)
LOGARITHMIC = 30.0  # ratio of the highest to the lowest value from which a scale is logarithmic
CHART_ROWS = 8  # of a curve, title and axis included, at least
CHART_COLUMNS = 38
MOST_DETAILS = 7  # lines on the selected run


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
        counts = Counter(run.state for run in self.watched.runs)
        text = Text("framework watch  ", style="bold")
        for state in COLORS:
            if counts[state]:
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
        kept = list(range(len(columns)))
        for index in (3, 4, 2, len(columns) - 1):  # left out in this order if a line is too long
            size = sum(widths[each] + 2 for each in kept)
            if index in kept and min(labels, 20) + size + 2 > width:
                kept.remove(index)
        size = sum(widths[each] + 2 for each in kept)
        labels = max(8, min(labels, width - size - 2))
        heading = "run" if len(shown) == len(runs) else f"run ({len(runs)})"
        head = f"  {heading:<{labels}}"
        for index in kept:
            side = "<" if index == 0 else ">"
            head += f"  {title(columns[index]):{side}{widths[index]}}"
        yield Text(head, style="dim")
        for position, (run, row) in enumerate(zip(shown, rows, strict=True), first):
            line = Text("▸ ", style="bold") if position == self.selected else Text("  ")
            line.append(f"{shortened(run.label, labels):<{labels}}")
            line.append(f"  {row[0]:<{widths[0]}}", style=COLORS[run.state])
            for index in kept[1:]:
                line.append(f"  {row[index]:>{widths[index]}}")
            yield line

    def details(self, run: LiveRun) -> Iterator[Text]:
        """Yield lines on the selected run, the warnings at the end."""
        line = Text(run.label, style="bold")
        line.append(f"  {run.state}", style=COLORS[run.state])
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
            yield Text("  ".join(last_text(run, metric) for metric in single))
        warnings = list(run.warnings())
        color = "yellow"
        if run.reason:
            warnings.insert(0, run.reason)
            color = COLORS[run.state]
        for warning in warnings:
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
            lines += text_columns(charts, size - 2)
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
        row.append("" if curve is None else four_digits(curve.last.value))
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
    heading = Text(title(metric), style="bold")
    heading.append(f" {four_digits(curve.last.value)}", style="not bold")
    values = evenly_spaced(curve, 2 * columns, 0, last_step)
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
    drawn = braille(values, columns, rows, bottom, top, joined=True)
    below = ends("step 0", f"{last_step:,}", columns)
    lines += with_labels(drawn, four_digits(high), four_digits(low), below)
    return [*lines, Text()][:height]


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
