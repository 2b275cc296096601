"""Find the run that a command resumes."""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from framework.composition.spec import Spec
from framework.errors import RunError, did_you_mean
from framework.errors.paths import expanded
from framework.errors.terminal import note
from framework.runs import checkpoint
from framework.runs.folder import (
    dump,
    read_config,
    resolve_run,
    run_of_checkpoint,
)
from framework.runs.status_file import read_status
from framework.system.files import parse_yaml, read_bytes

from .config_changes import fingerprint

MOST_PARSED = 500  # configs that `resume=auto` reads; one takes 2 ms
MOST_NOTES = 3


def find_run(spec: Spec, experiment: str) -> Path | None:
    """Return the folder that `resume=` means: the run of a path; for auto the run of this name, or else the newest
    unfinished run of the same config; None when a new run is to begin. Raises RunError for a path that is no run, and
    no checkpoint of one.
    """
    if spec.resume == "never":
        return None
    if spec.resume != "auto":
        run = run_meant_by(expanded(spec.resume))
        read_config(run)
        return run
    root, name = Path(spec.sections["run"]["root"]) / experiment, spec.sections["run"]["name"]
    if name is not None:
        return root / name if (root / name / "config.yaml").is_file() else None
    return find_unfinished(root, spec.tree)


class Candidate(NamedTuple):
    """A run folder that `resume=auto` looks at, and when its config was written."""

    path: Path
    written: int


def find_unfinished(root: Path, tree: Mapping[str, Any]) -> Path | None:
    """Return the newest unfinished run of a config below a folder of runs.

    What is broken is skipped with a note. Of a run that is not done, status.json tells the fingerprint of its config;
    the config of an older one, which does not, is read if its text is that of this config, and of the newest
    `MOST_PARSED` in any case.
    """
    skipped: list[str] = []
    wanted, own = fingerprint(tree), comparable(dump("config.yaml", tree).encode())
    parsed = 0
    found = None
    for run in resumable_runs(root, skipped):
        try:
            status = read_status(run.path)
            if status.get("status") == "done" or status.get("config", wanted) != wanted:
                continue
            text = read_bytes(run.path, "config.yaml")
            if "config" not in status and comparable(text) != own:
                parsed += 1
                if parsed > MOST_PARSED:
                    continue
            config = parse_yaml(text, run.path / "config.yaml")
            if isinstance(config, dict) and fingerprint(config) == wanted:
                found = run.path
                break
        except (OSError, RunError, RecursionError, ValueError) as error:
            skipped.append(f"skipped {run.path}: {error}")
    if parsed > MOST_PARSED:
        skipped.append(
            f"not compared: {parsed - MOST_PARSED} older runs, whose status.json has no config"
        )
    print_notes(skipped)
    return found


def resumable_runs(root: Path, skipped: list[str]) -> list[Candidate]:
    """Return the runs below a folder, the newest first; what is no run is added to `skipped` if it looks like one."""
    found = []
    try:
        entries = list(os.scandir(root))
    except OSError:
        return []
    for entry in entries:
        config = f"{entry.path}/config.yaml"
        try:
            if not entry.is_dir(follow_symlinks=False):
                if entry.is_symlink() and entry.is_dir():
                    skipped.append(
                        f"skipped {entry.path}: it is a symbolic link (resume={entry.path} follows it)"
                    )
                continue
            about = os.lstat(config)
        except FileNotFoundError:
            continue
        except OSError as error:
            skipped.append(f"skipped {entry.path}: {error.strerror}")
            continue
        if stat.S_ISREG(about.st_mode):
            found.append(Candidate(Path(entry.path), about.st_mtime_ns))
        else:
            skipped.append(f"skipped {entry.path}: its config.yaml is not a regular file")
    return sorted(found, key=lambda run: run.written, reverse=True)


def comparable(config: bytes) -> bytes:
    """Return the text of a config without the sections that may differ between two runs of one experiment."""
    return re.sub(rb"(?m)^(run|plugins):.*\n(?:[ -].*\n)*", b"", config)


def print_notes(notes: Sequence[str]) -> None:
    """Print notes on the standard error, a few of them."""
    for each in notes[:MOST_NOTES]:
        note(each)
    if len(notes) > MOST_NOTES:
        note(f"{len(notes) - MOST_NOTES} more notes of this kind")


def run_meant_by(path: Path) -> Path:
    """Return the run that is to go on: a folder itself, or the run of a checkpoint."""
    path = resolve_run(path)
    return run_of_checkpoint(path) or path


def read_resumable(path: Path) -> dict[str, Any]:
    """Return the config of a run to go on with, by its path or that of a checkpoint. Raises RunError for no run."""
    return read_config(run_meant_by(path))


def named_checkpoint(resume: str) -> Path | None:
    """Return the checkpoint that `resume=RUN/checkpoints/step-00000040` names; None for a run.

    `best` is the checkpoint that the link leads to. Raises RunError if there is none, CheckpointError if it is damaged.
    """
    path = resolve_run(expanded(resume))
    run = run_of_checkpoint(path)
    if run is None:
        return None
    path = checkpoint.target_of(path)
    if not path.is_dir():
        known = [each.name for each in checkpoint.listed(run / "checkpoints")]
        raise RunError(f"there is no checkpoint {path}; {did_you_mean(path.name, known)}")
    beside = path.with_name(checkpoint.folder_name(checkpoint.step_in(path)))
    chosen = beside if beside.is_dir() else path
    spoiled = checkpoint.verify(chosen)["nan"]
    if spoiled:
        raise RunError(
            f"{chosen} cannot be resumed: {str(spoiled[0])[:200]} holds NaN; choose an earlier checkpoint"
        )
    return chosen
