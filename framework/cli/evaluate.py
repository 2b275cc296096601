"""The command `eval`: measure a trained run, with its worst samples and its curves."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from framework.errors import wrong_option
from framework.errors.paths import expanded, shorter
from framework.errors.terminal import print_line, printable
from framework.runtime.display.console import console, empty_table

from . import help_texts
from .json_output import print_json
from .parsers import CHECKPOINT, JSON, RUN, Parser, opened_run

MOST_COLUMNS = 12  # of a table; further columns of the inputs are in the JSON file
LONGEST_CELL = 60  # characters


def evaluate(arguments: list[str]) -> None:
    """Run `framework eval`."""
    args = parse_evaluate(arguments)
    trained = opened_run(args)
    split = args.split or "test"
    if args.worst is None and not args.curves:
        values = trained.evaluate(split) if args.data is None else trained.evaluate_file(args.data)
        if args.json:
            print_json({"metrics": values})
        else:
            from .output import print_values  # it imports torch

            print_values(values, trained.checkpoint)
        return
    data = trained.read_data() if args.data is None else trained.read_labelled(args.data)
    report(args, trained, data, split)


def parse_evaluate(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of `framework eval`."""
    description = "Evaluate a trained run on a split of its data, or on other data."
    parser = Parser("eval", description, help_texts.EVAL)
    parser.add_argument("run", **RUN)
    splits = ["train", "val", "test"]
    parser.add_argument("--split", choices=splits, help="default: test")
    file = "a file or folder with targets, in the format of the run's data"
    parser.add_argument("--data", type=expanded, metavar="FILE", help=file)
    worst = "print the N samples with the largest loss"
    parser.add_argument("--worst", type=int, metavar="N", help=worst)
    curves = "precision and recall, ROC and calibration of the classes"
    parser.add_argument("--curves", action="store_true", help=curves)
    parser.add_argument("--checkpoint", **CHECKPOINT)
    parser.add_argument("--json", **JSON)
    args = parser.parse_args(arguments)
    if args.data is not None and args.split is not None:
        parser.error("give --split or --data, not both")
    if args.worst is not None and args.worst < 1:
        raise wrong_option("--worst", args.worst, "at least 1")
    return args


def report(args: argparse.Namespace, trained: Any, data: Any, split: str) -> None:
    """Measure worst samples and curves, print them, and write them.

    They are printed first, also if the folder of the run cannot be written.
    """
    from framework.experiment.evaluation import reports

    name = split if args.data is None else "data"  # of the results
    document: dict[str, Any] = {"run": str(trained.run), "checkpoint": str(trained.checkpoint)}
    document["split"] = name
    files: list[Path] = []
    # everything is measured before something is printed: a wrong input prints and leaves nothing
    curves = None
    if args.curves:  # first: the first batch tells whether the task has classes
        decision = reports.decisions_of_run(trained, data, split)
        curves = reports.curves_of_run(trained, decision)
        document["curves"] = curves.summary()
    worst = None
    if args.worst is not None:
        worst = reports.worst_of_run(trained, data, split, args.worst)
        document["worst"] = worst.rows()
    print_json(document)
    if not args.json:
        print_results(worst, curves)
    if worst is not None:
        files += reports.save_worst(trained, worst, name)
    if curves is not None:
        files += reports.save_curves(trained, curves, name)
    with reports.run_logger(trained) as opened:
        if opened is not None:
            logger, step = opened
            if worst is not None:
                reports.log_worst(logger, worst, f"{name}/worst", step)
            if curves is not None:
                reports.log_curves(logger, curves, decision, f"{name}/curves", step)
    print_json(document | {"files": [str(file) for file in files]})
    if not args.json:
        for file in files:
            print_line(f"written  {shorter(file)}")
        print_line(f"from     {trained.checkpoint}")


def print_results(worst: Any, curves: Any) -> None:
    """Print the tables."""
    output = console()
    if worst is not None:
        output.print(worst_table(worst.rows()))
        print_line(f"the {len(worst)} largest losses of {worst.measured:,} samples")
    if curves is not None:
        if worst is not None:
            output.print()
        output.print(curves_table(curves.summary()))
        error = curves.calibration.error
        print_line(f"expected calibration error {error:.4f} ({curves.samples:,} samples)")


def worst_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of samples."""
    table = empty_table()
    names = list(rows[0]) if rows else []
    for name in names[:MOST_COLUMNS]:
        numeric = any(isinstance(row[name], int | float) for row in rows)
        justify: Any = "right" if numeric else "left"
        table.add_column(Text(cell_text(name)), justify=justify, overflow="fold")
    if len(names) > MOST_COLUMNS:
        table.add_column(Text("..."))
    for row in rows:
        cells = [Text(cell_text(row[name])) for name in names[:MOST_COLUMNS]]
        if len(names) > MOST_COLUMNS:
            cells.append(Text(f"{len(names) - MOST_COLUMNS} more"))
        table.add_row(*cells)
    return table


def curves_table(summary: Mapping[str, Any]) -> Table:
    """Return a table of the classes, with the mean in the last row."""
    table = empty_table()
    table.add_column(Text("class"))
    for name in ("samples", "average precision", "AUC"):
        table.add_column(Text(name), justify="right")
    for row in summary["classes"]:
        values = [cell_text(row["average_precision"]), cell_text(row["auc"])]
        table.add_row(Text(cell_text(row["class"])), str(row["positives"]), *values)
    mean = [cell_text(summary["average_precision"]), cell_text(summary["auc"])]
    table.add_row(Text("mean", "bold"), str(summary["samples"]), *mean)
    return table


def cell_text(value: Any) -> str:
    """Return a value on one line of at most `LONGEST_CELL` characters; the end is cut off."""
    from framework.experiment.evaluation.worst import text_of

    text = "-" if value is None else printable(" ".join(text_of(value).split()))
    return text if len(text) <= LONGEST_CELL else f"{text[: LONGEST_CELL - 3]}..."
