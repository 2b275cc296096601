"""The runs in a folder of runs, with an index that makes listing thousands of them fast.

The index is the file `.index.json` in the folder of runs. An entry is read anew if the run folder,
its status.json or its metrics.jsonl has changed since. A missing, damaged or older index is only a
matter of time: all runs are read then.
"""

import gc
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from framework.errors import RunError
from framework.runs.file_names import LABELS, METRICS, STATUS_FILE
from framework.runs.run_files import RunFiles, Series, Value, is_run, metric_direction, number_in
from framework.runs.run_state import State, state_of
from framework.runs.run_time import read_time
from framework.runs.sweep_files import REQUEST, ROWS, read_request, trial_of_row
from framework.system.files import open_file, read_rows, write_file

INDEX = ".index.json"
SCHEMA = 3
MOST_INDEX = 128 * 2**20  # bytes; 10,000 runs with 12 metrics have 9 MB
MOST_METRICS_BYTES = 256 * 2**20  # of a metrics.jsonl; reading them takes seconds
MOST_DEPTH = 4  # folders between the root and a run
MOST_FOLDERS = 200_000
FEWEST_CHANGES = 20  # entries read anew for which the index is written again
TEXT: frozenset[type] = frozenset([str])
MAPPING: frozenset[type] = frozenset([dict])
INTEGER: frozenset[type] = frozenset([int])
OPTIONAL_TEXT: frozenset[type] = frozenset([str, NoneType])
OPTIONAL_INT: frozenset[type] = frozenset([int, NoneType])
OPTIONAL_NUMBER: frozenset[type] = frozenset([int, float, NoneType])
MISSING: Any = object()
"""In the changes of `Settings`: the run does not have the setting."""


class Settings:
    """The settings of a run as changes of those of another one; most runs differ in a few.

    Attributes:
        base: the settings of the other run, by dotted key.
        changes: the settings that differ; `MISSING` for one that the run does not have.
    """

    __slots__ = ("base", "changes")

    def __init__(self, base: Mapping[str, Any], changes: Mapping[str, Any]):
        self.base = base
        self.changes = changes

    @classmethod
    def difference(cls, settings: Mapping[str, Any], base: Mapping[str, Any]) -> "Settings":
        """Return settings as changes of a base."""
        changes = {
            key: value
            for key, value in settings.items()
            if key not in base or not same(value, base[key])
        }
        for key in base:
            if key not in settings:
                changes[key] = MISSING
        return cls(base, changes)

    def get(self, key: str) -> Any:
        """Return a setting; `MISSING` if the run does not have it."""
        if key in self.changes:
            return self.changes[key]
        return self.base.get(key, MISSING)

    def __bool__(self) -> bool:
        """Whether there are any, which is not so if the config cannot be read."""
        return (len(self.base) > 0 and len(self.changes) < len(self.base)) or bool(self.complete())

    def complete(self) -> dict[str, Any]:
        """Return all settings."""
        merged = {**self.base, **self.changes}
        return {key: value for key, value in merged.items() if value is not MISSING}


