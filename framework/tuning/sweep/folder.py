"""The folder of a sweep: the run folders of its trials and their results.

runs/<experiment>/<sweep.name or time>/
    sweep.json                 the request: command, plugins, objectives
    sweep.jsonl                a row when a trial starts, and one when it ends
    best/                      links to the run of the best trial: `framework eval .../best`
    003_lr-0.01_seed-2/        the run of a trial
"""

import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from framework.errors import RunError
from framework.runs.folder import FOLDER_NAME, check_encoding, claim, locked
from framework.runs.sweep_files import REQUEST, ROWS, Trial, parse_trial, read_request
from framework.system.files import (
    MOST_LINE_BYTES,
    MOST_ROWS_BYTES,
    AppendFile,
    failure_reason,
    open_file,
    unwritable,
    write_file,
)
from framework.system.locks import WriterLock, lock, locks_disabled

LOCK = "sweep.lock"
MAX_RUN_NAME = 48  # characters; TensorBoard lists runs in a narrow column


class SweepFolder:
    """The folder of a sweep. Several processes may record trials in it."""

    def __init__(self, path: Path):
        self.path = path
        self.lock: BinaryIO | WriterLock | None = None
        self.rows: dict[int, Trial] = {}  # the last row of each trial, as far as read
        self.offset = 0

    @classmethod
    def claim(
        cls, root: Path, experiment: str, name: str | None, request: Mapping[str, Any]
    ) -> "SweepFolder":
        """Create a folder and save the request.

        Args:
            root: the folder of all runs.
            experiment: the name of the experiment.
            name: of the folder; None for the date and time.
            request: the content of sweep.json.

        Raises:
            RunError: the name is invalid or taken, or the folder cannot be created.
        """
        if name is not None and (not re.fullmatch(FOLDER_NAME, name) or ".." in name):
            raise RunError(
                "sweep.name: expected letters, digits, '.', '_' and '-' (at most 128), "
                f"got {name!r}"
            )
        parent = root / experiment
        check_encoding(parent.resolve())
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent):
                if name is not None:
                    check_unused(parent / name)
                folder = cls(claim(parent, name))
                folder._save_request(request)
        except OSError as error:
            reason = failure_reason(parent / "...", error)
            raise RunError(
                f"the sweep's folder in {parent} cannot be created: {reason} (run.root={root})"
            ) from None
        return folder

    def _save_request(self, request: Mapping[str, Any]) -> None:
        content = json.dumps({**request, "began": time.time()}, indent=2, default=str)
        try:
            write_file(self.path, REQUEST, content + "\n")
        except RunError:
            with suppress(OSError):
                self.path.rmdir()
            raise

    def request(self) -> dict[str, Any]:
        """Return the request of the sweep, empty for another folder."""
        return read_request(self.path)

    def acquire(self) -> None:
        """Lock the sweep until `release`.

        Raises:
            RunError: another process runs the sweep.
        """
        path = self.path / LOCK
        if locks_disabled():
            self.lock = WriterLock(self.path, LOCK)
            return
        try:
            file = open_file(self.path, LOCK, "a")
        except OSError as error:
            raise unwritable(path, error) from error
        if not lock(file, path, wait=False):
            file.close()
            raise RunError(
                f"{self.path} is run by another process: wait for it, or choose another sweep.name"
            )
        self.lock = file

    def release(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def record(self, trial: Trial) -> None:
        """Append a row in one write, on its own line also after one that a kill left incomplete.

        Raises:
            RunError: the row cannot be written; then no part of it is.
        """
        row = asdict(trial)
        for name, value in trial.metrics.items():
            row["metrics"][name] = value if math.isfinite(value) else None
        line = json.dumps(row, default=str).encode() + b"\n"
        rows = AppendFile(self.path, ROWS)
        try:
            lock(rows.file, self.path / ROWS, wait=True)  # released when the file is closed
            if has_incomplete_line(rows.file):
                line = b"\n" + line
            rows.append(line)
        finally:
            rows.close()

    def trials(self) -> list[Trial]:
        """Return the last row of each trial, by number."""
        try:
            with open_file(self.path, ROWS, most=MOST_ROWS_BYTES) as file:
                file.seek(self.offset)
                while line := file.readline(MOST_LINE_BYTES):
                    if not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES:
                        break  # being written, or left incomplete by a kill
                    self.offset += len(line)
                    trial = parse_trial(line)
                    if trial is not None:
                        self.rows[trial.number] = trial
        except OSError:
            return []
        return [self.rows[number] for number in sorted(self.rows)]

    def link_best(self, trial: Trial) -> None:
        """Make `best` a folder of links to the files of a trial's run.

        Event files are left out: TensorBoard follows links and would show the run twice.
        """
        try:
            with locked(self.path):
                self._link_best(trial)
        except OSError as error:
            raise unwritable(self.path / "best", error) from error

    def _link_best(self, trial: Trial) -> None:
        best = self.path / "best"
        run = self.path / trial.folder
        config = best / "config.yaml"
        if config.exists() and config.resolve().parent.name == trial.folder:
            return
        if not run.is_dir():
            return  # deleted in the meantime
        temporary = self.path / f".best-{os.urandom(8).hex()}"
        try:
            temporary.mkdir()
            for file in run.glob("[!.]*"):
                if "tfevents" not in file.name:
                    (temporary / file.name).symlink_to(Path("..", trial.folder, file.name))
            if best.is_symlink() or best.is_file():
                best.unlink()
            shutil.rmtree(best, ignore_errors=True)
            temporary.rename(best)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_unused(path: Path) -> None:
    """Raise RunError when a folder is one of a sweep or run."""
    if (path / REQUEST).exists() or (path / "config.yaml").exists():
        raise RunError(
            f"{path} exists already: choose another sweep.name, or continue it with resume=auto"
        )


def has_incomplete_line(file: BinaryIO) -> bool:
    """Return whether the last line of a file has no newline."""
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def run_name(number: int, settings: Mapping[str, Any]) -> str:
    """Return the name of a trial's run folder: 003_lr-0.01_seed-2.

    Settings that do not fit are left out; the table of the sweep and the run have all of them.
    """
    names = short_keys(settings)
    name = f"{number:03}"
    for key, value in settings.items():
        longer = f"{name}_{names[key]}-{file_name_part(value)}"
        if len(longer) > MAX_RUN_NAME and "_" in name:
            break
        name = longer
    return re.sub(r"\.{2,}", ".", name)[:MAX_RUN_NAME].rstrip("._-")


def short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return a short name for each key: `lr` for optimizer.lr if no other key ends in `lr`."""
    last_parts = {key: key.rpartition(".")[2] for key in keys}
    counts = Counter(last_parts.values())
    return {key: name if counts[name] == 1 else key for key, name in last_parts.items()}


def file_name_part(value: Any) -> str:
    """Return a value as part of a file name."""
    text = str(value)
    if value is None:
        text = "null"
    elif isinstance(value, float):
        text = f"{value:.3g}"
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).replace("+", "").strip("-") or "x"
