"""Print the results of a run."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from framework.errors.paths import pasted, real_path, shorter
from framework.errors.terminal import print_line, title
from framework.experiment.result import Result
from framework.runs.folder import plugins_of
from framework.runs.sweep_files import Trial
from framework.runtime.clock import WAITING_FOR_DATA
from framework.training.process_times import ProcessTimes
from framework.tuning.sweep.table import Objectives, best_trial

from .units import duration

MOST_PROCESSES = 8  # whose waiting time is printed
NOTABLE = 0.02  # how much slower than the mean a process is that is named


def print_result(result: Result, job: str | None = None) -> None:
    """Print the final metrics as a table of splits, the folder of the run, and the next commands.

    Args:
        result: the result of the run.
        job: the settings of a job in a sweep, such as "seed=3"; None outside a sweep.
    """
    if job is not None:
        print()
        print_line(job)
    elif sys.stdout.isatty():
        print()  # between the progress bar and the table
    for line in metric_table(result.metrics, result.weights):
        print_line(line)
    print()
    if result.seconds and result.stopped:
        print_line(f"{effort(result)}, stopped: {result.stopped}")
    elif result.seconds:
        print_line(effort(result))
    for line in [] if job is not None else time_lines(result):
        print_line(line)
    if result.advice is not None:
        print_line(f"advice   {result.advice}")
    print_line(f"run      {result.folder}")
    if result.signal is not None:
        print_line(f"resume   framework resume {run_arguments(result.folder)}")
    if job is None:
        if (result.folder / "checkpoints").is_dir() and result.split is not None:
            arguments = run_arguments(result.folder)
            if result.split != "test":
                arguments += f" --split {result.split}"
            print_line(f"measure  framework eval {arguments}")
        print_line(f"watch    framework board{root_option(result.folder)}")


def result_as_dict(result: Result) -> dict[str, Any]:
    """Return the result of a run for JSON; see conf/README.md."""
    stopped = None
    if result.stopped is not None:
        stopped = {"by": result.stopped.by, "reason": result.stopped.reason}
    return {
        "run": str(result.folder),
        "metrics": dict(result.metrics),
        "weights": dict(result.weights),
        "stopped": stopped,
        "signal": None if result.signal is None else int(result.signal),
        "steps": result.steps,
        "seconds": result.seconds,
        "fit_steps": result.fit_steps,
        "fit_seconds": result.fit_seconds,
        "shares": dict(result.shares),
        "advice": result.advice,
    }


def sweep_as_dict(folder: Path, trials: Sequence[Trial], objectives: Objectives) -> dict[str, Any]:
    """Return the results of a sweep for JSON; see conf/README.md."""
    best = best_trial(trials, objectives)
    return {
        "sweep": str(folder),
        "objectives": dict(objectives),
        "best": None if best is None else str(folder / best.folder),
        "trials": [trial_as_dict(folder, trial) for trial in trials],
    }


def trial_as_dict(folder: Path, trial: Trial) -> dict[str, Any]:
    """Return a trial of a sweep for JSON."""
    return {
        "number": trial.number,
        "run": str(folder / trial.folder) if trial.folder else None,
        "state": trial.state,
        "settings": trial.settings,
        "metrics": trial.metrics,
        "steps": trial.steps,
        "seconds": trial.seconds,
        "error": trial.error or None,
    }


def effort(result: Result) -> str:
    """Return the steps and seconds of the training in this process, and the total time."""
    if not result.fit_seconds:
        return f"{steps_text(result.steps)} in {duration(result.seconds)}"
    text = f"{steps_text(result.fit_steps)} in {duration(result.fit_seconds)}"
    if result.steps != result.fit_steps:
        text += f" (in total: {result.steps:,})"
    if result.seconds > result.fit_seconds:
        text += f"; {duration(result.seconds)} with start-up"
        if any(name.startswith("test/") for name in result.metrics):
            text += " and test"
    return text


def time_lines(result: Result) -> Iterator[str]:
    """Yield the kind of steps, the shares of the training time, and those of several processes."""
    if result.step_kind is not None:
        yield f"compile  {result.step_kind} steps, which compile=auto has kept"
    if result.shares:
        shares = [f"{share}% {part}" for part, share in percent(result.shares).items() if share]
        yield f"time     {', '.join(shares)}"
    if result.processes is not None:
        yield from process_lines(result.processes)


def process_lines(times: ProcessTimes) -> Iterator[str]:
    """Yield the communication of the processes of a run, the slowest one, and who waits for it."""
    count = len(times.seconds)
    text = f"{count} processes, {times.transfer_share():.0%} communication, "
    text += f"{times.waiting_share():.0%} waiting for each other"
    slower = times.slower()
    if slower >= NOTABLE:
        cause = f", {WAITING_FOR_DATA}" if times.is_slow_by_data() else ""
        text += f"; rank {times.slowest()} is the slowest ({slower:.0%} over the mean{cause})"
    yield f"ranks    {text}"
    if count <= MOST_PROCESSES:
        shares = zip(times.waiting(), times.seconds, strict=True)
        texts = []
        for rank, (waiting, seconds) in enumerate(shares):
            texts.append(f"rank {rank} {waiting / max(seconds, 1e-9):.0%}")
        yield f"waiting  {', '.join(texts)}"


def steps_text(steps: int) -> str:
    """Return a number of steps as text."""
    if steps == 1:
        return "1 step"
    return f"{steps:,} steps"


def run_arguments(run: Path) -> str:
    """Return the arguments that name a run on a command line, with the plugins that it needs."""
    words = [pasted(run)]
    for plugin in plugins_of(run):
        words += ["--plugins", pasted(shorter(plugin))]
    for name in plugins_of(run, "without_plugins"):
        words += ["--without-plugin", shlex.quote(name)]
    return " ".join(words)


def root_option(run: Path) -> str:
    """Return the option --root for `framework board`; "" for a run in the default folder."""
    if len(run.parts) <= 2:
        run = real_path(run)
    root = run.parent.parent
    if real_path(root) == real_path(Path("runs")):
        return ""
    return f" --root {pasted(root)}"


def percent(shares: Mapping[str, float]) -> dict[str, int]:
    """Return shares of 1 as integer percentages with the same sum: largest remainder method."""
    rounded = {name: int(share * 100) for name, share in shares.items()}
    missing = round(sum(shares.values()) * 100) - sum(rounded.values())
    by_remainder = sorted(shares, key=lambda name: rounded[name] - shares[name] * 100)
    for name in by_remainder[:missing]:
        rounded[name] += 1
    return rounded


def metric_table(
    metrics: Mapping[str, float], weights: Mapping[str, str] = MappingProxyType({})
) -> Iterator[str]:
    """Yield the lines of a table: a row for each split, a column for each metric.

    The columns are the metrics of the validation and test data, or if there are none, of the
    training data.

    Args:
        metrics: by "split/metric".
        weights: by split, the weights that were evaluated, printed after the name of the split.
    """
    if not metrics:  # of a complete run without a logger that can be read
        return
    found = {name.partition("/")[0] for name in metrics}
    labels: dict[str, str] = {}
    for split in ("train", "val", "test"):
        if split in found:
            labels[split] = split
        if split in found and split in weights:
            labels[split] = title(f"{split} ({weights[split]})")
    evaluated = [name for name in metrics if name.startswith(("val/", "test/"))]
    names = list(dict.fromkeys(name.partition("/")[2] for name in evaluated or metrics))
    titles = [title(name) for name in names]
    widths = [max(len(name), 9) for name in titles]
    first = max([5, *map(len, labels.values())]) + 1
    yield " " * first + row(titles, widths)
    for split, label in labels.items():
        values = [metrics.get(f"{split}/{name}") for name in names]
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        yield f"{label:<{first}}" + row(cells, widths)


def row(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return the cells of a table's row, right-aligned in columns of these widths."""
    return "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def print_values(values: Mapping[str, float], checkpoint: Path) -> None:
    """Print the values of an evaluation, one per line, and the checkpoint."""
    width = max(len(title(name)) for name in values)
    for name, value in values.items():
        print_line(f"{title(name):<{width}}  {value:.6g}")
    print_line(f"{'from':<{width}}  {checkpoint}")
