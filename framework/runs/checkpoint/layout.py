"""The files and names of checkpoints."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from framework.errors import CheckpointError

MODEL, TRAINING, MANIFEST = FILES = ("model.safetensors", "training.pt", "MANIFEST.json")
SCHEMA = 1
VISIBLE = re.compile(r"step-(\d{8,})")
ASIDE = ".best"  # a link that has not got its name yet
HIDDEN = re.compile(r"\.(step-\d{8,})-[0-9a-f]{8}(\.replaced|\.removed)?")


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, good or not, by step."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if VISIBLE.fullmatch(path.name)), key=step_of)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(checkpoint.name.partition("-")[2])


def target_of(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint: of the link `best` the one beside it that it names.

    Raises CheckpointError for any other link in a folder of checkpoints, and when that folder is a link.
    """
    if checkpoint.parent.name != "checkpoints":
        return checkpoint  # a path that the user named
    refuse_links(checkpoint.parent)
    if not checkpoint.is_symlink():
        return checkpoint
    name = os.readlink(checkpoint)
    beside = checkpoint.parent / name
    if VISIBLE.fullmatch(name) is None or beside.is_symlink():
        raise CheckpointError(
            f"{checkpoint} is a symbolic link to {name!r}; expected a checkpoint beside it"
        )
    return beside


def refuse_links(*paths: Path) -> None:
    for path in paths:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a symbolic link; checkpoints are not read or written through links"
            )


def own_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def discard(folder: Path, names: Iterable[str]) -> bool:
    """Delete those files and then the folder; return False when something else is in it, which stays."""
    for name in names:
        path = folder / name
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
    if any(folder.iterdir()):
        return False
    folder.rmdir()
    return True
