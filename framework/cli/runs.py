"""`framework runs`: list runs."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from framework.errors import wrong_option
from framework.errors.paths import expanded
from framework.errors.terminal import note, print_line, printable, shortened
from framework.runs.folder import in_default_root
from framework.runs.overview.run_filter import parse_filter
from framework.runs.overview.run_index import RunEntry, list_runs
from framework.runs.overview.run_table import (
    Column,
    RunRow,
    RunTable,
    sort_key,
    state_counts,
    sweep_states,
)
from framework.runs.run_bin import BIN

from . import help_texts
from .json_output import print_json
from .parsers import JSON, Parser
from .run_actions import ACTIONS, ROOT_OPTION
from .units import duration

ROOT: dict[str, Any] = {"nargs": "?", "type": expanded, "metavar": "ROOT"}
WHERE: dict[str, Any] = {"metavar": "FILTER", "help": "such as 'optimizer=adamw and time<60'"}
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
        raise wrong_option("--limit", args.limit, "at least 0")
    root = in_default_root(args.folder or args.root)
    if args.bin:
        root = root / BIN
        if not root.is_dir():
            note(f"the bin of {root.parent} is empty")
            if args.json:
                print_json({"root": str(root), "runs": []})
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
        if args.columns is not None:  # JSON has all columns; a wrong name is an error here too
            chosen_columns(table, rows, args.columns)
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
        raise wrong_option("--columns", text, "names of columns")
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
        shared = f" ({row.run.stacked} trials)" if row.run.stacked > 1 else ""
        return duration(value) + shared
    if column.key in SENTENCES:
        return sentence(", ".join(value) if isinstance(value, list) else value)
    return shortened(printable(", ".join(value) if isinstance(value, list) else value), MOST_CELL)


def sentence(text: str) -> str:
    """Return a sentence, on a terminal only its beginning."""
    text = printable(text)
    if len(text) <= MOST_CELL or not sys.stdout.isatty():
        return text
    return f"{text[: MOST_CELL - 3]}..."


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


def sweep_tags(table: RunTable, row: RunRow) -> str:
    """Return the tags of a sweep and of its trials."""
    tags: dict[str, None] = {}
    for run in row.trials:
        tags |= dict.fromkeys(table.tags(run))
    return shortened(printable(", ".join(tags)), MOST_CELL)


SWEEP_CELLS: dict[str, Callable[[RunTable, RunRow], str]] = {
    "name": sweep_name,
    "state": lambda table, row: state_counts(sweep_states(row, table.state)),
    "time": lambda table, row: duration(table.seconds(row) or 0.0),
    "tags": sweep_tags,
    "note": lambda table, row: sentence("" if row.sweep is None else row.sweep.note),
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
    print_json({"root": str(table.root), "runs": found}, indent=None)  # there may be 10,000 rows


def row_json(table: RunTable, row: RunRow) -> dict[str, Any]:
    """Return a row for JSON: a run, or a sweep with the states and names of its trials."""
    content = run_json(table, row.run)
    if row.sweep is None:
        return content
    return {
        "kind": "sweep",
        "name": row.sweep.name,
        "path": str(table.root / row.sweep.name),
        "states": Counter(sweep_states(row, table.state)),
        "swept": row.sweep.swept,
        "objectives": row.sweep.objectives,
        "seconds": table.seconds(row),
        "tags": row.sweep.tags,
        "note": row.sweep.note or None,
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
            "last": series.last.value,
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
        "stacked": run.stacked,
        "processes": run.processes,
        "sweep": table.field(run, "sweep"),
        "tags": table.tags(run),
        "note": table.field(run, "note"),
        "settings": run.settings.complete(),
        "metrics": metrics,
        "problems": run.problems,
    }
