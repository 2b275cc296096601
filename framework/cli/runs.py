"""`framework runs` and `framework best`: list, choose, label and remove runs."""

import math
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from framework.errors import FrameworkError, RunError, SettingError
from framework.errors.paths import expanded, pasted
from framework.errors.terminal import note, print_line, printable, shortened
from framework.runs.folder import DEFAULT_ROOT
from framework.runs.overview.run_filter import parse_filter
from framework.runs.overview.run_index import MISSING, RunEntry, list_runs
from framework.runs.overview.run_table import (
    Column,
    RunRow,
    RunTable,
    sort_key,
    state_counts,
    sweep_states,
)
from framework.runs.run_bin import (
    BIN,
    empty_bin,
    find_run_folder,
    remove_runs,
    removed_runs,
    restore_run,
)
from framework.runs.run_files import MOST_NOTE, MOST_TAGS, TAG, Labels, RunFiles, Value

from . import help_texts
from .json_output import print_json
from .parsers import JSON, Parser, ask
from .units import duration

ROOT: dict[str, Any] = {"nargs": "?", "type": expanded, "metavar": "ROOT"}
ROOT_OPTION: dict[str, Any] = {
    "type": expanded,
    "default": DEFAULT_ROOT,
    "metavar": "DIR",
    "help": "folder of runs (default: runs)",
}
WHERE: dict[str, Any] = {"metavar": "FILTER", "help": "such as 'optimizer=adamw and time<60'"}
SCHEMA = 1
MOST_ROWS = 50  # on a terminal, without --limit
MOST_CELL = 40  # characters
MOST_PROBLEMS = 5  # notes on damaged runs
LEAST_NAME = 24  # characters of a name in a narrow terminal
GAP = "  "


def runs(arguments: list[str]) -> int:
    """Run `framework runs`."""
    if arguments and arguments[0] in ACTIONS:
        return ACTIONS[arguments[0]](arguments[1:])
    parser = Parser("runs", "List, label and remove runs.", help_texts.RUNS)
    actions = f"folder of runs (default: runs), or one of the actions {', '.join(ACTIONS)}"
    parser.add_argument("folder", **ROOT, help=actions)
    parser.add_argument("--root", **ROOT_OPTION | {"help": "the same as ROOT"})
    parser.add_argument("--where", **WHERE)
    sort = "column to sort by; a metric sorts the best first (default: the newest first)"
    parser.add_argument("--sort", metavar="COLUMN", help=sort)
    parser.add_argument("--reverse", action="store_true", help="reverse the order")
    names = "columns with commas between; +COLUMN,... adds to the default ones"
    parser.add_argument("--columns", metavar="COLUMN,...", help=names)
    parser.add_argument("--expand", action="store_true", help="a row for each trial of a sweep")
    most = f"most rows (default: {MOST_ROWS} on a terminal, otherwise all); 0 for all"
    parser.add_argument("--limit", type=int, metavar="N", help=most)
    parser.add_argument("--bin", action="store_true", help="list the removed runs")
    parser.add_argument("--json", **JSON)
    args = parser.parse_args(arguments)
    if args.limit is not None and args.limit < 0:
        parser.error(f"--limit {args.limit}: expected 0 or more")
    root = args.folder or args.root
    if args.bin:
        root = root / BIN
        if not root.is_dir():
            note(f"the bin of {root.parent} is empty")
            if args.json:
                print_json({"schema": SCHEMA, "root": str(root), "runs": []})
            return 0
    table = read_table(root)
    chosen = filtered(table, args.where)
    expand = args.expand or "" in table.listing.sweeps
    rows = table.rows(chosen, expand)
    if args.sort is not None:
        rows = table.sorted_rows(rows, table.column(args.sort, "--sort"), args.reverse)
    elif args.reverse:
        rows.reverse()
    if args.json:
        print_rows_as_json(table, rows[: args.limit or None])
        return 0
    columns = chosen_columns(table, rows, args.columns)
    if not rows:
        note(nothing(table, args.where))
        return 0
    limit = args.limit
    if limit is None and sys.stdout.isatty():
        limit = MOST_ROWS
    print_table(table, rows[: limit or None], columns)
    print_summary(table, rows, limit)
    print_problems(table, chosen)
    return 0


