"""A sweep on disk: its trials' run folders, and what came of each.

runs/<experiment>/<sweep.name or time>/
    sweep.json                 what was asked for: the command, the metric
    sweep.jsonl                a row when a trial begins, and one when it ends
    best/                      the run of the best trial: `framework eval .../best`
    003_lr-0.01_seed-2/        a run, as any other
"""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

from framework.errors import RunError
from framework.runs.folder import NAME, check_encoding, claim, locked, only_writer
from framework.system.files import (
    MOST_LINE_BYTES,
    MOST_ROWS_BYTES,
    AppendFile,
    failure_reason,
    open_file,
    parse_row,
    read_json,
    unwritable,
    write_file,
)
from framework.system.locks import HeldLock, are_off, lock

State = Literal["running", "done", "pruned", "failed", "stopped"]
ASKED = "sweep.json"
ROWS = "sweep.jsonl"
Number = (int, float)
REQUIRED = {"number": int, "settings": dict, "metrics": dict}  # of a row
LONGEST = 80  # characters of a trial's name; TensorBoard lists runs in a narrow column


@dataclass
class Trial:
    """One row of sweep.jsonl: a trial, what it has of its own, and how it ended."""

    number: int
    settings: dict[str, Any]  # {"optimizer.lr": 0.01, "model": "cnn"}
    folder: str = ""  # of its run, in the sweep's
    state: State = "running"
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    error: str = ""
    exit_status: int = 0  # of a failed one: as of the command line
    config: str = (
        ""  # the fingerprint of its config, by which a resumed sweep knows that it is done
    )

    @property
    def over(self) -> bool:
        """Whether nothing is left to do for it: a failed or stopped one is run again by a resumed sweep."""
        return self.state in ("done", "pruned")