def same(one: Any, other: Any) -> bool:
    """Return whether two settings are equal, also in their types: 1 is neither 1.0 nor true.

    NaN equals NaN.
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, float | list | dict):
        return repr(one) == repr(other)
    return bool(one == other)


@dataclass(slots=True)
class RunEntry:
    """What a list shows of a run.

    Attributes:
        name: the path relative to the folder of runs, such as default/first.
        stamp: by which a change of the folder is noticed.
        status: of status.json, such as "testing"; None if it is unknown. See `state_in`.
        started: when the run began, in seconds since 1970.
        updated: when its status was written, in seconds since 1970.
        seconds: of training; stacked trials share them.
        stacked: the number of trials that trained together as one model.
        directions: of its metrics, see `RunFiles.directions`.
        series: of each metric, the last, lowest and highest value, see `summary`.
        problems: a line for each missing or damaged file.
    """

    name: str
    stamp: tuple[int, ...]
    status: str | None = None
    reason: str = ""
    step: int | None = None
    total_steps: int | None = None
    started: float | None = None
    updated: float | None = None
    seconds: float | None = None
    processes: int | None = None
    stacked: int = 1
    settings: Settings = field(default_factory=lambda: Settings({}, {}))
    directions: dict[str, str] = field(default_factory=dict)
    series: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    note: str = ""
    problems: list[str] = field(default_factory=list)

    def state_in(self, root: Path) -> State:
        """Return the state now.

        Args:
            root: the folder of runs.
        """
        if self.status == "done":  # for most runs; a path takes longer to build
            return "done"
        return state_of(root / self.name, self.status)

    def direction(self, metric: str) -> str | None:
        """Return "min" or "max" for a metric; None if it is not known which is better."""
        return metric_direction(metric, self.settings.get, self.directions)

    def summary(self, metric: str) -> Series | None:
        """Return the summary of a metric; None if it was never logged."""
        row = self.series.get(metric)
        if row is None:
            return None
        last, last_step, low, low_step, high, high_step, count = row
        lowest = None if low is None else Value(low, low_step)
        highest = None if high is None else Value(high, high_step)
        return Series(Value(last, last_step), lowest, highest, count)

    @property
    def monitor(self) -> str | None:
        """The metric by which the run ranks its checkpoints."""
        monitor = self.settings.get("callbacks.checkpoint.monitor")
        return monitor if isinstance(monitor, str) else None

    @property
    def sweep(self) -> str:
        """The folder that contains the run, relative to the folder of runs."""
        return self.name.rpartition("/")[0]


@dataclass(slots=True)
class SweepEntry:
    """What a list shows of a sweep.

    Attributes:
        name: the path relative to the folder of runs; "" for that folder itself.
        stamp: by which a change of its files is noticed.
        objectives: the direction of each metric that the sweep compares trials by.
        swept: the settings that it varies.
        trials: the folder and the state of each trial; "" for a trial without a folder.
        tags: those of the sweep, which all its trials have too.
        note: that of the sweep.
    """

    name: str
    stamp: tuple[int, ...]
    objectives: dict[str, str] = field(default_factory=dict)
    swept: list[str] = field(default_factory=list)
    trials: list[tuple[str, str]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    note: str = ""


@dataclass
class RunList:
    """All runs in a folder.

    Attributes:
        root: the folder.
        runs: by name, the newest first.
        sweeps: by name.
        problems: folders that cannot be read, as lines.
        read: the number of runs that were read from their own files, not from the index.
    """

    root: Path
    runs: list[RunEntry] = field(default_factory=list)
    sweeps: dict[str, SweepEntry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    read: int = 0

    def sweep_of(self, run: RunEntry) -> SweepEntry | None:
        """Return the sweep that a run is a trial of; None for a run of its own."""
        return self.sweeps.get(run.sweep)


class Found(NamedTuple):
    """The folder of a run or a sweep, and its stamp."""

    name: str
    stamp: tuple[int, ...]


@dataclass
class Index:
    """The content of the index.

    Attributes:
        bases: by experiment, the settings that those of its runs are compared with.
        runs: by name.
        sweeps: by name.
    """

    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: dict[str, RunEntry] = field(default_factory=dict)
    sweeps: dict[str, SweepEntry] = field(default_factory=dict)


def list_runs(root: Path) -> RunList:
    """Read all runs below a folder, most of them from its index, which is updated.

    Raises:
        RunError: there is no such folder, or it is the folder of one run.
    """
    if not root.is_dir():
        raise RunError(f"there is no folder {root}; expected a folder of runs")
    if is_run(root):
        raise RunError(f"{root} is the folder of one run; expected a folder of runs")
    with paused_collection():
        index = read_index(root)
    listing = RunList(root)
    for found in walk(root, index, listing):
        entry = index.runs.get(found.name)
        if entry is None or entry.stamp != found.stamp:
            entry = read_entry(root, found, index.bases)
            listing.read += 1
        listing.runs.append(entry)
    vanished = len(index.runs) - (len(listing.runs) - listing.read)
    if max(listing.read, vanished) >= FEWEST_CHANGES:
        write_index(listing, index.bases)
    listing.runs.sort(key=lambda run: (run.started or 0.0, run.name), reverse=True)
    return listing


@contextmanager
def paused_collection() -> Iterator[None]:
    """Pause the garbage collection, which takes half of the time in which an index is read."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def walk(root: Path, index: Index, listing: RunList) -> Iterator[Found]:
    """Yield the run folders below a folder; links and hidden folders are skipped.

    Args:
        root: the folder.
        index: the runs and sweeps that are known.
        listing: receives the sweeps, and problems such as links.
    """
    pending = [""]
    folders = 0
    while pending:
        name = pending.pop()
        prefix = f"{name}/" if name else ""
        try:
            entries = list(os.scandir(root / name))
        except OSError as error:
            listing.problems.append(f"{root / name}: {error.strerror}")
            continue
        in_sweep = any(entry.name == REQUEST for entry in entries)
        if in_sweep:
            found = Found(name, stamp_of(str(root / name), (REQUEST, ROWS, LABELS), folder=False))
            sweep = index.sweeps.get(name)
            if sweep is None or sweep.stamp != found.stamp:
                sweep = read_sweep(root, found)
            listing.sweeps[name] = sweep
        else:
            listing.problems += links_in(entries)
        for entry in entries:
            if entry.name.startswith(".") or not is_folder(entry):
                continue
            if in_sweep and entry.name == "best":  # links to the best trial
                continue
            inner = prefix + entry.name
            folders += 1
            if folders > MOST_FOLDERS:
                listing.problems.append(f"{root}: only the first {MOST_FOLDERS:,} folders are read")
                return
            if inner in index.runs or is_run(Path(entry.path)):
                yield Found(inner, stamp_of(entry.path))
            elif inner.count("/") < MOST_DEPTH:
                pending.append(inner)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder and no link."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def links_in(entries: Iterable[os.DirEntry[str]]) -> list[str]:
    """Return a line for each symbolic link to a folder, which may be a run that is not listed."""
    found = []
    for entry in entries:
        with suppress(OSError):
            if entry.is_symlink() and entry.is_dir() and not entry.name.startswith("."):
                found.append(f"{entry.path}: a symbolic link, not followed")
    return sorted(found)


