"""Read the folder of a run from the disk: its config, provenance, status, metrics and tags.

A run folder may come from a stranger. Nothing in it is executed, no link is followed, the size of
every file is limited, and a missing or damaged file becomes a line in `RunFiles.problems`. This
module does not import torch, so that a list of runs appears at once.
"""

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from framework.errors import FrameworkError, RunError, SettingError, short
from framework.errors.paths import expanded
from framework.errors.user_code import text_of
from framework.system.files import (
    MOST_ROWS_BYTES,
    open_file,
    read_json,
    read_rows,
    read_yaml,
    write_file,
)
from framework.system.locks import MOST_HOLDER_BYTES, has_ended, lock, locks_disabled

from .folder import resolve_run, run_advice
from .sweep_files import REQUEST

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
PROVENANCE = "provenance.json"
FACTS = "facts.json"
STATUS_FILE = "status.json"
METRICS = "metrics.jsonl"
LABELS = "labels.json"
DESCRIPTION = (CONFIG, STATUS_FILE, PROVENANCE, METRICS)
"""Files by which a folder is recognized as that of a run, also if some of them are missing."""

SECTIONS_WITH_NAME = ("run", "sweep")
"""Sections with a setting `name`, which is not the name of a part."""

MOST_STATUS = 2**20  # bytes of a status.json that is read
MOST_LABELS = 2**20  # bytes of a labels.json that is read
MOST_SERIES = 2_000  # metrics of a run; one with a metric for each layer has hundreds
MOST_TAGS = 100
MOST_NOTE = 10_000  # characters
FRESH_SECONDS = 600.0  # since the last write of a run on another machine that counts as running
TAG = re.compile(r"[\w][\w.:/+-]{0,63}")
TRIAL_NAME = re.compile(r"(\d{3,})(_.*)?")

State = Literal["running", "paused", "testing", "stale", "failed", "stopped", "done", "unknown"]
"""The state of a run.

running: a process writes to the folder. paused: it waits between two steps, as `framework tell` has
requested. testing: the training has ended, and the test may follow. stale: its process has ended
without a result, such as by SIGKILL. failed: an error has ended it. stopped: a signal, or a
callback in a run whose test was interrupted, has ended it. done: complete. unknown: status.json is
missing or damaged.
"""
ACTIVE: tuple[State, ...] = ("running", "paused", "testing")
"""The states of a run whose process is alive."""
MAX_STEP = 2**63 - 1  # curves keep steps as 64-bit integers


class Row(NamedTuple):
    """One line of metrics.jsonl; a value that JSON lacks (NaN, infinity) is NaN."""

    step: int
    epoch: int
    wall_seconds: float
    values: dict[str, float]


class Value(NamedTuple):
    """A value of a metric and the step after which it was measured."""

    value: float
    step: int


@dataclass
class Series:
    """The values of one metric, summarized; NaN counts only as `last`.

    Attributes:
        last: the last value.
        lowest: the lowest finite value, the first of equal ones; None if there is none.
        highest: the highest finite value, in the same way.
        count: the number of values.
    """

    last: Value
    lowest: Value | None = None
    highest: Value | None = None
    count: int = 0

    def add(self, value: Value) -> None:
        """Add the next value."""
        self.last = value
        self.count += 1
        if not math.isfinite(value.value):
            return
        if self.lowest is None or value.value < self.lowest.value:
            self.lowest = value
        if self.highest is None or value.value > self.highest.value:
            self.highest = value

    def best(self, direction: str) -> Value | None:
        """Return the best finite value: the lowest one for "min", the highest one for "max"."""
        return self.highest if direction == "max" else self.lowest


@dataclass
class Labels:
    """What a user has written about a run: labels.json in its folder.

    Attributes:
        tags: short words, in the order in which they were added.
        note: a text; "" for none.
    """

    tags: list[str] = field(default_factory=list)
    note: str = ""


