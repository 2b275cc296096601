"""Compare runs from the files in their folders: settings, code, versions, data, metrics, time.

A run may have been killed, be running, or be of an older version: what its files do not tell is
left out, and listed in `Diff.problems`. This module does not import torch.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from framework.contracts.history import Curve
from framework.errors import RunError, short
from framework.runs.requests import EventReader, row_text
from framework.runs.run_files import RunFiles, Value
from framework.runs.run_time import read_time

LISTS = {
    "metrics": "metric",
    "transforms": "transform",
    "callbacks": "callback",
    "loggers": "logger",
}
"""The kind of the parts in each list of parts of an experiment, by its key."""
OF_THE_FOLDER = ("run", "run.")
DEFAULT = "default"
UNKNOWN = "not recorded"
MOST_POINTS = 4096  # of a curve
MOST_EVENTS = 100
CHANGED_FILE = re.compile(r"^diff --git a/.* b/(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Setting:
    """A setting of one run: its value, and the place that gives it."""

    value: Any
    source: str

    @property
    def is_default(self) -> bool:
        """Whether no file and no override gives the value."""
        return self.source.startswith(DEFAULT)


@dataclass
class Row:
    """A line of the comparison: a value for each run, None for a run that has none."""

    name: str
    values: list[Any]

    @property
    def differs(self) -> bool:
        """Whether the runs do not all have the same value."""
        return any(not equal(self.values[0], value) for value in self.values[1:])

    def as_dict(self) -> dict[str, Any]:
        """Return the row in plain values."""
        return {"name": self.name, "values": [plain(value) for value in self.values]}


@dataclass
class Diff:
    """The differences between runs.

    Attributes:
        names: a short name of each run.
        runs: the files of the runs.
        settings: those that differ; the values are of type `Setting`.
        hidden: the number of settings that only some runs have, all at their defaults.
        code: git commit and diff, and the sources of parts, that differ.
        versions: of Python, of packages and of the platform, that differ.
        data: facts of the data that differ, and whether its content is the same.
        metrics: the last and best values (`MetricValue`) of each metric.
        time: state, steps, seconds and speed.
        events: by run, what `framework tell` has changed.
        problems: by run, what could not be read.
    """

    names: list[str]
    runs: list[RunFiles]
    settings: list[Row] = field(default_factory=list)
    hidden: int = 0
    code: list[Row] = field(default_factory=list)
    versions: list[Row] = field(default_factory=list)
    data: list[Row] = field(default_factory=list)
    metrics: list[Row] = field(default_factory=list)
    time: list[Row] = field(default_factory=list)
    events: list[list[str]] = field(default_factory=list)
    problems: list[list[str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison in plain values."""
        runs = []
        for name, run, events, problems in zip(
            self.names, self.runs, self.events, self.problems, strict=True
        ):
            about = {"name": name, "path": str(run.path), "state": run.state}
            runs.append(about | {"events": events, "problems": problems})
        parts: dict[str, Any] = {"runs": runs}
        for part in ("settings", "code", "versions", "data", "metrics", "time"):
            rows: list[Row] = getattr(self, part)
            parts[part] = [row.as_dict() for row in rows]
        return parts


@dataclass(frozen=True)
class MetricValue:
    """The last value of a metric, and the best one if the direction of the metric is known."""

    last: Value
    best: Value | None


def compare(runs: Sequence[RunFiles]) -> Diff:
    """Return the differences between two or more runs."""
    diff = Diff(names=short_names([run.path for run in runs]), runs=list(runs))
    diff.settings, diff.hidden = settings_rows(runs)
    diff.code = code_rows(runs)
    diff.versions = differing(rows_of([versions_of(run) for run in runs]))
    diff.data = data_rows(runs)
    diff.metrics = metric_rows(runs)
    diff.time = rows_of([time_of(run) for run in runs])
    diff.events = [list(events_of(run)) for run in runs]
    diff.problems = [list(dict.fromkeys(run.problems)) for run in runs]
    return diff


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the names of folders, with those of the folders above if that is needed."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(set(map(str, paths))):
            return names
    return [str(path) for path in paths]