def read_table(root: Path) -> RunTable:
    """Return the table of all runs in a folder."""
    table = RunTable(list_runs(root))
    for problem in table.listing.problems[:MOST_PROBLEMS]:
        note(problem)
    return table


def filtered(table: RunTable, where: str | None, option: str = "--where") -> list[RunEntry]:
    """Return the runs that match the expression of --where; without one, all of them.

    Args:
        where: the expression.
        option: the option that has it, for messages.
    """
    if where is None:
        return list(table.runs)
    columns: dict[str, Column] = {}

    def resolve(name: str, place: str) -> str:
        if not table.runs:
            return name
        columns[name] = table.column(name, place)
        return name

    predicate = parse_filter(where, resolve, option)
    return table.selected(predicate, columns)


def nothing(table: RunTable, where: str | None) -> str:
    """Return the note on an empty list."""
    if where is None or not table.runs:
        return f"there are no runs in {table.root}"
    return f"none of the {len(table.runs):,} runs in {table.root} matches --where"


def chosen_columns(table: RunTable, rows: Sequence[RunRow], text: str | None) -> list[Column]:
    """Return the columns of --columns, or the default ones."""
    if text is None or not table.runs:
        return table.default_columns(rows)
    names = [name.strip() for name in text.removeprefix("+").split(",")]
    columns = [table.column(name, "--columns") for name in names if name]
    if not columns:
        raise SettingError(f"--columns {text}: expected names of columns")
    if not text.startswith("+"):
        return columns
    default = table.default_columns(rows)
    return [*default, *(column for column in columns if column not in default)]


# the table


def print_table(table: RunTable, rows: Sequence[RunRow], columns: Sequence[Column]) -> None:
    """Print rows. On a narrow terminal the least important columns are left out."""
    texts = []
    for column in columns:
        cells = [printable(table.title(column))]
        cells += [cell(table, row, column) for row in rows]
        texts.append(cells)
    widths = [max(map(width_of, cells)) for cells in texts]
    kept = list(range(len(columns)))
    left_out = []
    if sys.stdout.isatty():
        terminal = shutil.get_terminal_size().columns
        for number in by_importance(columns):
            too_wide = total(widths, kept) - max(widths[kept[0]] - LEAST_NAME, 0) > terminal
            if not too_wide or len(kept) == 1:
                break
            kept.remove(number)
            left_out.append(table.title(columns[number]))
        over = total(widths, kept) - terminal
        first = kept[0]
        if over > 0:
            widths[first] = max(widths[first] - over, LEAST_NAME)
            texts[first] = [shortened(text, widths[first]) for text in texts[first]]
    for row in range(len(rows) + 1):
        cells = []
        for number in kept:
            text = texts[number][row]
            blank = " " * (widths[number] - width_of(text))
            is_number = columns[number].kind == "metric" or columns[number].key in NUMBERS
            cells.append(blank + text if is_number else text + blank)
        print_line(GAP.join(cells).rstrip())
    if left_out:
        names = ", ".join(reversed(left_out))
        print_line(f"left out for lack of width: {names} (--columns chooses)")


SENTENCES = ("reason", "note", "problems")
"""Fields whose beginning matters; in a pipe they are complete."""
NUMBERS = ("step", "total_steps", "time", "processes")
"""Fields that are aligned to the right."""


def total(widths: Sequence[int], kept: Sequence[int]) -> int:
    """Return the width of a line."""
    return sum(widths[number] for number in kept) + len(GAP) * (len(kept) - 1)


