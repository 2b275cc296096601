"""Write checkpoints durably."""

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from framework.errors import CheckpointError, RunError
from framework.registry.discovery import package_version
from framework.runs.snapshot import Facts, Snapshot, Weights, snapshot
from framework.runtime.shapes import first_line
from framework.system.files import open_file, write_file

from .layout import (
    MANIFEST,
    MODEL,
    SCHEMA,
    TRAINING,
    discard,
    files_in,
    folder_name,
    own_sha256,
    refuse_links,
)
from .save_errors import failure_cause, save_error

UNWRITABLE = (OSError, RuntimeError, SafetensorError, RunError)
"""Errors of writing: torch wraps the OSError, safetensors names only its number."""


def save(folder: Path, model: Weights, training: Any, step: int, run: Facts = None) -> Path:
    """Write the checkpoint of a step; an existing one of that step is replaced.

    Args:
        folder: of the checkpoints; the folder above it must exist.
        model: the state of the model.
        training: the rest of the state, in plain types and tensors.
        run: facts for the manifest in plain JSON types, such as the id of the run.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: a value is of another type (the message has its path, such as
            "callbacks.early_stop.best"), or the files cannot be written (the message has the bytes
            needed and free if the disk is full). No partial checkpoint remains.
    """
    return commit(folder, snapshot(model, training, step, run))


def commit(folder: Path, state: Snapshot) -> Path:
    """Write a snapshot and return the folder of the checkpoint.

    Raises:
        CheckpointError: as `save` does.
    """
    needed = state.nbytes
    hidden = hidden_folder(folder, state.step)
    try:
        make_hidden(hidden, needed)
        write(hidden, state)
        return publish(hidden, folder / folder_name(state.step))
    except UNWRITABLE as error:
        raise save_error(error)(
            f"step {state.step} cannot be saved in {folder}: {failure_cause(error, folder, needed)}"
        ) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)  # after a success it has been renamed


def hidden_folder(folder: Path, step: int) -> Path:
    """Return a new name for the folder in which a checkpoint is written."""
    return folder / f".{folder_name(step)}-{uuid4().hex[:8]}"


def make_hidden(hidden: Path, needed: int) -> None:
    """Make the folder in which a checkpoint is written.

    Args:
        needed: bytes that are written into it.

    Raises:
        CheckpointError: the folder of the checkpoints is a link.
        OSError: it cannot be made, or the disk has less space.
    """
    folder = hidden.parent
    if folder.name == "checkpoints":
        refuse_links(folder)
    make_parent(folder)
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    hidden.mkdir()


def make_parent(folder: Path) -> None:
    """Make the folder of the checkpoints; if the folder above is missing, the run was deleted."""
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def write(folder: Path, state: Snapshot) -> None:
    """Write the model, the training state and the manifest; all are on the disk afterwards."""
    write_model(folder / MODEL, state)
    write_training(folder / TRAINING, state.training)
    files = {name: measured(folder / name) for name in (MODEL, TRAINING)}
    nan = [name for name, tensor in state.tensors.items() if holds_nan(tensor)]
    write_manifest(folder, state, files, nan, SCHEMA)


def write_manifest(
    folder: Path, state: Snapshot, files: Mapping[str, Any], nan: Sequence[str], schema: int
) -> None:
    """Write the manifest and flush the folder.

    Args:
        files: bytes and sha256 of each file.
        nan: the names of the model's tensors with NaN.
        schema: the number of the format.
    """
    manifest = {
        "schema": schema,
        "step": state.step,
        "files": dict(files),
        "nan": list(nan),
        "torch": torch.__version__,
        "framework": package_version("framework") or "unknown",
        "run": state.run,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    manifest["sha256"] = own_sha256(manifest)
    write_file(folder, MANIFEST, json.dumps(manifest, indent=2))
    sync(folder / MANIFEST)
    sync(folder)


def write_model(path: Path, state: Snapshot) -> None:
    """Write the tensors of a model."""
    try:
        save_file(state.tensors, path, metadata={"tied": json.dumps(state.tied)})
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"step {state.step} cannot be saved: the model's state: {first_line(error)}"
        ) from error
    # safetensors makes a private file, whatever the umask.
    os.chmod(path, path.parent.stat().st_mode & 0o666)


def write_training(path: Path, training: Any) -> None:
    """Write a training state."""
    with open_file(path.parent, path.name, "x") as file, io.BufferedWriter(file) as buffered:
        torch.save(training, buffered)


def measured(path: Path) -> dict[str, Any]:
    """Flush a file to the disk and return its entry in the manifest: bytes and sha256."""
    sync(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def holds_nan(tensor: Tensor) -> bool:
    """Return whether a tensor has a NaN; infinity is allowed, as in a mask."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return False
    if tensor.element_size() == 1:
        tensor = tensor.float()  # float8 has no arithmetic
    if not tensor.sum().isnan():  # much faster than isnan of all elements
        return False
    return bool(tensor.isnan().any())  # the sum of inf and -inf is NaN too


def publish(hidden: Path, final: Path) -> Path:
    """Rename a hidden folder to its final name, durably; an existing checkpoint is replaced."""
    refuse_links(final)
    replaced = hidden.with_name(hidden.name + ".replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(hidden, final)
    sync(final.parent)
    if replaced.exists():
        discard(replaced, files_in(replaced))
    return final


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
