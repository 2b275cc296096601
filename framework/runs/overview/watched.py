"""The runs that `framework watch` follows: those of the user, or those that are running."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from framework.errors import RunError
from framework.errors.paths import shorter
from framework.errors.terminal import printable
from framework.runs.file_names import STATUS_FILE
from framework.runs.folder import in_default_root, resolve_run
from framework.runs.run_files import RunFiles, folders_in, is_sweep, run_files, trials_in
from framework.runs.run_state import ACTIVE

from .live import LiveRun

SEARCH_SECONDS = 5.0  # between two searches for new runs
BUDGET_SECONDS = 0.5  # of a refresh; further runs are read in the next ones
MOST_CANDIDATES = 200  # of the newest runs, among which those that are running are found


class Watched:
    """The runs that are shown.

    Args:
        paths: folders of runs and sweeps; none for those that are running.
        root: the folder of all runs.

    Attributes:
        runs: those of the paths, and the trials of the sweeps.

    Raises:
        RunError: a path is neither a run nor a sweep, or there is no run in the root.
    """

    def __init__(self, paths: Sequence[Path], root: Path):
        self.paths = [in_default_root(path) for path in paths]
        self.root = root
        self.runs: list[LiveRun] = []
        self.searched = -math.inf
        self.next_read = 0
        for path in self.paths:
            if not is_sweep(path):
                run_files(path)
        self._search()
        if not self.runs:
            where = ", ".join(map(str, paths)) if paths else str(root)
            raise RunError(f"there is no run in {where}")

    def refresh(self, budget: float = BUDGET_SECONDS) -> None:
        """Read what is new; with many runs, some of them in the next call.

        Args:
            budget: the seconds after which the others wait for the next call.
        """
        began = time.monotonic()
        if began - self.searched > SEARCH_SECONDS:
            self._search()
        for _ in range(len(self.runs)):
            self.runs[self.next_read % len(self.runs)].refresh()
            self.next_read += 1
            if time.monotonic() - began > budget:
                return

    def _search(self) -> None:
        """Add new runs, such as further trials of a sweep."""
        self.searched = time.monotonic()
        known = {run.path for run in self.runs}
        for path in self.paths or current_runs(self.root):
            folder = path if is_sweep(path) else resolve_run(path)
            members = trials_in(folder) if is_sweep(folder) else [folder]
            for run in members:
                if run not in known:
                    known.add(run)
                    self.runs.append(LiveRun(run, label_of(run, self.root)))


def current_runs(root: Path) -> list[Path]:
    """Return the runs in a root that are running, otherwise the latest one.

    In place of the trials of a sweep it is the sweep.
    """
    found: list[tuple[int, Path]] = []
    for experiment in folders_in(root):
        for path in folders_in(experiment):
            members = folders_in(path) if is_sweep(path) else [path]
            for run in members:
                written = status_time(run)
                if written is not None:
                    found.append((written, run))
    newest = [run for _, run in sorted(found, reverse=True)[:MOST_CANDIDATES]]
    current = [run for run in newest if RunFiles(run).state in ACTIVE] or newest[:1]
    paths = [run.parent if is_sweep(run.parent) else run for run in current]
    return sorted(dict.fromkeys(paths))


def status_time(run: Path) -> int | None:
    """Return the time of the last change of status.json; None if the folder has none."""
    try:
        return os.lstat(run / STATUS_FILE).st_mtime_ns
    except OSError:
        return None


def label_of(run: Path, root: Path) -> str:
    """Return a short name of a run: below the root, of a trial in its sweep."""
    if is_sweep(run.parent):
        return printable(run.name)
    try:
        return printable(str(run.relative_to(root)))
    except ValueError:
        return printable(shorter(str(run)))
