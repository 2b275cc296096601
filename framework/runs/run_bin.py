"""Remove runs: they move to a bin inside the folder of runs, from which they can be restored.

runs/.bin/2026-12-01_09-30-00/default/first     the run that was runs/default/first
"""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from framework.errors import RunError, did_you_mean
from framework.errors.paths import expanded, real_path
from framework.system.files import failure_reason, make_folder, unwritable
from framework.system.locks import lock_holder

from .folder import RunFolder, resolve_run, run_advice
from .run_files import RunFiles, is_run, is_sweep, trials_in
from .run_state import ACTIVE

BIN = ".bin"
MOST_LISTED = 1_000_000  # entries of a bin that are looked through
LOCK = ".lock"  # of an experiment, written when one of its runs is moved
SWEEP_LOCK = "sweep.lock"


def find_run_folder(root: Path, name: str) -> Path:
    """Return the folder of a run or sweep that a user names by its path, or its name below `root`.

    Args:
        root: the folder of runs.
        name: the path or name; of `best` in a sweep, the run is returned.

    Raises:
        RunError: there is no such run or sweep.
    """
    path = expanded(name)
    if not path.is_dir() and (root / path).is_dir():
        path = root / path
    path = resolve_run(path)
    if not path.is_dir():
        raise RunError(f"there is no run {name}, neither here nor in {root}")
    if not is_run(path) and not is_sweep(path):
        raise RunError(
            f"{path} is not the folder of a run: it has no config.yaml{run_advice(path)}"
        )
    return path


def remove_runs(root: Path, paths: Sequence[Path]) -> list[Path]:
    """Move runs and sweeps to the bin of their folder of runs, and return their new folders.

    Nothing is moved if one of them cannot be.

    Raises:
        RunError: one of them is running, or not in `root`, or the bin cannot be written.
    """
    inside = real_path(root)
    names = []
    for path in paths:
        place = real_path(path)
        if not place.is_relative_to(inside) or place == inside or BIN in place.parts:
            raise RunError(f"{path} is not in the folder of runs {root}: give its --root")
        check_ended(path)
        check_not_best(path)
        names.append(place.relative_to(inside))
    entry = new_entry(root)
    moved = []
    for path, name in zip(paths, names, strict=True):
        target = entry / name
        make_folder(target.parent)
        move(path, target)
        moved.append(target)
    return moved


def check_ended(path: Path) -> None:
    """Raise RunError if a process writes to a run, or to a run of a sweep."""
    runs = [path]
    if is_sweep(path):
        if lock_holder(path, SWEEP_LOCK) is not None:
            raise RunError(f"{path} is running: stop it first")
        runs = trials_in(path)
    for run in runs:
        if RunFiles(run).state in ACTIVE:
            raise RunError(f"{run} is running: stop it first")


def check_not_best(path: Path) -> None:
    """Raise RunError for the run that `best` of its sweep leads to."""
    if not is_sweep(path.parent):
        return
    link = path.parent / "best" / "config.yaml"
    if link.is_symlink() and os.readlink(link) == f"../{path.name}/config.yaml":
        raise RunError(f"{path} is the best run of its sweep: remove the sweep {path.parent}")


def new_entry(root: Path) -> Path:
    """Create a folder in the bin, named by the time."""
    folder = root / BIN
    if folder.is_symlink():
        raise RunError(f"{folder} is a symbolic link; runs are not moved through links")
    make_folder(folder)
    base = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        entry = folder / (base if attempt == 1 else f"{base}_{attempt}")
        try:
            entry.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise unwritable(entry, error) from error
        return entry
    raise RunError(f"{folder} has too many entries of {base}")


def move(path: Path, target: Path) -> None:
    """Move a folder that no process writes to."""
    lock = None if is_sweep(path) else RunFolder.existing(path)
    try:
        path.rename(target)
    except OSError as error:
        raise RunError(
            f"{path} cannot be moved to {target}: {failure_reason(target, error)}"
        ) from error
    finally:
        if lock is not None:
            lock.release()


def removed_runs(root: Path) -> dict[str, Path]:
    """Return the runs and sweeps in the bin by their former names; of equal ones the newest."""
    found: dict[str, Path] = {}
    folder = root / BIN
    if folder.is_symlink() or not folder.is_dir():
        return found
    for entry in sorted(folder.iterdir()):
        for path in below(entry):
            found[str(path.relative_to(entry))] = path
    return found


def below(entry: Path) -> list[Path]:
    """Return the runs and sweeps in an entry of the bin, without the trials of sweeps."""
    found: list[Path] = []
    pending = [entry]
    while pending and len(found) < MOST_LISTED:
        folder = pending.pop()
        if folder.is_symlink() or not folder.is_dir():
            continue
        if folder != entry and (is_run(folder) or is_sweep(folder)):
            found.append(folder)
            continue
        pending.extend(folder.iterdir())
    return found


def restore_run(root: Path, name: str) -> Path:
    """Move a run from the bin back to its folder, and return that.

    Args:
        root: the folder of runs.
        name: the former name relative to `root`, such as default/first.

    Raises:
        RunError: the bin has no such run, or its folder exists.
    """
    removed = removed_runs(root)
    name = name.rstrip("/")
    if name not in removed:
        known = did_you_mean(name, removed) if removed else "the bin is empty"
        raise RunError(f"there is no removed run {name} in {root}; {known}")
    path = removed[name]
    target = root / name
    if os.path.lexists(target):
        raise RunError(f"{target} exists: the removed run stays in {path}")
    make_folder(target.parent)
    move(path, target)
    for folder in path.parents:
        if folder == root / BIN or [inner.name for inner in folder.iterdir()] not in ([], [LOCK]):
            break
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()
    return target


def empty_bin(root: Path) -> int:
    """Delete the runs in the bin, and return their number.

    Raises:
        RunError: the bin cannot be deleted.
    """
    count = len(removed_runs(root))
    folder = root / BIN
    if folder.is_symlink() or not folder.is_dir():
        return 0
    try:
        shutil.rmtree(folder)  # does not follow links
    except OSError as error:
        raise unwritable(folder, error) from error
    return count
