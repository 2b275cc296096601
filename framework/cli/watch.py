"""`framework watch`: follow runs in the terminal, or print their present state."""

import math
from typing import Any

from framework.errors.paths import expanded
from framework.errors.terminal import print_line, printable, shortened
from framework.runs.overview.live import LiveRun
from framework.runs.overview.watched import Watched
from framework.runtime.display.console import console

from . import help_texts
from .json_output import print_json
from .live_text import age_text, eta_text, last_text, metrics_of, progress_text, speed_text
from .live_view import View
from .parsers import JSON, Parser
from .run_actions import ROOT_OPTION

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
    parser.add_argument("--root", **ROOT_OPTION | {"help": root})
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


def run_line(run: LiveRun) -> str:
    """Return the present state of a run in one line, the warnings at the end."""
    parts = [str(run.path), run.state, f"step {progress_text(run)}", speed_text(run), eta_text(run)]
    if run.checkpoint is not None:
        parts.append(f"saved {age_text(run.checkpoint[1])} ago")
    results = [metric for metric in metrics_of([run]) if metric.startswith(RESULTS)]
    parts += [last_text(run, metric) for metric in results[:MOST_VALUES]]
    remarks = [run.process_text(), run.reason, *run.warnings()]
    parts += [shortened(text, MOST_WARNING) for text in remarks]
    return GAP.join(printable(part) for part in parts if part)


def run_as_dict(run: LiveRun) -> dict[str, Any]:
    """Return the present state of a run for JSON; see conf/README.md."""
    step, age = run.checkpoint or (None, None)
    metrics = {}
    for metric in metrics_of([run]):
        curve = run.metrics.curves[metric]
        lowest_step, lowest = curve.min or (None, None)
        highest_step, highest = curve.max or (None, None)
        metrics[metric] = {
            "last": curve.last.value,
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