def by_importance(columns: Sequence[Column]) -> list[int]:
    """Return the numbers of the columns, the least important first; the first column is last."""

    def importance(number: int) -> tuple[int, int]:
        column = columns[number]
        if number == 0:
            return (9, 0)
        if column.kind == "field":
            rank = {"note": 0, "processes": 1, "tags": 3, "time": 4, "state": 7}.get(column.key, 2)
        else:
            rank = 5
        return (rank, -number)

    metrics = [number for number, column in enumerate(columns) if column.kind == "metric"]
    ranked = sorted(range(len(columns)), key=importance)
    if metrics:  # the first metric is as important as the state
        ranked.remove(metrics[0])
        ranked.insert(len(ranked) - 1, metrics[0])
    return ranked


def width_of(text: str) -> int:
    """Return the number of columns of the terminal that a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def cell(table: RunTable, row: RunRow, column: Column) -> str:
    """Return the text of a cell."""
    if row.sweep is not None:
        if column.kind == "setting":
            return swept_text(table, row, column)
        if column.key in SWEEP_CELLS and column.kind == "field":
            return SWEEP_CELLS[column.key](table, row)
    value = table.value(row.run, column)
    if value is None:
        return ""
    if column.kind == "metric":
        return str(value) if column.statistic == "step" else f"{value:.4g}"
    if column.kind == "setting":
        return setting_text(value)
    if column.key == "name":
        return printable(value)
    if column.key == "time":
        return duration(value)
    text = printable(", ".join(value) if isinstance(value, list) else value)
    if len(text) <= MOST_CELL or (column.key in SENTENCES and not sys.stdout.isatty()):
        return text
    return f"{text[: MOST_CELL - 3]}..." if column.key in SENTENCES else shortened(text, MOST_CELL)


def swept_text(table: RunTable, row: RunRow, column: Column) -> str:
    """Return the values of a setting in the trials of a sweep: "0.1, 0.01" or "12 values"."""
    found = [table.value(run, column) for run in row.trials]
    known = sorted((value for value in found if value is not None), key=sort_key)
    values = list(dict.fromkeys(map(setting_text, known)))
    text = ", ".join(values)
    return text if len(text) <= MOST_CELL // 2 or len(values) == 1 else f"{len(values)} values"


def sweep_name(table: RunTable, row: RunRow) -> str:
    """Return the name of a sweep with the number of its trials."""
    assert row.sweep is not None
    all_trials = max(len(row.sweep.trials), len(row.trials))
    count = len(list(sweep_states(row, table.state)))
    trials = f"{all_trials}" if count >= all_trials else f"{count} of {all_trials}"
    return f"{printable(row.sweep.name or '.')}/ ({trials} trials)"


def sweep_tags(row: RunRow) -> str:
    """Return the tags of the trials of a sweep."""
    tags: dict[str, None] = {}
    for run in row.trials:
        tags |= dict.fromkeys(run.tags)
    return shortened(printable(", ".join(tags)), MOST_CELL)


SWEEP_CELLS: dict[str, Callable[[RunTable, RunRow], str]] = {
    "name": sweep_name,
    "state": lambda table, row: state_counts(sweep_states(row, table.state)),
    "time": lambda table, row: duration(sum(run.seconds or 0.0 for run in row.trials)),
    "tags": lambda table, row: sweep_tags(row),
    "note": lambda table, row: "",
}
"""Fields of a sweep that are not those of its best trial."""


def setting_text(value: Any) -> str:
    """Return the value of a setting."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.5g}"
    if value == {}:
        return "yes"
    return shortened(printable(value), MOST_CELL)


def print_summary(table: RunTable, rows: Sequence[RunRow], limit: int | None) -> None:
    """Print, on a terminal, what the table does not show."""
    if not sys.stdout.isatty():
        return
    if limit and len(rows) > limit:
        print_line(f"{len(rows) - limit:,} more rows: --limit 0 prints all")
    if any(row.sweep is not None for row in rows):
        print_line("a sweep has the metrics of its best trial; --expand prints all trials")