def equal(one: Any, other: Any) -> bool:
    """Return whether two values are equal; NaN is equal to NaN."""
    if isinstance(one, Setting) and isinstance(other, Setting):
        return equal(one.value, other.value)
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def rows_of(columns: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each name in the columns of the runs."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [Row(name, [column.get(name) for column in columns]) for name in names]


def differing(rows: Iterable[Row]) -> list[Row]:
    """Return the rows whose values differ."""
    return [row for row in rows if row.differs]


# settings


def settings_rows(runs: Sequence[RunFiles]) -> tuple[list[Row], int]:
    """Return the settings that differ, and the number of those that are left out.

    A run without a part has none of its settings: these are left out where they have defaults.
    """
    rows = []
    hidden = 0
    for row in rows_of([settings_of(run) for run in runs]):
        if not row.differs:
            continue
        is_partial = any(value is None for value in row.values)
        if is_partial and all(value is None or value.is_default for value in row.values):
            hidden += 1
        else:
            rows.append(row)
    return rows, hidden


def settings_of(run: RunFiles) -> dict[str, Setting]:
    """Return the settings of a run, without those of its folder, by their paths."""
    values: dict[str, Any] = {}
    for key, value in run.settings.items():
        first, _, rest = key.partition(".")
        if first in LISTS and rest:  # the part itself, which may have no settings
            name = rest.partition(".")[0]
            values.setdefault(f"{first}.{name}", name)
        if not key.startswith(OF_THE_FOLDER) and not (first in LISTS and value == {}):
            values[key] = value
    recorded = run.provenance.get("settings")
    sources = recorded if isinstance(recorded, dict) else None
    found = {}
    for path, value in values.items():
        found[path] = Setting(value, source_of(run, path, sources))
    return found


def source_of(run: RunFiles, path: str, sources: Mapping[str, Any] | None) -> str:
    """Return the place that gives a setting of a run.

    Args:
        run: the run.
        path: of the setting.
        sources: those in its provenance.json; None in a run of an older version.
    """
    places = None
    if sources is not None:
        places = sources.get(path, sources.get(f"{path}.name"))
    used = None
    for place in places if isinstance(places, list) else ():
        if isinstance(place, dict) and "other_part" not in place:
            used = place
    if used is not None:
        place = str(used.get("place", ""))
        by = str(used.get("by", ""))
        return f"{place}: {by}" if by else place
    if sources is None:
        return typed_source(run, path)
    return default_source(run, path)


def typed_source(run: RunFiles, path: str) -> str:
    """Return the override that gives a setting of a run that records no other places."""
    for text in reversed(run.overrides):
        key = text.partition("=")[0].lstrip("+~").replace("/", ".")
        if key == path:
            return f"command line: {text}"
    return UNKNOWN


def default_source(run: RunFiles, path: str) -> str:
    """Return "default", with the source of the part if provenance.json has it."""
    key, _, rest = path.partition(".")
    parts = run.provenance.get("parts")
    name = rest.partition(".")[0] if key in LISTS else run.settings.get(key)
    part = f"{LISTS.get(key, key)}/{name}"
    nested = rest.partition(".")[2] if key in LISTS else rest
    if isinstance(parts, dict) and isinstance(parts.get(part), str) and "." not in nested:
        return f"{DEFAULT} of {part} ({parts[part]})"
    return DEFAULT


# code, versions, data


def code_rows(runs: Sequence[RunFiles]) -> list[Row]:
    """Return the differences of the code: git state and sources of parts."""
    commits = Row("git commit", [commit_of(run) for run in runs])
    changes = Row("uncommitted changes", [changed_files(run) for run in runs])
    texts = Row("diff", [run.provenance.get("git_diff") for run in runs])
    rows = differing([commits])
    if texts.differs:
        rows.append(changes)
    for row in differing(rows_of([mapping_in(run.provenance, "parts") for run in runs])):
        if len({source for source in row.values if source is not None}) > 1:
            rows.append(row)  # other parts are among the settings
    plugins = Row("plugins", [run.provenance.get("plugins") for run in runs])
    return rows + differing([plugins])


def commit_of(run: RunFiles) -> str | None:
    """Return the git commit of a run."""
    commit = run.provenance.get("git_commit")
    return commit[:12] if isinstance(commit, str) else None


def changed_files(run: RunFiles) -> str | None:
    """Return the files with uncommitted changes, and the number of changed lines."""
    text = run.provenance.get("git_diff")
    if not isinstance(text, str):
        return None
    if not text.strip():
        return "none"
    lines = [line for line in text.splitlines() if line.startswith(("+", "-"))]
    count = sum(not line.startswith(("+++", "---")) for line in lines)
    return f"{count} lines in {', '.join(CHANGED_FILE.findall(text))}"


def mapping_in(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object in an object; empty for anything else."""
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def versions_of(run: RunFiles) -> dict[str, Any]:
    """Return the versions of Python, of packages, and of the platform."""
    found = {name: run.provenance.get(name) for name in ("python", "platform")}
    return found | mapping_in(run.provenance, "packages")


def data_rows(runs: Sequence[RunFiles]) -> list[Row]:
    """Return the facts of the data that differ, and the content of each split."""
    columns = []
    for run in runs:
        nested = ("content", "samples", "data")
        column = {name: value for name, value in run.facts.items() if name not in nested}
        for name, value in mapping_in(run.facts, "data").items():
            column.setdefault(name, value)
        for split, count in mapping_in(run.facts, "samples").items():
            column[f"samples of {split}"] = count
        for split, digest in mapping_in(run.facts, "content").items():
            column[f"content of {split}"] = digest
        columns.append(column)
    return differing(rows_of(columns))


def same_content(runs: Sequence[RunFiles]) -> bool | None:
    """Return whether the data of the runs has the same content; None if that is not known."""
    contents = [mapping_in(run.facts, "content") for run in runs]
    digests = [digest for content in contents for digest in content.values()]
    if not all(contents) or None in digests:
        return None
    return all(content == contents[0] for content in contents)


# metrics and time


def metric_rows(runs: Sequence[RunFiles]) -> list[Row]:
    """Return the values of all metrics, those of test and validation first."""
    names = dict.fromkeys(name for run in runs for name in run.series)
    rank = {"test": 0, "val": 1, "train": 2}
    ordered = sorted(names, key=lambda name: rank.get(name.partition("/")[0], 3))
    return [Row(name, [metric_value(run, name) for run in runs]) for name in ordered]


def metric_value(run: RunFiles, metric: str) -> MetricValue | None:
    """Return the values of a metric of a run; None if it was never logged."""
    last = run.last(metric)
    return None if last is None else MetricValue(last, run.best(metric))


def time_of(run: RunFiles) -> dict[str, Any]:
    """Return the state of a run, and its time in steps and seconds."""
    status = run.status
    found: dict[str, Any] = {
        "state": run.state,
        "reason": run.reason or None,
        "step": status.get("step"),
        "total_steps": status.get("total_steps"),
        "training_seconds": run.seconds,
        "processes": run.processes,
    }
    time = read_time(status)
    if time is not None and time.training:
        found["total_seconds"] = round(time.total, 3)
        found["device"] = time.device
        if time.stacked > 1:
            found["stacked"] = time.stacked
        if time.steps:
            found["seconds_per_step"] = time.in_steps / time.steps / time.stacked
    speed = run.last("train/samples_per_second")
    if speed is not None and math.isfinite(speed.value):
        found["samples_per_second"] = speed.value
    return found


def events_of(run: RunFiles) -> Iterator[str]:
    """Yield what `framework tell` has done in a run."""
    try:
        rows = EventReader(run.path).read()
    except RunError as error:
        run.problems.append(str(error))
        return
    for row in rows[:MOST_EVENTS]:
        try:
            yield row_text(row)
        except (KeyError, TypeError, ValueError, AttributeError):  # written by another program
            yield short(row)


def curves_of(run: RunFiles, metrics: Iterable[str]) -> dict[str, Curve]:
    """Return the curves of some metrics of a run."""
    curves = {metric: Curve(most_points=MOST_POINTS) for metric in metrics}
    for row in run.rows():
        for metric in curves.keys() & row.values.keys():
            curves[metric].add(row.step, row.values[metric])
    return curves


def plain(value: Any) -> Any:
    """Return a setting or the value of a metric as a dict, any other value unchanged."""
    if isinstance(value, Setting):
        return asdict(value)
    if isinstance(value, MetricValue):
        best = value.best
        return {
            "last": value.last.value,
            "last_step": value.last.step,
            "best": None if best is None else best.value,
            "best_step": None if best is None else best.step,
        }
    return value
