"""Find the run, and the checkpoint, that `resume=` and `framework resume` name."""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from framework.composition.spec import Spec
from framework.errors import RunError, did_you_mean, short
from framework.errors.paths import expanded
from framework.errors.terminal import note
from framework.runs import checkpoint
from framework.runs.folder import dump, read_config, resolve_run, run_of_checkpoint
from framework.runs.run_state import read_status
from framework.system.files import parse_yaml, read_bytes

from .config_changes import fingerprint

MOST_PARSED = 500  # configs that `resume=auto` reads; one takes 2 ms
MOST_NOTES = 3


def find_run(spec: Spec, experiment: str) -> Path | None:
    """Return the folder of the run to resume; None to begin a new run.

    With `resume=auto` it is the run of this name or, without a name, the newest unfinished run of
    the same config.

    Raises:
        RunError: `resume` is a path, but neither of a run nor of a checkpoint.
    """
    if spec.resume == "never":
        return None
    if spec.resume != "auto":
        run = run_to_resume(expanded(spec.resume))
        read_config(run)
        return run
    root = Path(spec.sections["run"]["root"]) / experiment
    name = spec.sections["run"]["name"]
    if name is None:
        return find_unfinished(root, spec.tree)
    return root / name if (root / name / "config.yaml").is_file() else None


def run_to_resume(path: Path) -> Path:
    """Return the run that a path names, by its own folder or that of one of its checkpoints."""
    path = resolve_run(path)
    return run_of_checkpoint(path) or path


def named_checkpoint(resume: str) -> Path | None:
    """Return the checkpoint of `resume=RUN/checkpoints/step-00000040`; None if it names a run.

    The link `best` is resolved.

    Raises:
        RunError: there is no such checkpoint, or it has NaN.
        CheckpointError: the checkpoint is damaged.
    """
    path = resolve_run(expanded(resume))
    run = run_of_checkpoint(path)
    if run is None:
        return None
    path = checkpoint.target_of(path)
    if not path.is_dir():
        known = [each.name for each in checkpoint.listed(run / "checkpoints")]
        raise RunError(f"there is no checkpoint {path}; {did_you_mean(path.name, known)}")
    # In a copy without links, `best` is a folder, and the same checkpoint may exist by its step.
    by_step = path.with_name(checkpoint.folder_name(checkpoint.step_in(path)))
    chosen = by_step if by_step.is_dir() else path
    nan = checkpoint.verify(chosen)["nan"]
    if nan:
        raise RunError(
            f"{chosen} cannot be resumed: {short(nan[0], most=200, quote=False)} holds NaN; "
            "choose an earlier checkpoint"
        )
    return chosen


class Candidate(NamedTuple):
    """A run folder that `resume=auto` considers, and the time when its config was written."""

    path: Path
    written: int


def find_unfinished(root: Path, tree: Mapping[str, Any]) -> Path | None:
    """Return the newest unfinished run of a config in a folder of runs.

    Damaged runs are skipped with a note. The status.json of a run has the fingerprint of its
    config. Without it (in an older run) the config is read if its text is equal to that of this
    config, and for the newest `MOST_PARSED` runs in any case.
    """
    skipped: list[str] = []
    expected = fingerprint(tree)
    expected_text = comparable(dump("config.yaml", tree).encode())
    parsed = 0
    found = None
    for run in candidates(root, skipped):
        try:
            status = read_status(run.path)
            if status.get("status") == "done" or status.get("config", expected) != expected:
                continue
            text = read_bytes(run.path, "config.yaml")
            if "config" not in status and comparable(text) != expected_text:
                parsed += 1
                if parsed > MOST_PARSED:
                    continue
            config = parse_yaml(text, run.path / "config.yaml")
            if isinstance(config, dict) and fingerprint(config) == expected:
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


def candidates(root: Path, skipped: list[str]) -> list[Candidate]:
    """Return the runs in a folder, the newest first.

    Args:
        skipped: receives a note on each entry that looks like a run and is none.
    """
    try:
        entries = list(os.scandir(root))
    except OSError:
        return []
    found = []
    for entry in entries:
        try:
            if entry.is_symlink() and entry.is_dir():
                skipped.append(
                    f"skipped {entry.path}: it is a symbolic link (resume={entry.path} follows it)"
                )
            if not entry.is_dir(follow_symlinks=False):
                continue
            config = os.lstat(f"{entry.path}/config.yaml")
        except FileNotFoundError:
            continue
        except OSError as error:
            skipped.append(f"skipped {entry.path}: {error.strerror}")
            continue
        if stat.S_ISREG(config.st_mode):
            found.append(Candidate(Path(entry.path), config.st_mtime_ns))
        else:
            skipped.append(f"skipped {entry.path}: its config.yaml is not a regular file")
    return sorted(found, key=lambda run: run.written, reverse=True)


def comparable(config: bytes) -> bytes:
    """Return the text of a config without the sections that do not belong to the fingerprint."""
    return re.sub(rb"(?m)^(run|plugins):.*\n(?:[ -].*\n)*", b"", config)


def print_notes(notes: Sequence[str]) -> None:
    """Print the first notes on standard error, and the number of the others."""
    for text in notes[:MOST_NOTES]:
        note(text)
    if len(notes) > MOST_NOTES:
        note(f"{len(notes) - MOST_NOTES} more notes of this kind")