def print_problems(table: RunTable, chosen: Iterable[RunEntry]) -> None:
    """Print notes on runs with missing or damaged files."""
    lines = [f"{table.root / run.name}: {text}" for run in chosen for text in run.problems]
    for line in lines[:MOST_PROBLEMS]:
        note(line)
    if len(lines) > MOST_PROBLEMS:
        note(f"{len(lines) - MOST_PROBLEMS:,} more problems (--columns +problems)")


# JSON


def print_rows_as_json(table: RunTable, rows: Sequence[RunRow]) -> None:
    """Print rows as JSON; see conf/README.md for the form."""
    found = [row_json(table, row) for row in rows]
    content = {"schema": SCHEMA, "root": str(table.root), "runs": found}
    print_json(content, indent=None)  # there may be 10,000 rows


def row_json(table: RunTable, row: RunRow) -> dict[str, Any]:
    """Return a row for JSON: a run, or a sweep with the states and names of its trials."""
    content = run_json(table, row.run)
    if row.sweep is None:
        return content
    states: dict[str, int] = {}
    for state in sweep_states(row, table.state):
        states[state] = states.get(state, 0) + 1
    return {
        "kind": "sweep",
        "name": row.sweep.name,
        "path": str(table.root / row.sweep.name),
        "states": states,
        "swept": row.sweep.swept,
        "objectives": row.sweep.objectives,
        "trials": [run.name for run in row.trials],
        "best": content,
    }


def run_json(table: RunTable, run: RunEntry) -> dict[str, Any]:
    """Return a run for JSON."""
    metrics = {}
    for metric in run.series:
        series = run.summary(metric)
        direction = table.direction(metric, run)
        assert series is not None
        best = None if direction is None else series.best(direction)
        metrics[metric] = {
            "last": finite(series.last.value),
            "last_step": series.last.step,
            "best": None if best is None else best.value,
            "best_step": None if best is None else best.step,
            "direction": direction,
        }
    return {
        "kind": "run",
        "name": run.name,
        "path": str(table.root / run.name),
        "state": table.state(run),
        "reason": run.reason or None,
        "step": run.step,
        "total_steps": run.total_steps,
        "started": run.started,
        "updated": run.updated,
        "seconds": run.seconds,
        "processes": run.processes,
        "sweep": table.field(run, "sweep"),
        "tags": run.tags,
        "note": run.note or None,
        "settings": run.settings.complete(),
        "metrics": metrics,
        "problems": run.problems,
    }