def stamp_of(
    path: str, files: tuple[str, ...] = (STATUS_FILE, METRICS), folder: bool = True
) -> tuple[int, ...]:
    """Return numbers that change when some files of a folder change.

    Args:
        path: the folder.
        files: the files; of links, the link itself.
        folder: include the time when a file of the folder was created, replaced or deleted.
    """
    stamp = []
    if folder:
        with suppress(OSError):
            stamp.append(os.lstat(path).st_mtime_ns)
    for file in files:
        try:
            status = os.lstat(f"{path}/{file}")
        except OSError:
            continue
        stamp += [status.st_mtime_ns, status.st_size, stat.S_IFMT(status.st_mode)]
    return tuple(stamp)


def read_entry(root: Path, found: Found, bases: dict[str, dict[str, Any]]) -> RunEntry:
    """Read a run from its own files.

    Args:
        root: the folder of runs.
        found: the run.
        bases: by experiment, the settings that those of its runs are compared with.
    """
    files = RunFiles(root / found.name)
    files.most_metrics = MOST_METRICS_BYTES
    status = files.status
    base = bases.setdefault(experiment_of(found.name), files.settings)
    labels = files.labels
    step = status.get("step")
    total_steps = status.get("total_steps")
    time = read_time(status)
    return RunEntry(
        name=found.name,
        stamp=found.stamp,
        status=status.get("status"),
        reason=files.reason,
        step=step if type(step) is int else None,
        total_steps=total_steps if type(total_steps) is int else None,
        started=started_of(files),
        updated=number_in(status, "updated"),
        seconds=files.seconds,
        processes=files.processes,
        stacked=1 if time is None else time.stacked,
        settings=Settings.difference(files.settings, base),
        directions=files.directions,
        series={metric: series_row(series) for metric, series in files.series.items()},
        tags=labels.tags,
        note=labels.note,
        problems=files.problems,
    )


def experiment_of(name: str) -> str:
    """Return the first folder of the name of a run, which is that of its experiment."""
    return name.partition("/")[0]


def started_of(files: RunFiles) -> float | None:
    """Return when a run began, in seconds since 1970; without a record, when it was configured."""
    recorded = files.provenance.get("time")
    with suppress(ValueError, OverflowError, OSError):
        if isinstance(recorded, str):
            return datetime.fromisoformat(recorded).timestamp()
    for file in ("config.yaml", STATUS_FILE, METRICS):
        with suppress(OSError):
            return os.lstat(files.path / file).st_mtime
    return None


def read_sweep(root: Path, found: Found) -> SweepEntry:
    """Read the request and the trials of a sweep."""
    path = root / found.name
    request = read_request(path)
    labels = RunFiles(path).labels
    entry = SweepEntry(found.name, found.stamp, tags=labels.tags, note=labels.note)
    entry.swept = list(request.get("swept") or [])
    objectives = request.get("by")
    if isinstance(objectives, dict):
        for metric, direction in objectives.items():
            if direction in ("min", "max"):
                entry.objectives[metric] = direction
    trials: dict[int, tuple[str, str]] = {}
    with suppress(OSError, RunError):
        for row in read_rows(path, ROWS):
            trial = trial_of_row(row)
            if trial is not None:
                trials[trial.number] = (trial.folder, trial.state)
    entry.trials = list(trials.values())
    return entry


