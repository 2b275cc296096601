"""`framework best`: print the folder of the best run."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from framework.errors import RunError, SettingError, wrong_option
from framework.errors.paths import pasted
from framework.errors.terminal import note, printable
from framework.runs.folder import in_default_root
from framework.runs.overview.run_index import MISSING, RunEntry
from framework.runs.overview.run_table import RunTable
from framework.runs.run_files import Value

from . import help_texts
from .json_output import print_json
from .parsers import JSON, Parser
from .run_actions import ROOT_OPTION
from .runs import ROOT, WHERE, filtered, nothing, read_table, setting_text


def best(arguments: list[str]) -> int:
    """Run `framework best`."""
    parser = Parser("best", "Print the folder of the best run.", help_texts.BEST)
    parser.add_argument("folder", **ROOT, help="folder of runs (default: runs)")
    parser.add_argument("--root", **ROOT_OPTION | {"help": "the same as ROOT"})
    metric = "metric to compare (default: the one that the runs rank checkpoints by)"
    parser.add_argument("--metric", help=metric)
    mode = "whether low or high values are better (default: the metric decides)"
    parser.add_argument("--mode", choices=["min", "max"], help=mode)
    parser.add_argument("--where", **WHERE)
    parser.add_argument("--json", **JSON)
    args = parser.parse_args(arguments)
    table = read_table(in_default_root(args.folder or args.root))
    chosen = filtered(table, args.where)
    if not chosen:
        raise RunError(nothing(table, args.where))
    metric = args.metric or monitored_metric(chosen)
    if args.metric is not None:
        column = table.column(metric, "--metric")
        if column.kind != "metric" or column.key != metric:
            raise wrong_option("--metric", metric, "a metric such as val/loss")
    direction = args.mode or table.direction(metric)
    if direction is None:
        raise SettingError(
            f"whether low or high values of {metric} are better is not known: give --mode"
        )
    found = ranked_runs(table, chosen, metric, direction)
    ranked = without_damaged(found)
    if len(ranked) < len(found):
        skipped = run_count(len(found) - len(ranked))
        note(f"skipped, because their config cannot be read: {skipped}")
    check_comparable([run for run, _ in ranked], table.root)
    run, value = first_with_checkpoint(table.root, ranked)
    path = table.root / run.name
    if args.json:
        content = {"path": str(path), "metric": metric, "direction": direction}
        counts = {"value": value.value, "step": value.step, "compared": len(ranked)}
        print_json(content | counts)
        return 0
    print(printable(path) if sys.stdout.isatty() else path)  # exact for a shell
    compared = f"the best of {run_count(len(ranked))}"
    note(f"{metric} {value.value:.4g} after step {value.step:,}, {compared}")
    return 0


def best_runs(table: RunTable, runs: Sequence[RunEntry], option: str) -> list[RunEntry]:
    """Return the runs with a value of the metric that they rank checkpoints by, the best first.

    Args:
        table: of the folder of the runs.
        runs: some of its runs.
        option: that chooses runs, for messages.

    Raises:
        RunError: there are none, or they differ in data or task.
        SettingError: they rank checkpoints by different metrics, or by one of unknown direction.
    """
    metric = monitored_metric(runs, f"choose other runs with {option}")
    direction = table.direction(metric)
    if direction is None:
        raise SettingError(f"whether low or high values of {metric} are better is not known")
    ranked = without_damaged(ranked_runs(table, runs, metric, direction))
    best = [run for run, _ in ranked]
    check_comparable(best, table.root, option)
    return best


def ranked_runs(
    table: RunTable, runs: Sequence[RunEntry], metric: str, direction: str
) -> list[tuple[RunEntry, Value]]:
    """Return the runs with a finite value of a metric and their best values, the best run first.

    Raises:
        RunError: there are none.
    """
    sign = -1.0 if direction == "max" else 1.0
    found = []
    for run in runs:
        series = run.summary(metric)
        value = None if series is None else series.best(direction)
        if value is not None:
            found.append((run, value))
    if not found:
        raise RunError(f"no run in {table.root} has a finite value of {metric}")
    return sorted(found, key=lambda pair: sign * pair[1].value)


def without_damaged(ranked: list[tuple[RunEntry, Value]]) -> list[tuple[RunEntry, Value]]:
    """Return the runs whose data and task are known; all of them if none is known."""
    readable = [pair for pair in ranked if pair[0].settings.get("data") is not MISSING]
    return readable or ranked


def run_count(count: int) -> str:
    """Return a number of runs as text."""
    return "1 run" if count == 1 else f"{count:,} runs"


def counts_text(counts: Mapping[str, int], most: int | None = None) -> str:
    """Return the first numbers of runs as text: "val/loss (2 runs), val/accuracy (1 run)"."""
    first = list(counts.items())[:most]
    return ", ".join(f"{label} ({run_count(count)})" for label, count in first)


def first_with_checkpoint(
    root: Path, ranked: Sequence[tuple[RunEntry, Value]]
) -> tuple[RunEntry, Value]:
    """Return the best run that can be evaluated; without any checkpoint, the best run."""
    for skipped, (run, value) in enumerate(ranked):
        if has_checkpoint(root / run.name):
            if skipped:
                count = f"{run_count(skipped)} with better values"
                note(f"skipped, because they have no checkpoint: {count}")
            return run, value
    note("no run has a checkpoint, so that none can be evaluated")
    return ranked[0]


def monitored_metric(runs: Sequence[RunEntry], advice: str = "choose one with --metric") -> str:
    """Return the metric that runs rank their checkpoints by.

    Args:
        runs: those to compare.
        advice: the end of the messages.

    Raises:
        SettingError: they differ, or no run has one.
    """
    counts: Counter[str] = Counter()
    for run in runs:
        if run.monitor is not None and run.monitor in run.series:
            counts[run.monitor] += 1
    if not counts:
        raise SettingError(
            f"no run has values of the metric that it ranks its checkpoints by: {advice}"
        )
    if len(counts) > 1:
        texts = counts_text(counts)
        raise SettingError(f"the runs monitor different metrics: {texts}; {advice}")
    return next(iter(counts))


def check_comparable(runs: Sequence[RunEntry], root: Path, option: str = "--where") -> None:
    """Raise RunError if runs have different data or tasks: their metrics cannot be compared.

    Args:
        runs: those to compare.
        root: their folder.
        option: that chooses runs, for the message.
    """
    counts: Counter[str] = Counter()
    for run in runs:
        words = []
        for key in ("data", "task"):
            value = run.settings.get(key)
            words.append(f"{key}={'?' if value is MISSING else setting_text(value)}")
        counts[" and ".join(words)] += 1
    if len(counts) > 1:
        texts = counts_text(counts, 3)
        example = next(iter(counts))
        raise RunError(
            f"the runs in {root} differ in data or task, so that their metrics cannot be compared: "
            f"{texts}; choose some with {option} {pasted(example)}"
        )


def has_checkpoint(run: Path) -> bool:
    """Return whether a run has a checkpoint."""
    folder = run / "checkpoints"
    if folder.is_symlink():
        return False
    try:
        return any(path.name.startswith("step-") for path in folder.iterdir())
    except OSError:
        return False