def finite(value: float) -> float | None:
    """Return a number for JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


# best


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
    table = read_table(args.folder or args.root)
    chosen = filtered(table, args.where)
    if not chosen:
        raise RunError(nothing(table, args.where))
    metric = args.metric or monitored_metric(chosen)
    if args.metric is not None:
        column = table.column(metric, "--metric")
        if column.kind != "metric" or column.key != metric:
            raise SettingError(f"--metric {metric}: expected a metric such as val/loss")
    direction = args.mode or table.direction(metric)
    if direction is None:
        raise SettingError(
            f"whether low or high values of {metric} are better is not known: give --mode"
        )
    ranked = ranked_runs(chosen, metric, direction)
    if not ranked:
        raise RunError(f"no run in {table.root} has a finite value of {metric}")
    ranked = without_damaged(ranked)
    check_comparable([run for run, _ in ranked], table.root)
    run, value = first_with_checkpoint(table.root, ranked)
    path = table.root / run.name
    if args.json:
        content = {"schema": SCHEMA, "path": str(path), "metric": metric, "direction": direction}
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
    ranked = ranked_runs(runs, metric, direction)
    if not ranked:
        raise RunError(f"no run in {table.root} has a finite value of {metric}")
    readable = [run for run, _ in ranked if run.settings.get("data") is not MISSING]
    best = readable or [run for run, _ in ranked]
    check_comparable(best, table.root, option)
    return best


def ranked_runs(
    runs: Sequence[RunEntry], metric: str, direction: str
) -> list[tuple[RunEntry, Value]]:
    """Return the runs with a finite value of a metric and their best values, the best run first."""
    sign = -1.0 if direction == "max" else 1.0
    found = []
    for run in runs:
        series = run.summary(metric)
        value = None if series is None else series.best(direction)
        if value is not None:
            found.append((run, value))
    return sorted(found, key=lambda pair: sign * pair[1].value)


def without_damaged(ranked: list[tuple[RunEntry, Value]]) -> list[tuple[RunEntry, Value]]:
    """Return the runs whose data and task are known; all of them if none is known."""
    readable = [pair for pair in ranked if pair[0].settings.get("data") is not MISSING]
    skipped = len(ranked) - len(readable)
    if not readable:
        return ranked
    if skipped:
        note(f"skipped, because their config cannot be read: {run_count(skipped)}")
    return readable


def run_count(count: int) -> str:
    """Return a number of runs as text."""
    return "1 run" if count == 1 else f"{count:,} runs"


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
        advice: the end of the messages.

    Raises:
        SettingError: they differ, or no run has one.
    """
    counts: dict[str, int] = {}
    for run in runs:
        if run.monitor is not None and run.monitor in run.series:
            counts[run.monitor] = counts.get(run.monitor, 0) + 1
    if not counts:
        raise SettingError(
            f"no run has values of the metric that it ranks its checkpoints by: {advice}"
        )
    if len(counts) > 1:
        texts = ", ".join(f"{metric} ({run_count(count)})" for metric, count in counts.items())
        raise SettingError(f"the runs monitor different metrics: {texts}; {advice}")
    return next(iter(counts))


def check_comparable(runs: Sequence[RunEntry], root: Path, option: str = "--where") -> None:
    """Raise RunError if runs have different data or tasks: their metrics cannot be compared.

    Args:
        runs: those to compare.
        root: their folder.
        option: that chooses runs, for the message.
    """
    counts: dict[str, int] = {}
    for run in runs:
        values = [(key, run.settings.get(key)) for key in ("data", "task")]
        words = [
            f"{key}={'?' if value is MISSING else setting_text(value)}" for key, value in values
        ]
        label = " and ".join(words)
        counts[label] = counts.get(label, 0) + 1
    if len(counts) > 1:
        texts = ", ".join(
            f"{label} ({run_count(count)})" for label, count in list(counts.items())[:3]
        )
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


# labels and the bin


def tag(arguments: list[str]) -> int:
    """Run `framework runs tag`."""
    parser = Parser("runs tag", "Add tags to a run.", help_texts.RUNS_TAG)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("tags", nargs="+", metavar="TAG", help="a word")
    parser.add_argument("--remove", action="store_true", help="remove the tags instead")
    parser.add_argument("--root", **ROOT_OPTION)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    files = RunFiles(find_run_folder(args.root, args.run))
    tags = list(files.labels.tags)
    for word in args.tags:
        if args.remove and word not in tags:
            raise SettingError(
                f"{files.path} has no tag {word!r}; it has {', '.join(tags) or 'none'}"
            )
        if args.remove:
            tags.remove(word)
            continue
        if TAG.fullmatch(word) is None:
            expected = "a word of at most 64 letters, digits and . : / + -"
            raise SettingError(f"tag {word!r}: expected {expected}")
        if word not in tags:
            tags.append(word)
    if len(tags) > MOST_TAGS:
        raise SettingError(f"{files.path}: expected at most {MOST_TAGS} tags")
    write_labels(files, Labels(tags, files.labels.note))
    print_line(f"{files.path}: {', '.join(tags) or 'no tags'}")
    print_labels(args.json, files.path, tags, files.labels.note)
    return 0


def print_labels(as_json: bool, run: Path, tags: Sequence[str], text: str) -> None:
    """Print the tags and the note of a run as JSON, if that is wanted."""
    if as_json:
        print_json({"path": str(run), "tags": list(tags), "note": text or None})