def read_index(root: Path) -> Index:
    """Return the index of a folder of runs; an empty one if it is missing or damaged."""
    try:
        with open_file(root, INDEX, most=MOST_INDEX) as file:
            content = json.loads(file.read(MOST_INDEX))
        if content["schema"] != SCHEMA:
            return Index()
        index = Index(content["bases"])
        check_types(index.bases.values(), MAPPING)
        for entry in sweeps_in(content):
            index.sweeps[entry.name] = entry
        for run in runs_in(content, index.bases):
            index.runs[run.name] = run
    except (OSError, RunError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return Index()
    return index


def sweeps_in(content: Mapping[str, Any]) -> Iterator[SweepEntry]:
    """Yield the sweeps of an index. One of another form raises ValueError or TypeError."""
    for name, stamp, objectives, swept, trials, tags, text in content["sweeps"]:
        check_types((name, *objectives, *objectives.values(), *swept, *tags, text), TEXT)
        entry = SweepEntry(name, tuple(stamp), objectives, swept, tags=tags, note=text)
        for folder, state in trials:
            check_types((folder, state), TEXT)
            entry.trials.append((folder, state))
        yield entry


def runs_in(content: Mapping[str, Any], bases: Mapping[str, dict[str, Any]]) -> Iterator[RunEntry]:
    """Yield the runs of an index. One of another form raises ValueError or TypeError."""
    metrics = content["metrics"]
    directions = content["directions"]
    check_types(metrics, TEXT)
    for name, stamp, facts, changes, removed, direction, series, labels in content["runs"]:
        status, reason, step, total_steps, started, updated, seconds, processes, stacked = facts
        tags, text, problems = labels
        check_types((name, reason, text, *tags, *problems), TEXT)
        check_types((status,), OPTIONAL_TEXT)
        check_types((changes, directions[direction]), MAPPING)
        check_types((step, total_steps, processes, *stamp), OPTIONAL_INT)
        check_types((stacked,), INTEGER)
        check_types((started, updated, seconds), OPTIONAL_NUMBER)
        entry = RunEntry(name, tuple(stamp), status, reason, step, total_steps)
        entry.started = started
        entry.updated = updated
        entry.seconds = seconds
        entry.processes = processes
        entry.stacked = max(stacked, 1)
        settings = changes | dict.fromkeys(removed, MISSING) if removed else changes
        entry.settings = Settings(bases[experiment_of(name)], settings)
        entry.directions = directions[direction]
        entry.tags = tags
        entry.note = text
        entry.problems = problems
        for number, last, last_step, *bounds in series:
            check_types((number, last, last_step, *bounds), OPTIONAL_NUMBER)
            entry.series[metrics[number]] = (last, last_step, *bounds)
        yield entry


def check_types(values: Iterable[Any], expected: frozenset[type]) -> None:
    """Raise TypeError unless all values have one of the expected types; bool is not int."""
    if not expected.issuperset(map(type, values)):
        raise TypeError(f"expected {expected}, got {values}")


def write_index(listing: RunList, bases: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the index of a folder of runs; in a folder that cannot be written there is none."""
    metrics: dict[str, int] = {}
    directions: dict[str, int] = {}
    runs = [run_row(run, metrics, directions) for run in listing.runs]
    sweeps = [
        (
            entry.name,
            entry.stamp,
            entry.objectives,
            entry.swept,
            entry.trials,
            entry.tags,
            entry.note,
        )
        for entry in listing.sweeps.values()
    ]
    content = {
        "schema": SCHEMA,
        "bases": bases,
        "metrics": list(metrics),
        "directions": [json.loads(key) for key in directions],
        "sweeps": sweeps,
        "runs": runs,
    }
    text = json.dumps(content, separators=(",", ":"))
    if len(text) <= MOST_INDEX:
        with suppress(OSError, RunError):
            write_file(listing.root, INDEX, text)


def run_row(run: RunEntry, metrics: dict[str, int], directions: dict[str, int]) -> tuple[Any, ...]:
    """Return a run as a row of the index.

    Args:
        run: the run.
        metrics: the number of each metric, to which new ones are added.
        directions: the number of each set of directions, in the same way.
    """
    changes = {key: value for key, value in run.settings.changes.items() if value is not MISSING}
    removed = [key for key, value in run.settings.changes.items() if value is MISSING]
    series = []
    for metric, row in run.series.items():
        series.append((metrics.setdefault(metric, len(metrics)), *row))
    key = json.dumps(run.directions, sort_keys=True)
    steps = (run.step, run.total_steps)
    times = (run.started, run.updated, run.seconds)
    return (
        run.name,
        run.stamp,
        (run.status, run.reason, *steps, *times, run.processes, run.stacked),
        changes,
        removed,
        directions.setdefault(key, len(directions)),
        series,
        (run.tags, run.note, run.problems),
    )


def series_row(series: Series) -> tuple[Any, ...]:
    """Return the summary of a metric as plain values; `RunEntry.summary` is the inverse."""
    lowest = series.lowest or (None, 0)
    highest = series.highest or (None, 0)
    return (*series.last, *lowest, *highest, series.count)