class RunFiles:
    """The files of a run folder, each read at its first use.

    Attributes:
        path: the folder.
        problems: a line for each file that is missing or damaged, among those that were read.
        most_metrics: the largest metrics.jsonl in bytes that is read.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.problems: list[str] = []
        self.most_metrics = MOST_ROWS_BYTES

    def __repr__(self) -> str:
        return f"RunFiles({str(self.path)!r})"

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The composed config; empty if it is missing or damaged."""
        return self._mapping(CONFIG)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config with dotted keys: {"optimizer": "adamw", "optimizer.lr": 0.001, ...}."""
        return flattened(self.config)

    @cached_property
    def overrides(self) -> list[str]:
        """The overrides of the command line."""
        content = self._read(OVERRIDES, required=False)
        if content is None:
            return []
        if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
            self.problems.append(f"{OVERRIDES}: expected a list of texts, got {short(content)}")
            return []
        return content

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Versions, platform, git commit and diff, source of each part; empty if damaged."""
        return self._mapping(PROVENANCE)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Facts of the data: shapes, numbers of samples, sha256 of each split."""
        return self._mapping(FACTS)

    @cached_property
    def status(self) -> dict[str, Any]:
        """The content of status.json, with `status`, `step`, `total_steps`, `reason`, `updated`."""
        content = self._mapping(STATUS_FILE, MOST_STATUS)
        if content and not isinstance(content.get("status"), str):
            self.problems.append(f"{STATUS_FILE}: expected a status, got {short(content)}")
            return {}
        return content

    @property
    def state(self) -> State:
        """The state now. It is found anew at each access, from `status` as it was first read."""
        return state_of(self.path, self.status.get("status"))

    @property
    def reason(self) -> str:
        """Why the run failed or stopped; "" otherwise."""
        reason = self.status.get("reason")
        return reason if isinstance(reason, str) else ""

    @property
    def seconds(self) -> float | None:
        """The time of the training in seconds, including the parts before it was resumed."""
        return number_in(self.status, "wall_seconds")

    @property
    def processes(self) -> int | None:
        """The number of processes of the run; None if it is not recorded."""
        recorded = self.status.get("processes")
        if type(recorded) is int and recorded > 0:
            return recorded
        devices = self.settings.get("trainer.devices")
        return devices if type(devices) is int and devices > 0 else None

    @cached_property
    def directions(self) -> dict[str, str]:
        """Whether low or high values are better, by metric: {"loss": "min", "accuracy": "max"}.

        Runs of versions before 0.3 have only the loss.
        """
        recorded = self.provenance.get("directions")
        known = {"loss": "min"}
        if isinstance(recorded, Mapping):
            known |= {str(key): mode for key, mode in recorded.items() if mode in ("min", "max")}
        return known

    def direction(self, metric: str) -> str | None:
        """Return "min" or "max" for a metric such as val/accuracy; None if it is not known."""
        return metric_direction(metric, self.settings.get, self.directions)

    @property
    def monitor(self) -> str | None:
        """The metric by which the run ranks its checkpoints, such as val/loss."""
        monitor = self.settings.get("callbacks.checkpoint.monitor")
        return monitor if isinstance(monitor, str) else None

    def rows(self, skipped: Counter[str] | None = None) -> Iterator[Row]:
        """Yield the lines of metrics.jsonl; incomplete and damaged ones are skipped.

        A missing file yields nothing. A file that is refused (a link, larger than `most_metrics`)
        is a problem.

        Args:
            skipped: see `read_rows`.
        """
        skipped = Counter() if skipped is None else skipped
        try:
            with open_file(self.path, METRICS, most=self.most_metrics):
                pass
            for content in read_rows(self.path, METRICS, skipped):
                row = metrics_row(content)
                if row is not None:
                    yield row
                else:
                    skipped["damaged"] += 1
        except FileNotFoundError:
            return
        except (OSError, RunError) as error:
            self._add_problem(METRICS, error)

    @cached_property
    def series(self) -> dict[str, Series]:
        """A summary of each metric: its last, lowest and highest value."""
        found: dict[str, Series] = {}
        skipped: Counter[str] = Counter()
        for row in self.rows(skipped):
            add_row(found, row)
        if skipped["damaged"]:
            count = skipped["damaged"]
            self.problems.append(f"{METRICS}: skipped {count:,} damaged line{'s'[: count != 1]}")
        if skipped["incomplete"] and self.status.get("status") == "done":
            self.problems.append(f"{METRICS}: the last line is incomplete")
        if len(found) >= MOST_SERIES:
            self.problems.append(f"{METRICS}: only the first {MOST_SERIES:,} metrics are read")
        return found

    def last(self, metric: str) -> Value | None:
        """Return the last value of a metric, which may be NaN; None if it was never logged."""
        series = self.series.get(metric)
        return None if series is None else series.last

    def best(self, metric: str, direction: str | None = None) -> Value | None:
        """Return the best finite value of a metric; None if there is none.

        Args:
            metric: such as val/loss.
            direction: "min" or "max"; by default that of the run.
        """
        series = self.series.get(metric)
        mode = direction or self.direction(metric)
        return None if series is None or mode is None else series.best(mode)

    @cached_property
    def labels(self) -> Labels:
        """Tags and note of the run."""
        return parse_labels(self._read(LABELS, MOST_LABELS, required=False), self.problems)

    def write_labels(self, labels: Labels) -> None:
        """Write tags and note into the folder.

        Raises:
            RunError: that fails.
        """
        content = {"tags": labels.tags, "note": labels.note}
        write_file(self.path, LABELS, json.dumps(content, indent=2) + "\n")
        self.labels = labels

    @cached_property
    def sweep(self) -> Path | None:
        """The folder of the sweep that the run is a trial of; None for a run of its own."""
        return self.path.parent if is_sweep(self.path.parent) else None

    @property
    def trial(self) -> int | None:
        """The number of the trial in its sweep; None for a run of its own."""
        match = TRIAL_NAME.fullmatch(self.path.name)
        return None if match is None or self.sweep is None else int(match[1])

    def _mapping(self, file: str, most: int | None = None) -> dict[str, Any]:
        content = self._read(file, most)
        if content is None:
            return {}
        if not isinstance(content, dict):
            self.problems.append(f"{file}: expected names and values, got {short(content)}")
            return {}
        return content

    def _read(self, file: str, most: int | None = None, required: bool = True) -> Any:
        """Return the content of a YAML or JSON file; None, and a problem, if it cannot be read."""
        read = read_yaml if file.endswith(".yaml") else read_json
        try:
            return read(self.path, file) if most is None else read(self.path, file, most)
        except FileNotFoundError:
            if required:
                self.problems.append(f"{file} is missing")
        except (OSError, RunError) as error:
            self._add_problem(file, error)
        return None

    def _add_problem(self, file: str, error: Exception) -> None:
        text = error.strerror if isinstance(error, OSError) else text_of(error)
        shown = str(text or error).replace(str(self.path / file), file)
        self.problems.append(shown if shown.startswith(file) else f"{file}: {shown}")


def flattened(tree: Any, path: str = "") -> dict[str, Any]:
    """Return a config with dotted keys; the name of a part is at the key of the part.

    {"optimizer": {"name": "adamw", "lr": 0.1}} becomes {"optimizer": "adamw", "optimizer.lr": 0.1}.
    An entry of a list of parts has an empty value, in addition to its settings:
    {"callbacks": {"ema": {"decay": 0.9}}} becomes
    {"callbacks.ema": {}, "callbacks.ema.decay": 0.9}.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = f"{path}.{key}" if path else str(key)
        if key == "name" and path not in ("", *SECTIONS_WITH_NAME) and isinstance(value, str):
            found[path] = value
        elif isinstance(value, dict) and value:
            if path and "name" not in value:
                found[inner] = {}
            found |= flattened(value, inner)
        else:
            found[inner] = value
    return found


