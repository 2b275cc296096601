"""The results of a sweep as a table: a row for each combination of settings, the best first."""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from framework.contracts.direction import Direction, direction_sign
from framework.errors.paths import pasted, quoted, typed
from framework.errors.terminal import message_line, printable, shortened
from framework.runs.sweep_files import Trial

from .folder import SweepFolder, short_keys

if TYPE_CHECKING:
    from rich.table import Table

MAX_METRICS = 6  # columns
MAX_WIDTH = 40  # characters of a setting's value
Objectives = Mapping[str, Direction]
"""The direction of each metric that trials are compared by; rows are sorted by the first metric."""


@dataclass
class Group:
    """Trials that differ in their seeds or folds only."""

    settings: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        """Return the metric of all trials that are done; those pruned were measured too early."""
        return [trial.metrics[metric] for trial in self.distinct() if metric in trial.metrics]

    def distinct(self) -> list[Trial]:
        """Return the trials that are done, one for equal settings: a search may repeat some."""
        found = {}
        for trial in self.trials:
            if trial.state == "done":
                found[settings_key(trial.settings)] = trial
        return list(found.values())

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values(metric) or [math.nan])

    def error(self, metric: str) -> float:
        """Return the standard error of the mean; NaN for fewer than two values."""
        values = self.values(metric)
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return math.nan
        return statistics.stdev(values) / math.sqrt(len(values))


def settings_key(settings: Mapping[str, Any]) -> str:
    """Return a text that is the same for equal settings."""
    return repr(sorted(settings.items()))


def is_repeat(key: str) -> bool:
    """Return whether a setting repeats a trial: a seed or a fold."""
    name = key.rpartition(".")[2]
    return name in ("seed", "fold") or name.endswith("_seed")


def grouped(trials: Sequence[Trial]) -> list[Group]:
    """Return the trials grouped by their settings without seeds."""
    groups: dict[str, Group] = {}
    for trial in trials:
        rest = {key: value for key, value in trial.settings.items() if not is_repeat(key)}
        groups.setdefault(settings_key(rest), Group(rest)).trials.append(trial)
    return list(groups.values())


def ranked(groups: Sequence[Group], objectives: Objectives) -> list[Group]:
    """Return the groups, the best first and those without a finite value last."""
    metric, direction = next(iter(objectives.items()))
    sign = direction_sign(direction)

    def rank(group: Group) -> tuple[bool, float]:
        mean = group.mean(metric)
        return not math.isfinite(mean), -sign * mean

    return sorted(groups, key=rank)


def best_trial(trials: Sequence[Trial], objectives: Objectives) -> Trial | None:
    """Return the best trial of the best group, or None if it has no finite value of the metric."""
    if not trials:
        return None
    metric, direction = next(iter(objectives.items()))
    sign = direction_sign(direction)
    best = None
    for trial in ranked(grouped(trials), objectives)[0].trials:
        value = trial.metrics.get(metric, math.nan)
        if trial.state != "done" or not math.isfinite(value):
            continue
        if best is None or sign * value > sign * best.metrics[metric]:
            best = trial
    return best