def add_note(arguments: list[str]) -> int:
    """Run `framework runs note`."""
    parser = Parser("runs note", "Write a note on a run.", help_texts.RUNS_NOTE)
    parser.add_argument("run", metavar="RUN", help="folder of a run")
    parser.add_argument("text", metavar="TEXT", help="the note; '' removes it")
    parser.add_argument("--root", **ROOT_OPTION)
    parser.add_argument("--json", **JSON)
    args = parser.parse_args(arguments)
    if len(args.text) > MOST_NOTE:
        raise SettingError(f"note: expected at most {MOST_NOTE:,} characters")
    files = RunFiles(find_run_folder(args.root, args.run))
    write_labels(files, Labels(files.labels.tags, args.text))
    print_line(f"{files.path}: {args.text or 'no note'}")
    print_labels(args.json, files.path, files.labels.tags, args.text)
    return 0


def write_labels(files: RunFiles, labels: Labels) -> None:
    """Write tags and note; those of a damaged file are not replaced silently."""
    for problem in files.problems:
        note(f"{files.path}: {problem}")
    files.write_labels(labels)


def remove(arguments: list[str]) -> int:
    """Run `framework runs remove`."""
    parser = Parser("runs remove", "Move runs and sweeps to the bin.", help_texts.RUNS_REMOVE)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or sweep")
    parser.add_argument("--root", **ROOT_OPTION)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    paths = [find_run_folder(args.root, name, sweeps=True) for name in dict.fromkeys(args.runs)]
    moved = []
    for path, target in zip(paths, remove_runs(args.root, paths), strict=True):
        print_line(f"{path} is now {target}")
        moved.append({"path": str(path), "bin": str(target)})
    if args.json:
        print_json({"removed": moved})
    return 0


def restore(arguments: list[str]) -> int:
    """Run `framework runs restore`."""
    parser = Parser("runs restore", "Move runs back from the bin.", help_texts.RUNS_REMOVE)
    name = "name before it was removed, such as default/first"
    parser.add_argument("runs", nargs="+", metavar="NAME", help=name)
    parser.add_argument("--root", **ROOT_OPTION)
    parser.add_argument("--json", **JSON)
    args = parser.parse_intermixed_args(arguments)
    restored = []
    for text in args.runs:
        restored.append(str(restore_run(args.root, relative_name(args.root, text))))
        print_line(f"{restored[-1]} is restored")
    if args.json:
        print_json({"restored": restored})
    return 0


def relative_name(root: Path, name: str) -> str:
    """Return the name of a run below its folder of runs, from its path or its name."""
    path = expanded(name)
    return str(path.relative_to(root)) if path.is_relative_to(root) else name


def empty(arguments: list[str]) -> int:
    """Run `framework runs empty`."""
    parser = Parser("runs empty", "Delete the removed runs.", help_texts.RUNS_REMOVE)
    parser.add_argument("--root", **ROOT_OPTION)
    parser.add_argument("--json", **JSON)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    args = parser.parse_args(arguments)
    count = len(removed_runs(args.root))
    if count == 0:
        note(f"the bin of {args.root} is empty")
        if args.json:
            print_json({"deleted": 0})
        return 0
    if not args.yes:
        if args.json or not sys.stdin.isatty():
            raise FrameworkError(
                "runs empty: cannot ask without a terminal; --yes deletes the runs"
            )
        if not ask(f"Delete {count} removed runs in {args.root / BIN}? [y/N] "):
            print("not deleted")
            return 1
    deleted = empty_bin(args.root)
    print_line(f"{deleted} runs deleted")
    if args.json:
        print_json({"deleted": deleted})
    return 0


ACTIONS: dict[str, Callable[[list[str]], int]] = {
    "tag": tag,
    "note": add_note,
    "remove": remove,
    "restore": restore,
    "empty": empty,
}