def setting_named(name: str, settings: Iterable[str], place: str) -> str | None:
    """Return the setting that a name stands for: `lr` for optimizer.lr; None if there is none.

    Args:
        name: a complete name, or the last words of one if no other setting ends in them.
        settings: the complete names.
        place: the beginning of the message.

    Raises:
        SettingError: several settings end in the name.
    """
    known = list(settings)
    if name in known:
        return name
    ending = [key for key in known if key.endswith(f".{name}")]
    if len(ending) > 1:
        names = ", ".join(ending[:4])
        raise SettingError(f"{place}: {name!r} may be {names}; give the complete name")
    return ending[0] if ending else None


def metric_direction(
    metric: str, setting: Callable[[str], Any], directions: Mapping[str, str]
) -> str | None:
    """Return "min" or "max" for a metric such as val/accuracy; None if it is not known.

    Args:
        metric: its name, with the split.
        setting: returns a setting of the run by its dotted key.
        directions: see `RunFiles.directions`.
    """
    for callback in ("checkpoint", "early_stop"):
        mode = setting(f"callbacks.{callback}.mode")
        if mode in ("min", "max") and setting(f"callbacks.{callback}.monitor") == metric:
            return str(mode)
    return directions.get(metric.partition("/")[2] or metric)


def metrics_row(content: Mapping[str, Any]) -> Row | None:
    """Return the row of a line of metrics.jsonl; None if it has no step of at most 64 bits."""
    step = content.get("step")
    if type(step) is not int or abs(step) > MAX_STEP:
        return None
    epoch = content.get("epoch")
    values = {}
    for key, value in content.items():
        if "/" not in key or isinstance(value, bool):
            continue
        if value is None:
            values[key] = math.nan
        elif isinstance(value, int | float):
            values[key] = float_of(value)
    seconds = number_in(content, "wall_seconds")
    return Row(step, epoch if type(epoch) is int else 0, seconds or 0.0, values)


def add_row(found: dict[str, Series], row: Row) -> None:
    """Add the values of a row to the summaries of the metrics."""
    for metric, number in row.values.items():
        value = Value(number, row.step)
        series = found.get(metric)
        if series is None:
            if len(found) >= MOST_SERIES:
                continue
            series = found[metric] = Series(value)
        series.add(value)


def float_of(number: int | float) -> float:
    """Return a number as a float; NaN for an integer that is too large."""
    try:
        return float(number)
    except OverflowError:
        return math.nan


