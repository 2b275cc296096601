"""What came of the trials of a sweep, as a table: seeds put together, the best first."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from framework.errors.paths import pasted, quoted, typed
from framework.errors.terminal import message_line, printable, shortened

from .folder import SweepFolder, Trial, short_keys

if TYPE_CHECKING:
    from rich.table import Table

MOST_COLUMNS = 6  # of metrics
WIDEST = 40  # characters of a setting's value
Direction = Mapping[str, str]
"""By metric that trials are compared by: "min" or "max"; the first sorts."""


@dataclass
class Group:
    """Trials that differ in their seeds, or folds, alone."""

    settings: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        """Return the values of the trials that ended well; one that was pruned has been measured early."""
        return [trial.metrics[metric] for trial in self.distinct() if metric in trial.metrics]

    def distinct(self) -> list[Trial]:
        """Return the trials that ended well, one of each setting: a search may try one again."""
        found = {
            repr(sorted(trial.settings.items())): trial
            for trial in self.trials
            if trial.state == "done"
        }
        return list(found.values())

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values(metric) or [math.nan])

    def error(self, metric: str) -> float:
        """Return the standard error of the mean; NaN of fewer than two values."""
        values = self.values(metric)
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return math.nan
        return statistics.stdev(values) / math.sqrt(len(values))


def is_seed(key: str) -> bool:
    name = key.rpartition(".")[2]
    return name in ("seed", "fold") or name.endswith("_seed")


def grouped(trials: Sequence[Trial]) -> list[Group]:
    """Return trials by their settings but seeds."""
    found: dict[str, Group] = {}
    for trial in trials:
        rest = {key: value for key, value in trial.settings.items() if not is_seed(key)}
        found.setdefault(repr(sorted(rest.items())), Group(rest)).trials.append(trial)
    return list(found.values())


def ranked(groups: Sequence[Group], by: Direction) -> list[Group]:
    """Return groups, the best first; those without a value last."""
    metric, mode = next(iter(by.items()))

    def key(group: Group) -> tuple[bool, float]:
        mean = group.mean(metric)
        return (not math.isfinite(mean), -mean if mode == "max" else mean)

    return sorted(groups, key=key)


def best_trial(trials: Sequence[Trial], by: Direction) -> Trial | None:
    """Return the best trial of the best settings, or None when none has a value of the metric."""
    metric, mode = next(iter(by.items()))
    for group in ranked(grouped(trials), by)[:1]:
        fine = [
            trial
            for trial in group.trials
            if trial.state == "done" and math.isfinite(metric_value(trial, metric))
        ]
        if fine:
            return min(
                fine,
                key=lambda trial: (
                    -metric_value(trial, metric) if mode == "max" else metric_value(trial, metric)
                ),
            )
    return None


def metric_value(trial: Trial, metric: str) -> float:
    return trial.metrics.get(metric, math.nan)


def on_front(groups: Sequence[Group], by: Direction) -> list[Group]:
    """Return those that none is better than in one metric without being worse in another (the Pareto front)."""
    signs = {metric: 1 if mode == "min" else -1 for metric, mode in by.items()}
    points = [
        (group, [sign * group.mean(metric) for metric, sign in signs.items()]) for group in groups
    ]
    points = [(group, point) for group, point in points if all(map(math.isfinite, point))]
    return [
        group for group, point in points if not any(dominates(other, point) for _, other in points)
    ]


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return list(one) != list(other) and all(a <= b for a, b in zip(one, other, strict=True))


def columns(trials: Sequence[Trial], by: Direction) -> tuple[list[str], list[str]]:
    """Return the settings that differ, seeds apart, and the metrics to show: those asked for first."""
    keys = dict.fromkeys(key for trial in trials for key in trial.settings if not is_seed(key))
    differ = [
        key for key in keys if len({repr(trial.settings.get(key, "")) for trial in trials}) > 1
    ]
    measured = dict.fromkeys(
        n for trial in trials for n in trial.metrics if n.startswith(("val/", "test/"))
    )
    metrics = list(dict.fromkeys([*by, *measured]))
    return differ, metrics[: max(MOST_COLUMNS, len(by))]


def table(trials: Sequence[Trial], by: Direction, most: int | None = None) -> "Table":
    """Return a row for each trial, or for each of their groups where seeds differ, at most so many."""
    from rich.table import Table
    from rich.text import Text

    groups = ranked(grouped(trials), by)
    settings, metrics = columns(trials, by)
    seeds = any(len(group.trials) > 1 for group in groups)
    kinds = {name for trial in trials for name in trial.settings if is_seed(name)}
    count = "seeds"
    if "fold" in kinds:
        count = "folds" if kinds == {"fold"} else "runs"
    front = on_front(groups, by) if len(by) > 1 else []
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in (
        *([] if seeds else ["trial"]),
        *map(short_keys(settings).get, settings),
        *([count] if seeds else []),
    ):
        drawn.add_column(Text(table_text(name)), no_wrap=True, justify="left")
    for name in (*metrics, *(["front"] if front else []), "state"):
        drawn.add_column(
            Text(table_text(name)), no_wrap=True, justify="right" if name in metrics else "left"
        )
    for group in groups[:most]:
        cells = [] if seeds else [f"{group.trials[0].number:03}"]
        cells += [
            table_text(group.settings[key]) if key in group.settings else "" for key in settings
        ]
        cells += [str(len(group.values(next(iter(by)))))] if seeds else []
        cells += [measured(group, metric) for metric in metrics]
        cells += [("*" if group in front else "")] if front else []
        drawn.add_row(*map(Text, [*cells, states(group.trials)]))
    return drawn


def table_text(value: Any) -> str:
    """Return a name or a value as the table shows it."""
    if value is None:
        return "null"
    text = printable(f"{value:.5g}" if isinstance(value, float) else value)
    return shortened(text, WIDEST)


def measured(group: Group, metric: str) -> str:
    """Return "0.912 ± 0.004", the mean and its standard error."""
    mean, error = group.mean(metric), group.error(metric)
    if not group.values(metric):
        return ""
    return f"{mean:.4g}" if math.isnan(error) else f"{mean:.4g} ± {error:.2g}"


def states(trials: Sequence[Trial]) -> str:
    """Return what the trials are: "done", or "3 done, 1 failed"."""
    found = [trial.state for trial in trials]
    counted = [f"{found.count(state)} {state}" for state in dict.fromkeys(found)]
    return found[0] if len(counted) == 1 else ", ".join(counted)


def ending(folder: SweepFolder, trials: Sequence[Trial], by: Direction) -> Iterator[str]:
    """Yield the lines below the table: what failed and why, where the best run lies, what to do next."""
    failed: dict[str, list[str]] = {}
    for trial in trials:
        if trial.state == "failed":
            failed.setdefault(trial.error, []).append(trial.folder or f"trial {trial.number}")
    for error, names in failed.items():
        which = names[0] if len(names) == 1 else f"{len(names)} trials, {names[0]} first"
        yield f"failed   {which}: {message_line(error)}"
    if {"val", "test"} <= {name.partition("/")[0] for trial in trials for name in trial.metrics}:
        yield "values   val/... after the last step; test/... of the best checkpoint, if one was saved"
    seconds = sum(trial.seconds for trial in trials)
    time = f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    steps = sum(trial.steps for trial in trials)
    yield f"trials   {len(trials)}: {states(trials)}; {steps:,} steps, {time} with building and testing"
    best, metric = best_trial(trials, by), next(iter(by))
    if best is not None:
        yield f"best     {folder.path / best.folder}  {metric} {best.metrics[metric]:.4g}"
    yield f"sweep    {folder.path}"
    if any(not trial.over for trial in trials):
        yield f"go on    the same command with {quoted(f'sweep.name={typed(folder.path.name)}')} resume=auto"
    yield f"watch    framework board --root {pasted(folder.path)}"
