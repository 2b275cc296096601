"""Write checkpoints durably."""

import errno
import hashlib
import io
import json
import os
import shutil
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
    FILES,
    MANIFEST,
    MODEL,
    SCHEMA,
    TRAINING,
    discard,
    folder_name,
    own_sha256,
    refuse_links,
)
from .save_errors import cause, save_error

UNWRITABLE = (OSError, RuntimeError, SafetensorError, RunError)
"""Errors of writing: torch wraps the OSError, safetensors names only its number."""


def save(folder: Path, model: Weights, training: Any, step: int, run: Facts = None) -> Path:
    """Write the checkpoint of a step and return its folder; one of the same step is replaced.

    run: facts for the manifest (plain JSON types), such as the run's id.
    Raises CheckpointError when a value is not plain (named by its path, "callbacks.early_stop.best"), and when the
    files cannot be written (named, with the bytes needed and free if the disk is full); nothing is left behind then.
    """
    return commit(folder, snapshot(model, training, step, run))


def commit(folder: Path, taken: Snapshot) -> Path:
    """Write a snapshot and return its folder. Raises CheckpointError as `save` does."""
    needed = taken.nbytes
    beside = folder / f".{folder_name(taken.step)}-{uuid4().hex[:8]}"
    try:
        if folder.name == "checkpoints":
            refuse_links(folder)
        make(folder)
        if needed > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        beside.mkdir()
        write(beside, taken)
        return publish(beside, folder / folder_name(taken.step))
    except UNWRITABLE as error:
        why = cause(error, folder, needed)
        raise save_error(error)(f"step {taken.step} cannot be saved in {folder}: {why}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # after a success it is no longer there


def write(folder: Path, taken: Snapshot) -> None:
    """Fill a folder: the model, the training state, then the manifest; each is on the disk when this returns."""
    write_model(folder / MODEL, taken)
    write_training(folder / TRAINING, taken.training)
    files = {name: measured(folder / name) for name in (MODEL, TRAINING)}
    manifest = {
        "schema": SCHEMA,
        "step": taken.step,
        "files": files,
        "nan": [name for name, tensor in taken.tensors.items() if holds_nan(tensor)],
        "torch": torch.__version__,
        "framework": package_version("framework") or "unknown",
        "run": taken.run,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    manifest["sha256"] = own_sha256(manifest)
    write_file(folder, MANIFEST, json.dumps(manifest, indent=2))
    sync(folder / MANIFEST)
    sync(folder)


def write_model(path: Path, taken: Snapshot) -> None:
    try:
        save_file(taken.tensors, path, metadata={"tied": json.dumps(taken.tied)})
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"step {taken.step} cannot be saved: the model's state: {first_line(error)}"
        ) from error
    os.chmod(
        path, path.parent.stat().st_mode & 0o666
    )  # safetensors makes a private file, whatever the umask


def write_training(path: Path, training: Any) -> None:
    with open_file(path.parent, path.name, "x") as file, io.BufferedWriter(file) as buffered:  # type: ignore[type-var]
        torch.save(training, buffered)


def holds_nan(tensor: Tensor) -> bool:
    """Whether a tensor has a NaN; infinity is no fault, a mask has it."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return False
    values = (
        tensor if tensor.element_size() > 1 else tensor.float()
    )  # there is no arithmetic on float8
    return bool(values.sum().isnan()) and bool(
        values.isnan().any()
    )  # the sum is quick, but ∞ - ∞ is NaN too


def publish(written: Path, final: Path) -> Path:
    """Give a written folder its name, durably. A checkpoint of that name goes, once the new one is in its place."""
    refuse_links(final)
    replaced = written.with_name(written.name + ".replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(written, final)
    sync(final.parent)
    if replaced.exists():
        discard(replaced, FILES)
    return final


def make(folder: Path) -> None:
    """Make a folder of checkpoints; the folder of its run must exist, or it was deleted in mid-run."""
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measured(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