class SweepFolder:
    """The folder of a sweep. Several processes may record trials in it."""

    def __init__(self, path: Path):
        self.path = path
        self.lock: BinaryIO | HeldLock | None = None
        self.rows: dict[int, Trial] = {}  # those read so far
        self.offset = 0

    @classmethod
    def claim(
        cls, root: Path, experiment: str, name: str | None, asked: Mapping[str, Any]
    ) -> "SweepFolder":
        """Make a new one, and keep what was asked for. Raises RunError when the name is not allowed or taken."""
        if name is not None and (not re.fullmatch(NAME, name) or ".." in name):
            raise RunError(
                f"sweep.name should be letters, digits, '.', '_' and '-' (at most 128), not {name!r}"
            )
        parent = root / experiment
        check_encoding(parent.resolve())
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent):
                if name is not None and any(
                    (parent / name / file).exists() for file in ("sweep.json", "config.yaml")
                ):
                    advice = "choose another sweep.name, or go on with it by resume=auto"
                    raise RunError(f"{parent / name} exists already: {advice}")
                folder = cls(claim(parent, name))
                content = {**asked, "began": time.time()}
                try:
                    write_file(
                        folder.path, ASKED, json.dumps(content, indent=2, default=str) + "\n"
                    )
                except RunError:
                    with suppress(OSError):
                        folder.path.rmdir()
                    raise
        except OSError as error:
            reason = failure_reason(parent / "...", error)
            raise RunError(
                f"the sweep's folder in {parent} cannot be made: {reason} (run.root={root})"
            ) from None
        return folder

    def asked(self) -> dict[str, Any]:
        """Return what was asked for, empty when this is not the folder of a sweep."""
        try:
            asked = read_json(self.path, ASKED)
        except (OSError, RunError):
            return {}
        return asked if is_asked(asked) else {}

    def conduct(self) -> None:
        """Let no other process begin trials here until `release`. Raises RunError when one does."""
        if are_off():
            self.lock = only_writer(self.path, "sweep.lock")
            return
        try:
            file = open_file(self.path, "sweep.lock", "a")
        except OSError as error:
            raise unwritable(self.path / "sweep.lock", error) from error
        if not lock(file, self.path / "sweep.lock", wait=False):
            file.close()
            raise RunError(
                f"{self.path} is run by another process: wait for it, or choose another sweep.name"
            )
        self.lock = file

    def release(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def record(self, trial: Trial) -> None:
        """Append a row, whole; what a kill left of a row before it stands on a line of its own.

        Raises RunError when it cannot be written, then nothing of it is.
        """
        row = asdict(trial)
        row["metrics"] = {
            key: value if math.isfinite(value) else None for key, value in trial.metrics.items()
        }
        line = json.dumps(row, default=str).encode() + b"\n"
        rows = AppendFile(self.path, ROWS)
        try:
            lock(rows.file, self.path / ROWS, wait=True)  # until it is closed
            rows.append(b"\n" * is_torn(rows.file) + line)
        finally:
            rows.close()

    def trials(self) -> list[Trial]:
        """Return the last row of each trial, by number."""
        try:
            with open_file(self.path, ROWS, most=MOST_ROWS_BYTES) as file:
                file.seek(self.offset)
                while line := file.readline(MOST_LINE_BYTES):
                    if not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES:
                        break  # being written, or torn by a kill
                    self.offset += len(line)
                    trial = read_row(line)
                    if trial is not None:
                        self.rows[trial.number] = trial
        except OSError:
            return []
        return [self.rows[number] for number in sorted(self.rows)]

    def link_best(self, trial: Trial) -> None:
        """Let `best` stand for a trial's run folder: a folder of links to what is in it.

        It lacks the event files: TensorBoard follows links, and would show the run twice.
        """
        try:
            with locked(self.path):
                self._link_best(trial)
        except OSError as error:
            raise unwritable(self.path / "best", error) from error

    def _link_best(self, trial: Trial) -> None:
        best, run = self.path / "best", self.path / trial.folder
        if (best / "config.yaml").exists() and (
            best / "config.yaml"
        ).resolve().parent.name == trial.folder:
            return
        if not run.is_dir():
            return  # deleted since
        made = self.path / f".best-{os.urandom(8).hex()}"  # whole before it gets its name
        try:
            made.mkdir()
            for file in run.glob("[!.]*"):
                if "tfevents" not in file.name:
                    (made / file.name).symlink_to(Path("..", trial.folder, file.name))
            if best.is_symlink() or best.is_file():
                best.unlink()
            shutil.rmtree(best, ignore_errors=True)
            made.rename(best)
        except OSError:
            shutil.rmtree(made, ignore_errors=True)
            raise


def is_asked(content: Any) -> bool:
    """Whether the content of a sweep.json is of the types that one has."""
    if not isinstance(content, dict) or not isinstance(content.get("began", 0.0), int | float):
        return False
    for name in ("command", "swept", "plugins"):
        words = content.get(name) or []
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return False
    return True


def is_torn(file: BinaryIO) -> bool:
    """Whether a file of lines ends in the middle of one."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def read_row(line: bytes) -> Trial | None:
    """Return the trial of a row, or None where a kill cut it off, or it is no such row."""
    row = parse_row(line)
    if row is None or not all(isinstance(row.get(name), kind) for name, kind in REQUIRED.items()):
        return None
    known = {each.name: row[each.name] for each in fields(Trial) if each.name in row}
    trial = Trial(**known)
    trial.metrics = {
        key: math.nan if value is None else value for key, value in trial.metrics.items()
    }
    own: list[tuple[Any, Any]] = [
        (trial.folder, str),
        (trial.state, str),
        (trial.error, str),
        (trial.config, str),
    ]
    own += [(trial.seconds, Number), (trial.steps, int), (trial.exit_status, int)]
    own += [(value, Number) for value in trial.metrics.values()]
    if not all(isinstance(value, kind) for value, kind in own) or trial.state not in get_args(
        State
    ):
        return None
    inside = re.fullmatch(NAME, trial.folder) and ".." not in trial.folder
    return trial if inside or not trial.folder else None


def run_name(number: int, settings: Mapping[str, Any]) -> str:
    """Return the name of a trial's run folder: 003_lr-0.01_seed-2."""
    names = short_keys(settings)
    pieces = [f"{names[key]}-{file_name_part(value)}" for key, value in settings.items()]
    return re.sub(r"\.{2,}", ".", "_".join([f"{number:03}", *pieces]))[:LONGEST].rstrip("._-")


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return `lr` for optimizer.lr where no other key has that last word."""
    last = {key: key.rpartition(".")[2] for key in keys}
    names = list(last.values())
    return {key: name if names.count(name) == 1 else key for key, name in last.items()}


def file_name_part(value: Any) -> str:
    """Return a value as part of a file's name."""
    text = "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).replace("+", "").strip("-") or "x"
