"""The names of checkpoints and of their files."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from framework.errors import CheckpointError

MODEL = "model.safetensors"
TRAINING = "training.pt"
MANIFEST = "MANIFEST.json"
FILES = (MODEL, TRAINING, MANIFEST)
SCHEMA = 1
SCHEMA_WITH_PARTS = 2
PARTS = re.compile(r"training-\d{5,}-\d+\.safetensors")
TEMPORARY_PARTS = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
"""Files that `StateSaver` has written; those of the model are deleted, the others renamed."""
CHECKPOINT_FOLDER = re.compile(r"step-(\d{8,})")
HIDDEN_FOLDER = re.compile(r"\.(step-\d{8,})-[0-9a-f]{8}(\.replaced|\.removed)?")
TEMPORARY_LINK = ".best"  # the link `best` before its rename


def listed(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder by step, also damaged ones."""
    if not folder.is_dir():
        return []
    checkpoints = [path for path in folder.iterdir() if CHECKPOINT_FOLDER.fullmatch(path.name)]
    return sorted(checkpoints, key=step_of)


def folder_name(step: int) -> str:
    """Return the name of the folder of a step."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint."""
    return int(checkpoint.name.partition("-")[2])


def parts_name(rank: int, number: int) -> str:
    """Return the name of a file of a process, with its parts of sharded tensors."""
    return f"training-{rank:05d}-{number}.safetensors"


def files_in(folder: Path) -> list[str]:
    """Return the names that the files of a checkpoint may have, and those of its parts."""
    return [*FILES, *filter(PARTS.fullmatch, os.listdir(folder))]


def target_of(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint; the link `best` is resolved.

    Raises:
        CheckpointError: the path is another link in a folder of checkpoints, or that folder is a
            link.
    """
    if checkpoint.parent.name != "checkpoints":
        return checkpoint  # a path that the user named
    refuse_links(checkpoint.parent)
    if not checkpoint.is_symlink():
        return checkpoint
    name = os.readlink(checkpoint)
    target = checkpoint.parent / name
    if CHECKPOINT_FOLDER.fullmatch(name) is None or target.is_symlink():
        raise CheckpointError(
            f"{checkpoint} is a symbolic link to {name!r}; expected a checkpoint in the same folder"
        )
    return target


def refuse_links(*paths: Path) -> None:
    """Raise CheckpointError if a path is a symbolic link."""
    for path in paths:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a symbolic link; checkpoints are not read or written through links"
            )


def own_sha256(manifest: dict[str, Any]) -> str:
    """Return the sha256 of a manifest, which is stored in the manifest itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def discard(folder: Path, names: Iterable[str]) -> bool:
    """Delete files of a folder, then the folder.

    Returns:
        False if the folder contains anything else; it is then kept.
    """
    for name in names:
        path = folder / name
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
    if any(folder.iterdir()):
        return False
    folder.rmdir()
    return True
