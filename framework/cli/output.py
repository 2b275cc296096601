"""What a person sees at the end: results in the terminal, predictions in a file."""

import csv
import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

from framework.errors import FrameworkError, RunError
from framework.errors.paths import expanded, pasted, real_path, shorter
from framework.errors.terminal import print_line, printable, title
from framework.experiment.result import Result
from framework.runs.folder import plugins_of
from framework.system.files import unwritable, write_file
from framework.system.streams import set_errors


def print_result(result: Result, job: str | None = None) -> None:
    """Print the final metrics as a table of splits, where the run lies, and what to do next.

    job: what a job of a sweep has of its own, such as "seed=3"; None outside a sweep.
    """
    if job is not None:
        print()
        print_line(job)
    elif sys.stdout.isatty():
        print()  # between the progress bar and the table
    for line in metric_table(result.metrics, result.weights):
        print_line(line)
    print()
    if result.seconds:
        print_line(effort(result) + (f", stopped: {result.stopped}" if result.stopped else ""))
    if result.shares and job is None:
        shares = percent(result.shares)
        print_line(
            f"time     {', '.join(f'{share}% {part}' for part, share in shares.items() if share)}"
        )
    if result.advice is not None:
        print_line(f"advice   {result.advice}")
    print_line(f"run      {result.folder}")
    if result.signal is not None:
        print_line(f"go on    framework resume {named(result.folder)}")
    if job is None:
        if (result.folder / "checkpoints").is_dir() and result.split is not None:
            of_split = "" if result.split == "test" else f" --split {result.split}"
            print_line(f"measure  framework eval {named(result.folder)}{of_split}")
        print_line(f"watch    framework board{root_of(result.folder)}")


def effort(result: Result) -> str:
    """Return steps and seconds of the training in this process, then what else took time."""
    if not result.fit_seconds:
        return f"{steps_text(result.steps)} in {duration(result.seconds)}"
    text = f"{steps_text(result.fit_steps)} in {duration(result.fit_seconds)}"
    if result.steps != result.fit_steps:
        text += f" (with those before: {result.steps:,})"
    if result.seconds > result.fit_seconds:
        tested = " and test" if any(name.startswith("test/") for name in result.metrics) else ""
        text += f"; {duration(result.seconds)} with start-up{tested}"
    return text


def steps_text(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps:,} steps"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def named(run: Path) -> str:
    """Return how a run is given to a command: with the plugins that it was trained with."""
    words = [pasted(run)]
    for plugin in plugins_of(run):
        words += ["--plugins", pasted(shorter(plugin))]
    for name in plugins_of(run, "without_plugins"):
        words += ["--without-plugin", shlex.quote(name)]
    return " ".join(words)


def root_of(run: Path) -> str:
    """Return the option by which `framework board` shows a run: none below the default root."""
    root = run.parent.parent if len(run.parts) > 2 else real_path(run).parent.parent
    return "" if real_path(root) == real_path(Path("runs")) else f" --root {pasted(root)}"


def percent(shares: Mapping[str, float]) -> dict[str, int]:
    """Return shares of 1 in whole per cent that add up to 100: those cut off most are rounded up."""
    cut = {name: int(share * 100) for name, share in shares.items()}
    most_cut = sorted(shares, key=lambda name: cut[name] - shares[name] * 100)
    missing = round(sum(shares.values()) * 100) - sum(cut.values())
    return {name: whole + (name in most_cut[:missing]) for name, whole in cut.items()}


def metric_table(
    metrics: Mapping[str, float], weights: Mapping[str, str] = MappingProxyType({})
) -> Iterator[str]:
    """Yield lines: a row for each split, a column for each measure of validation or test data.

    Args:
        metrics: by "split/measure".
        weights: by split, the weights that were measured; written behind the split.
    """
    splits = [
        s for s in ("train", "val", "test") if any(name.startswith(f"{s}/") for name in metrics)
    ]
    measured = [name.partition("/")[2] for name in metrics if name.startswith(("val/", "test/"))]
    names = list(dict.fromkeys(measured or [n.partition("/")[2] for n in metrics]))
    titles = [title(name) for name in names]
    widths = [max(len(name), 9) for name in titles]
    labels = [
        title(f"{split} ({weights[split]})") if split in weights else split for split in splits
    ]
    first = max([5, *map(len, labels)]) + 1
    yield " " * first + "".join(
        f"  {name:>{width}}" for name, width in zip(titles, widths, strict=True)
    )
    for split, label in zip(splits, labels, strict=True):
        values = [metrics.get(f"{split}/{name}") for name in names]
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        yield f"{label:<{first}}" + "".join(
            f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True)
        )