def pareto_front(groups: Sequence[Group], objectives: Objectives) -> list[Group]:
    """Return the groups that no other one dominates."""
    points = []
    for group in groups:
        point = []
        for metric, direction in objectives.items():
            point.append(direction_sign(direction) * group.mean(metric))
        if all(map(math.isfinite, point)):
            points.append((group, point))
    front = []
    for group, point in points:
        if not any(dominates(other, point) for _, other in points):
            front.append(group)
    return front


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether a point is better in one value and not worse in any; higher is better."""
    return list(one) != list(other) and all(a >= b for a, b in zip(one, other, strict=True))


def results_table(
    trials: Sequence[Trial], objectives: Objectives, max_rows: int | None = None
) -> "Table":
    """Return a table with a row for each trial, or for each group if trials differ in seeds."""
    from rich.table import Table
    from rich.text import Text

    groups = ranked(grouped(trials), objectives)
    settings = varied_settings(trials)
    metrics = shown_metrics(trials, objectives)
    has_repeats = any(len(group.trials) > 1 for group in groups)
    front = pareto_front(groups, objectives) if len(objectives) > 1 else []

    def row(group: Group) -> list[str]:
        cells = []
        if not has_repeats:
            cells.append(f"{group.trials[0].number:03}")
        cells += [table_text(group.settings.get(key, "")) for key in settings]
        if has_repeats:
            cells.append(str(len(group.values(next(iter(objectives))))))
        cells += [mean_text(group, metric) for metric in metrics]
        if front:
            cells.append("*" if group in front else "")
        return [*cells, state_text(group.trials)]

    names = short_keys(settings)
    columns = [names[key] for key in settings]
    if has_repeats:
        columns.append(repeats_label(trials))
    else:
        columns.insert(0, "trial")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(Text(table_text(name)), no_wrap=True, justify="left")
    for name in metrics:
        table.add_column(Text(table_text(name)), no_wrap=True, justify="right")
    for name in (["front"] if front else []) + ["state"]:
        table.add_column(Text(name), no_wrap=True, justify="left")
    for group in groups[:max_rows]:
        table.add_row(*map(Text, row(group)))
    return table


def varied_settings(trials: Sequence[Trial]) -> list[str]:
    """Return the settings that differ between trials, without seeds."""
    varied = []
    for key in dict.fromkeys(chain.from_iterable(trial.settings for trial in trials)):
        texts = {repr(trial.settings.get(key, "")) for trial in trials}
        if len(texts) > 1 and not is_repeat(key):
            varied.append(key)
    return varied


def shown_metrics(trials: Sequence[Trial], objectives: Objectives) -> list[str]:
    """Return the metrics of the table, objectives first."""
    names = list(objectives)
    for trial in trials:
        for name in trial.metrics:
            if name.startswith(("val/", "test/")) and name not in names:
                names.append(name)
    return names[: max(MAX_METRICS, len(objectives))]


def repeats_label(trials: Sequence[Trial]) -> str:
    """Return the heading of the number of trials in a group: seeds, folds or (both) runs."""
    keys: set[str] = set()
    for trial in trials:
        keys.update(filter(is_repeat, trial.settings))
    if "fold" not in keys:
        return "seeds"
    return "folds" if keys == {"fold"} else "runs"


def table_text(value: Any) -> str:
    """Return a name or value as text of a limited width."""
    if value is None:
        return "null"
    text = printable(f"{value:.5g}" if isinstance(value, float) else value)
    return shortened(text, MAX_WIDTH)


def mean_text(group: Group, metric: str) -> str:
    """Return "0.912 ± 0.004", the mean and its standard error."""
    if not group.values(metric):
        return ""
    mean = group.mean(metric)
    error = group.error(metric)
    return f"{mean:.4g}" if math.isnan(error) else f"{mean:.4g} ± {error:.2g}"


def state_text(trials: Sequence[Trial]) -> str:
    """Return the states of trials: "done", or "3 done, 1 failed"."""
    counts = Counter(trial.state for trial in trials)
    if len(counts) == 1:
        return trials[0].state
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def summary(folder: SweepFolder, trials: Sequence[Trial], objectives: Objectives) -> Iterator[str]:
    """Yield the lines below the table: errors, the best run, and commands for the next steps."""
    failed: dict[str, list[str]] = {}
    splits: set[str] = set()
    for trial in trials:
        splits.update(name.partition("/")[0] for name in trial.metrics)
        if trial.state == "failed":
            failed.setdefault(trial.error, []).append(trial.folder or f"trial {trial.number}")
    for error, names in failed.items():
        subject = names[0] if len(names) == 1 else f"{len(names)} trials, {names[0]} first"
        yield f"failed   {subject}: {message_line(error)}"
    if {"val", "test"} <= splits:
        yield (
            "values   val/... after the last step; "
            "test/... of the best checkpoint, if one was saved"
        )
    seconds = sum(trial.seconds for trial in trials)
    time = f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    steps = sum(trial.steps for trial in trials)
    yield (
        f"trials   {len(trials)}: {state_text(trials)}; "
        f"{steps:,} steps, {time} with building and testing"
    )
    best = best_trial(trials, objectives)
    if best is not None:
        metric = next(iter(objectives))
        yield f"best     {folder.path / best.folder}  {metric} {best.metrics[metric]:.4g}"
    yield f"sweep    {folder.path}"
    if not all(trial.is_finished for trial in trials):
        name = quoted(f"sweep.name={typed(folder.path.name)}")
        yield f"resume   the same command with {name} resume=auto"
    yield f"watch    framework board --root {pasted(folder.path)}"
