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
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TextIO

from ..errors import RunError
from ..locks import Held, are_off, lock
from ..run import NAME, check_encoding, claim, locked, only_writer

State = Literal["running", "done", "pruned", "failed", "stopped"]
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
    config: str = ""  # the fingerprint of its config, by which a resumed sweep knows that it is done

    @property
    def over(self) -> bool:
        """Whether nothing is left to do for it: a failed or stopped one is run again by a resumed sweep."""
        return self.state in ("done", "pruned")


class SweepFolder:
    """The folder of a sweep. Several processes may record trials in it."""

    def __init__(self, path: Path):
        self.path = path
        self.lock: TextIO | Held | None = None
        self.rows: dict[int, Trial] = {}  # those read so far
        self.offset = 0

    @classmethod
    def claim(cls, root: Path, experiment: str, name: str | None, asked: Mapping[str, Any]) -> "SweepFolder":
        """Make a new one, and keep what was asked for. Raises RunError when the name is not allowed or taken."""
        if name is not None and (not re.fullmatch(NAME, name) or ".." in name):
            raise RunError(f"sweep.name should be letters, digits, '.', '_' and '-' (at most 128), not {name!r}")
        parent = root / experiment
        check_encoding(parent.resolve())
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent):
                if name is not None and any((parent / name / file).exists() for file in ("sweep.json", "config.yaml")):
                    advice = "choose another sweep.name, or go on with it by resume=auto"
                    raise RunError(f"{parent / name} exists already: {advice}")
                folder = cls(claim(parent, name))
                folder.write("sweep.json", json.dumps({**asked, "began": time.time()}, indent=2, default=str) + "\n")
        except OSError as error:
            raise RunError(
                f"the sweep's folder in {parent} cannot be made: {error.strerror} (run.root={root})"
            ) from None
        return folder

    def asked(self) -> dict[str, Any]:
        """Return what was asked for, empty when this is not the folder of a sweep."""
        try:
            return dict(json.loads((self.path / "sweep.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def conduct(self) -> None:
        """Let no other process begin trials here until `release`. Raises RunError when one does."""
        if are_off():
            self.lock = only_writer(self.path, "sweep.lock")
            return
        file = (self.path / "sweep.lock").open("a", encoding="utf-8")
        if not lock(file, self.path / "sweep.lock", wait=False):
            file.close()
            raise RunError(f"{self.path} is run by another process: wait for it, or choose another sweep.name")
        self.lock = file

    def release(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def record(self, trial: Trial) -> None:
        """Append a row, whole; what a kill left of a row before it stands on a line of its own."""
        row = asdict(trial)
        row["metrics"] = {key: value if math.isfinite(value) else None for key, value in trial.metrics.items()}
        with (self.path / "sweep.jsonl").open("a+b", buffering=0) as file:
            lock(file, self.path / "sweep.jsonl", wait=True)
            torn = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * bool(torn) + json.dumps(row, default=str).encode() + b"\n")

    def trials(self) -> list[Trial]:
        """Return the last row of each trial, by number."""
        try:
            with (self.path / "sweep.jsonl").open("rb") as file:
                file.seek(self.offset)
                whole, _, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        if whole:
            self.offset += len(whole) + 1
            self.rows |= {trial.number: trial for trial in map(read_row, whole.split(b"\n")) if trial is not None}
        return [self.rows[number] for number in sorted(self.rows)]

    def link_best(self, trial: Trial) -> None:
        """Let `best` stand for a trial's run folder: a folder of links to what is in it.

        It lacks the event files: TensorBoard follows links, and would show the run twice.
        """
        best = self.path / "best"
        with locked(self.path):
            if (best / "config.yaml").exists() and (best / "config.yaml").resolve().parent.name == trial.folder:
                return
            shutil.rmtree(best, ignore_errors=True)  # of a link it takes the link alone
            best.mkdir()
            for file in (self.path / trial.folder).glob("[!.]*"):
                if "tfevents" not in file.name:
                    (best / file.name).symlink_to(Path("..", trial.folder, file.name))

    def write(self, file: str, text: str) -> None:
        beside = self.path / f"{file}.tmp"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path / file)


def read_row(line: bytes) -> Trial | None:
    """Return the trial of a row, or None where a kill cut it off."""
    try:
        row = json.loads(line)
        known = {each.name: row[each.name] for each in fields(Trial) if each.name in row}
        trial = Trial(**known)
    except (ValueError, TypeError):
        return None
    trial.metrics = {key: math.nan if value is None else value for key, value in trial.metrics.items()}
    return trial


def run_name(number: int, settings: Mapping[str, Any]) -> str:
    """Return the name of a trial's run folder: 003_lr-0.01_seed-2."""
    names = short(settings)
    pieces = [f"{names[key]}-{plain(value)}" for key, value in settings.items()]
    return re.sub(r"\.{2,}", ".", "_".join([f"{number:03}", *pieces]))[:LONGEST].rstrip("._-")


def short(keys: Iterable[str]) -> dict[str, str]:
    """Return `lr` for optimizer.lr where no other key has that last word."""
    last = {key: key.rpartition(".")[2] for key in keys}
    names = list(last.values())
    return {key: name if names.count(name) == 1 else key for key, name in last.items()}


def plain(value: Any) -> str:
    """Return a value as part of a file's name."""
    text = "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).replace("+", "").strip("-") or "x"