def print_values(values: Mapping[str, float], checkpoint: Path) -> None:
    """Print the values of an evaluation, a line each."""
    width = max(len(title(name)) for name in values)
    for name, value in values.items():
        print_line(f"{title(name):<{width}}  {value:.6g}")
    print_line(f"{'from':<{width}}  {checkpoint}")


def check_output(output: str) -> None:
    """Raise FrameworkError, before anything is computed, when predictions cannot go to that file."""
    path = expanded(output)
    if output == "-":
        return
    if path.suffix not in (".csv", ".jsonl", ".npz"):
        raise FrameworkError(
            f"--output {output}: the suffix should be .csv, .jsonl or .npz, or - for the terminal"
        )
    if path.is_dir() or not path.parent.is_dir():
        raise FrameworkError(
            f"--output {output}: {'is a folder' if path.is_dir() else f'no folder {path.parent}'}"
        )


def write_predictions(columns: Mapping[str, Any], classes: Sequence[str], output: str) -> int:
    """Write predictions as .csv, .jsonl or .npz ("-": CSV for the terminal); returns the number of rows.

    In a file, texts are as they are. For the terminal, control characters in them are escaped, also if stdout is
    a pipe.
    A class index gets its name beside it, and columns of probabilities are named after the classes.
    Raises FrameworkError for another suffix, or when the file cannot be written.
    """
    check_output(output)
    named = flatten(columns, classes)
    if output == "-":
        set_errors(sys.stdout, "backslashreplace")  # data: what cannot be encoded must not get lost
        write_csv(named, sys.stdout, printable)
    else:
        try:
            write_columns(named, expanded(output))
        except RunError as error:
            raise FrameworkError(f"--output {output}: {error}") from error
    return len(next(iter(named.values())))


def flatten(columns: Mapping[str, Any], classes: Sequence[str]) -> dict[str, list[Any]]:
    """Return columns of single values: a matrix becomes a column for each class or number."""
    flat: dict[str, list[Any]] = {}
    for name, values in columns.items():
        listed = values.tolist() if hasattr(values, "tolist") else list(values)
        if name == "class" and classes:
            flat["class"] = [classes[index] for index in listed]
            flat["index"] = listed
        elif listed and isinstance(listed[0], list):
            width = len(listed[0])
            names = (
                list(classes) if len(classes) == width else [str(number) for number in range(width)]
            )
            flat |= {f"{name}:{label}": [row[i] for row in listed] for i, label in enumerate(names)}
        else:
            flat[name] = listed
    return flat


def write_columns(columns: Mapping[str, list[Any]], path: Path) -> None:
    """Write columns into a file, by its suffix. Raises RunError when it cannot be written.

    A file is written whole or not at all, also where a link leads to it; into a device or pipe it goes as it comes.
    """
    content = {".npz": npz_of, ".csv": csv_of, ".jsonl": json_lines_of}[path.suffix](columns)
    target = real_path(path)
    if target.is_file() or not target.exists():
        write_file(target.parent, target.name, content)
        return
    try:
        target.write_bytes(content)
    except OSError as error:
        raise unwritable(path, error, len(content)) from error


def npz_of(columns: Mapping[str, list[Any]]) -> bytes:
    import numpy

    content = io.BytesIO()
    numpy.savez(content, **{name: numpy.asarray(values) for name, values in columns.items()})  # type: ignore[arg-type]
    return content.getvalue()


def csv_of(columns: Mapping[str, list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    write_csv(columns, text)
    return text.getvalue().encode()


def json_lines_of(columns: Mapping[str, list[Any]]) -> bytes:
    lines = []
    for row in zip(*columns.values(), strict=True):
        named = dict(zip(columns, row, strict=True))
        lines.append(json.dumps(named, default=str) + "\n")  # JSON has no complex numbers
    return "".join(lines).encode()


def write_csv(
    columns: Mapping[str, list[Any]], file: TextIO, shown: Callable[[Any], str] = str
) -> None:
    """Write columns as CSV, with their names and texts as `shown` returns them."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(shown, columns))
    for row in zip(*columns.values(), strict=True):
        writer.writerow([shown(cell) if isinstance(cell, str) else cell for cell in row])
