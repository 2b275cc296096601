"""The columns of a list of runs, their values, and the rows with sweeps collapsed."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from framework.errors import Facts, SettingError, nearest, suggestion
from framework.runs.run_files import Value, setting_named

from .run_index import MISSING, RunEntry, RunList, SweepEntry, experiment_of

Statistic = Literal["best", "last", "min", "max", "step"]
FIELDS = (
    "name",
    "experiment",
    "state",
    "reason",
    "step",
    "total_steps",
    "started",
    "updated",
    "time",
    "processes",
    "sweep",
    "tags",
    "note",
    "problems",
)
"""Columns that are neither settings nor metrics."""
NOT_COMPARED = ("run", "plugins", "sweep")
"""Sections that do not belong to the settings in which runs differ."""
MOST_SETTINGS = 8  # columns
MOST_LOOKED_AT = 1000  # runs by which the heading of a column is chosen
MOST_LISTED = 12  # metrics, in the message on an unknown column
MOST_METRICS = 4  # columns besides the monitored metric


@dataclass(frozen=True)
class Column:
    """A column of the list.

    Attributes:
        kind: a field of the run, a setting or a metric.
        key: its name: "state", "optimizer.lr" or "val/loss".
        statistic: of a metric: its best, last, lowest or highest value, or the step of the best.
    """

    kind: Literal["field", "setting", "metric"]
    key: str
    statistic: Statistic = "best"

    @property
    def title(self) -> str:
        """The heading, and what `--columns` takes."""
        return f"{self.key}:{self.statistic}" if self.kind == "metric" else self.key


@dataclass
class RunRow:
    """A row: a run, or a sweep with the trials that were selected.

    Attributes:
        run: the run; of a sweep its best trial.
        trials: the selected trials of a sweep; empty for a run.
        sweep: the sweep; None for a run.
    """

    run: RunEntry
    trials: list[RunEntry] = field(default_factory=list)
    sweep: SweepEntry | None = None


class RunTable:
    """The values of all columns for the runs in a folder."""

    def __init__(self, listing: RunList):
        self.listing = listing
        self.root: Path = listing.root
        self.runs = listing.runs
        self._states: dict[str, str] = {}
        self._settings: list[str] | None = None
        self._metrics: list[str] | None = None
        self._directions: dict[str, str | None] = {}

    @property
    def settings(self) -> list[str]:
        """The settings of all runs, by dotted key."""
        if self._settings is None:
            found: dict[str, None] = {}
            bases = {experiment_of(run.name): run.settings.base for run in self.runs}
            for base in bases.values():
                found |= dict.fromkeys(base)
            for run in self.runs:
                found |= dict.fromkeys(run.settings.changes)
            self._settings = list(found)
        return self._settings

    @property
    def metrics(self) -> list[str]:
        """The metrics of all runs."""
        if self._metrics is None:
            found: dict[str, None] = {}
            for run in self.runs:
                found |= dict.fromkeys(run.series)
            self._metrics = list(found)
        return self._metrics

    def column(self, text: str, place: str) -> Column:
        """Return the column of a name.

        Args:
            text: a field, a setting (also its last part if that is unique), or a metric, perhaps
                with a statistic, such as val/loss:last.
            place: the beginning of the message.

        Raises:
            SettingError: there is no such column.
        """
        if text in FIELDS:
            return Column("field", text)
        if text in self.settings:
            return Column("setting", text)
        metric, colon, statistic = text.rpartition(":")
        if not colon or metric not in self.metrics:
            metric = text
            statistic = "last" if self.direction(text) is None else "best"
        if metric in self.metrics:
            for known in get_args(Statistic):
                if statistic == known:
                    return Column("metric", metric, known)
            expected = ", ".join(get_args(Statistic))
            raise SettingError(f"{place}: expected one of {expected} after {metric}:, got {text!r}")
        setting = setting_named(text, self.settings, place)
        if setting is not None:
            return Column("setting", setting)
        available = [*FIELDS, *self.metrics, *self.settings]
        last_words = [key.rpartition(".")[2] for key in self.settings]
        options = [*available, *last_words]
        advice = suggestion(text, options)
        if not advice:
            listed = ", ".join([*FIELDS, *self.metrics[:MOST_LISTED]])
            advice = f"; expected a setting such as optimizer.lr, or one of {listed}"
        error = SettingError(f"{place}: there is no column {text!r}{advice}")
        similar = nearest(text, options)
        raise error.with_facts(Facts(place, text, "name of a column", suggestion=similar))

    def title(self, column: Column) -> str:
        """Return the heading of a column: `lr` for optimizer.lr if no other setting ends in lr."""
        if column.kind != "setting":
            return column.title
        if any(run.settings.get(column.key) == {} for run in self.runs[:MOST_LOOKED_AT]):
            return column.key  # an entry of a list of parts
        last = column.key.rpartition(".")[2]
        ending = [key for key in self.settings if key == last or key.endswith(f".{last}")]
        return last if len(ending) == 1 and last not in FIELDS else column.key

    def state(self, run: RunEntry) -> str:
        """Return the state of a run; it is looked up once."""
        if run.name not in self._states:
            self._states[run.name] = run.state_in(self.root)
        return self._states[run.name]

    def value(self, run: RunEntry, column: Column) -> Any:
        """Return the value of a run in a column; None if it has none."""
        if column.kind == "setting":
            value = run.settings.get(column.key)
            if value is MISSING:
                return None
            return "null" if value is None else value
        if column.kind == "metric":
            return self.metric_value(run, column)
        return self.field(run, column.key)

    def metric_value(self, run: RunEntry, column: Column) -> float | int | None:
        """Return a statistic of a metric; None if the run does not have it."""
        series = run.summary(column.key)
        if series is None:
            return None
        value: Value | None = series.last
        if column.statistic in ("best", "step"):
            direction = self.direction(column.key, run)
            value = None if direction is None else series.best(direction)
        elif column.statistic in ("min", "max"):
            value = series.best(column.statistic)
        if value is None:
            return None
        return value.step if column.statistic == "step" else value.value

    def direction(self, metric: str, run: RunEntry | None = None) -> str | None:
        """Return "min" or "max" for a metric; None if it is not known.

        Args:
            metric: its name.
            run: a run, which may record it; runs of earlier versions do not. By default, and if
                it does not, the direction on which all runs that record one agree.
        """
        own = None if run is None else run.direction(metric)
        if own is not None:
            return own
        if metric not in self._directions:
            found = {run.direction(metric) for run in self.runs if metric in run.series} - {None}
            self._directions[metric] = found.pop() if len(found) == 1 else None
        return self._directions[metric]

    def field(self, run: RunEntry, name: str) -> Any:
        """Return a field of a run; None if it is not known."""
        if name == "state":
            return self.state(run)
        if name == "experiment":
            return experiment_of(run.name)
        if name == "sweep":
            return run.sweep if self.listing.sweep_of(run) is not None else None
        if name in ("started", "updated"):
            seconds = getattr(run, name)
            return None if seconds is None else date_text(seconds)
        if name == "time":
            return run.seconds
        if name == "tags":
            return self.tags(run) or None
        if name == "note":
            sweep = self.listing.sweep_of(run)
            return run.note or (sweep.note if sweep is not None else "") or None
        value = getattr(run, name)
        return None if value in ("", []) else value

    def tags(self, run: RunEntry) -> list[str]:
        """Return the tags of a run, after those of its sweep."""
        sweep = self.listing.sweep_of(run)
        if sweep is None or not sweep.tags:
            return run.tags
        return list(dict.fromkeys([*sweep.tags, *run.tags]))

    def seconds(self, row: RunRow) -> float | None:
        """Return the time of a run; of a sweep, that of the selected trials together.

        Trials that trained together as one model have their share of the common time.
        """
        if row.sweep is None:
            return row.run.seconds
        return sum((run.seconds or 0.0) / run.stacked for run in row.trials)

    def selected(
        self, predicate: Callable[[Callable[[str], Any]], bool], columns: dict[str, Column]
    ) -> list[RunEntry]:
        """Return the runs that match a filter.

        Args:
            predicate: see `run_filter.parse_filter`.
            columns: the columns of the filter, by name.
        """
        found = []
        for run in self.runs:

            def value(name: str, run: RunEntry = run) -> Any:
                return self.value(run, columns[name])

            if predicate(value):
                found.append(run)
        return found

    def rows(self, runs: Sequence[RunEntry], expand: bool) -> list[RunRow]:
        """Return a row for each run, or one for all trials of a sweep, in the order of the runs."""
        rows: list[RunRow] = []
        sweeps: dict[str, RunRow] = {}
        for run in runs:
            sweep = None if expand else self.listing.sweep_of(run)
            if sweep is None:
                rows.append(RunRow(run))
                continue
            row = sweeps.get(sweep.name)
            if row is None:
                row = sweeps[sweep.name] = RunRow(run, [], sweep)
                rows.append(row)
            row.trials.append(run)
        for row in sweeps.values():
            row.run = best_trial(row)
        return rows

    def sorted_rows(self, rows: Sequence[RunRow], column: Column, reverse: bool) -> list[RunRow]:
        """Return rows by their values in a column: metrics best first, all others ascending.

        Rows without a value come last. A metric of which it is not known whether low or high values
        are better is sorted in ascending order.
        """
        with_value = []
        without = []
        for row in rows:
            value = self.value(row.run, column)
            if column == Column("field", "time"):
                value = self.seconds(row)
            if value is None or (isinstance(value, float) and math.isnan(value)):
                without.append(row)
            else:
                with_value.append((sort_key(value), row))
        is_value = column.kind == "metric" and column.statistic != "step"
        descending = is_value and self.direction(column.key) == "max"
        with_value.sort(key=lambda pair: pair[0], reverse=descending != reverse)
        return [*(row for _, row in with_value), *without]

    def varied_settings(self, runs: Sequence[RunEntry]) -> list[str]:
        """Return the settings in which runs differ: parts first, then those that most runs have.

        A setting that some runs lack, since they have other parts, differs only if the others have
        several values of it. The entry of a list of parts differs if some runs lack it.
        """
        readable = [run.settings for run in runs if run.settings]
        counts: dict[str, int] = {}
        entries = set()
        for key in self.changed_settings(runs):
            values = [settings.get(key) for settings in readable]
            found = {value if isinstance(value, str) else repr(value) for value in values}
            missing = sum(value is MISSING for value in values)
            if "{}" in found:
                entries.add(key)
            elif missing:
                found.discard(repr(MISSING))
            if len(found) > 1:
                counts[key] = len(values) - missing
        parts = {key.rpartition(".")[0] for key in self.settings}
        return sorted(counts, key=lambda key: (key in entries, key not in parts, -counts[key]))

    def changed_settings(self, runs: Sequence[RunEntry]) -> list[str]:
        """Return the settings in which runs may differ: all others are equal in their bases."""
        found: dict[str, None] = {}
        bases: list[Mapping[str, Any]] = []
        for run in runs:
            found |= dict.fromkeys(run.settings.changes)
            if not any(run.settings.base is base for base in bases):
                bases.append(run.settings.base)
        for base in bases[1:]:
            for key in {**bases[0], **base}:
                if bases[0].get(key, MISSING) != base.get(key, MISSING):
                    found[key] = None
        return [key for key in found if key.partition(".")[0] not in NOT_COMPARED]

    def default_columns(self, rows: Sequence[RunRow]) -> list[Column]:
        """Return the columns that a list shows if the user does not choose them."""
        runs = [run for row in rows for run in (row.trials or [row.run])]
        settings = self.varied_settings(runs)[:MOST_SETTINGS]
        columns = [Column("field", "name"), Column("field", "state")]
        columns += [Column("setting", key) for key in settings]
        columns += self.default_metrics(runs)
        columns.append(Column("field", "time"))
        if any(run.processes not in (None, 1) for run in runs):
            columns.append(Column("field", "processes"))
        for name in ("tags", "note"):
            if any(self.field(run, name) for run in runs):
                columns.append(Column("field", name))
        return columns

    def default_metrics(self, runs: Sequence[RunEntry]) -> list[Column]:
        """Return the metrics of a list: the monitored one, and others of val/ and test/."""
        monitors = Counter(run.monitor for run in runs if run.monitor in run.series)
        counts: Counter[str] = Counter()
        for run in runs:
            counts.update(run.series.keys())
        chosen = [str(metric) for metric, _ in monitors.most_common(2)]
        columns = []
        for metric in chosen:
            columns += [Column("metric", metric, "best"), Column("metric", metric, "last")]
        others = []
        for split in ("val/", "test/"):
            for metric, _ in counts.most_common():
                if metric.startswith(split) and metric not in chosen:
                    known = split == "val/" and self.direction(metric) is not None
                    others.append(Column("metric", metric, "best" if known else "last"))
        if not chosen and not others:
            others = [Column("metric", metric, "last") for metric in counts if "/loss" in metric]
        return columns + others[:MOST_METRICS]


def best_trial(row: RunRow) -> RunEntry:
    """Return the best of the selected trials, by the last value of the sweep's first objective."""
    assert row.sweep is not None
    for metric, direction in row.sweep.objectives.items():
        sign = -1.0 if direction == "max" else 1.0
        ranked = []
        for number, run in enumerate(row.trials):
            series = run.summary(metric)
            if series is not None and math.isfinite(series.last.value):
                ranked.append((sign * series.last.value, number))
        if ranked:
            return row.trials[min(ranked)[1]]
    return row.trials[0]


def sort_key(value: Any) -> tuple[int, Any]:
    """Return a key by which values of one column can be sorted: numbers before texts."""
    if isinstance(value, int | float):
        return (0, value)
    return (1, value if isinstance(value, str) else json.dumps(value, default=str))


def date_text(seconds: float) -> str:
    """Return a time as 2026-12-01 09:30:00, in the time zone of this machine."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return ""


def state_counts(states: Iterable[str]) -> str:
    """Return "12 done" or "10 done, 2 failed"."""
    counts = Counter(states)
    return ", ".join(f"{count} {state}" for state, count in counts.most_common())


def sweep_states(row: RunRow, state: Callable[[RunEntry], str]) -> Iterator[str]:
    """Yield the state of each trial of a sweep, also of those without a folder."""
    assert row.sweep is not None
    names = set()
    for run in row.trials:
        names.add(run.name.rpartition("/")[2])
        yield state(run)
    if len(names) < len(row.sweep.trials):
        for folder, recorded in row.sweep.trials:
            if not folder:
                yield recorded