def number_in(content: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number of a JSON object; None for anything else."""
    value = content.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number = float_of(value)
    return number if math.isfinite(number) else None


def state_of(run: Path, status: Any) -> State:
    """Return the state of a run.

    Args:
        run: its folder.
        status: the status in its status.json: running, paused, testing, stopped, failed or done.
    """
    if status == "done":
        return "done"
    if status == "failed":
        return "failed"
    if status == "stopped":
        return "testing" if is_written(run) else "stopped"  # the test may follow
    for active in ACTIVE:
        if status == active:
            return active if is_written(run) else "stale"
    return "unknown"


def is_written(run: Path) -> bool:
    """Return whether a process writes to a run folder now.

    The process of this machine holds the lock. A process of another machine has written within the
    last `FRESH_SECONDS`: its lock may be invisible here.
    """
    try:
        file = open_file(run, ".lock", "r")
    except (OSError, RunError):
        return False
    with file:
        holder = file.read(MOST_HOLDER_BYTES).decode("utf-8", errors="replace").strip()
        if not holder.startswith("process ") or not is_own_machine(holder):
            return bool(holder) and is_fresh(run)
        if locks_disabled():
            return not has_ended(holder)
        try:
            # A process that starts to write retries for a while if the last holder has ended.
            return not lock(file, run / ".lock", wait=False)
        except (OSError, FrameworkError):  # no locks on this file system
            return not has_ended(holder)


def is_own_machine(holder: str) -> bool:
    """Return whether a process, as a lock file names it, is of this machine."""
    return holder.partition(" on ")[2] == os.uname().nodename


def is_fresh(run: Path) -> bool:
    """Return whether the status or the metrics of a run were written a short time ago."""
    for file in (STATUS_FILE, METRICS):
        try:
            written = os.lstat(run / file).st_mtime
        except OSError:
            continue
        if abs(time.time() - written) < FRESH_SECONDS:
            return True
    return False


def status_of(run: Path) -> str | None:
    """Return the status of a run, such as "done"; None if it is unknown."""
    status = read_status(run).get("status")
    return status if isinstance(status, str) else None


def read_status(run: Path) -> dict[str, Any]:
    """Return the content of status.json; empty if the file is missing or damaged.

    The fingerprint of the config is left out if the config is newer than status.json.
    """
    try:
        with open_file(run, STATUS_FILE, most=MOST_STATUS) as file:
            updated = os.fstat(file.fileno()).st_mtime_ns
            status = json.loads(file.read(MOST_STATUS))
    except (OSError, RunError, ValueError, RecursionError):
        return {}
    if not isinstance(status, dict):
        return {}
    if "config" in status and updated < os.lstat(run / CONFIG).st_mtime_ns:
        del status["config"]
    return status


def parse_labels(content: Any, problems: list[str]) -> Labels:
    """Return the labels of a labels.json; a wrong one is a problem, and ignored."""
    if content is None:
        return Labels()
    tags = content.get("tags", []) if isinstance(content, dict) else None
    note = content.get("note", "") if isinstance(content, dict) else None
    valid = isinstance(tags, list) and len(tags) <= MOST_TAGS
    if not valid or not all(isinstance(tag, str) and TAG.fullmatch(tag) for tag in tags or ()):
        problems.append(f"{LABELS}: expected tags and a note, got {short(content)}")
        return Labels()
    if not isinstance(note, str) or len(note) > MOST_NOTE:
        problems.append(f"{LABELS}: expected a note of at most {MOST_NOTE:,} characters")
        note = ""
    return Labels(list(tags or ()), note)


def is_sweep(folder: Path) -> bool:
    """Return whether a folder is that of a sweep."""
    path = folder / REQUEST
    return path.is_file() and not path.is_symlink()


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, also of one with missing files."""
    return any(os.path.lexists(folder / file) for file in DESCRIPTION)


def trials_in(sweep: Path) -> list[Path]:
    """Return the folders of the trials of a sweep, by name."""
    return sorted(path for path in folders_in(sweep) if path.name != "best" and is_run(path))


def folders_in(path: Path) -> list[Path]:
    """Return the folders in a folder, without links; none if it cannot be read."""
    try:
        entries = [entry for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [Path(entry.path) for entry in entries]


def run_files(run: Path | str) -> RunFiles:
    """Return the files of a run that a user names: its folder, or `best` of a sweep.

    Raises:
        RunError: there is no such folder, or it is not that of a run.
    """
    path = resolve_run(expanded(run))
    if not path.is_dir():
        raise RunError(f"there is no run folder {path}")
    if not is_run(path):
        raise RunError(f"{path} is not the folder of a run: it has no {CONFIG}{run_advice(path)}")
    return RunFiles(path)
