"""Checkpoints: folders that are whole or not there.

    checkpoints/step-00001234/
        model.safetensors    the model's tensors by name; of tied ones one, the other names in the file's metadata
        training.pt          everything else that it takes to go on, in plain types
        MANIFEST.json        written last: step, versions, size and sha256 of each file

It is written in a hidden folder beside, every file is fsynced, and a rename makes it visible: a kill at any moment
leaves the earlier ones as they were. Reading verifies first, and never unpickles anything but tensors and plain types.
Checksums find accidents, not attackers. One process at a time may write to a folder of checkpoints.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .discovery import package_version
from .errors import CheckpointError
from .files import FULL, free_bytes
from .shapes import first_line
from .snapshot import Facts, Snapshot, Weights, snapshot

MODEL, TRAINING, MANIFEST = FILES = ("model.safetensors", "training.pt", "MANIFEST.json")
SCHEMA = 1
LARGE = 8 * 2**20  # bytes from which threads are worth it
LARGEST_MANIFEST = 64 * 2**20  # bytes; the names of a million tensors
VISIBLE = re.compile(r"step-(\d{8,})")
ASIDE = ".best"  # a link that has not got its name yet
HIDDEN = re.compile(r"\.(step-\d{8,})-[0-9a-f]{8}(\.replaced|\.removed)?")
UNWRITABLE = (OSError, RuntimeError, SafetensorError)  # torch wraps the OSError, safetensors names only its number


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
        make(folder)
        if needed > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        beside.mkdir()
        write(beside, taken)
        return publish(beside, folder / folder_name(taken.step))
    except UNWRITABLE as error:
        why = cause(error, folder, needed)
        raise CheckpointError(f"step {taken.step} cannot be saved in {folder}: {why}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # after a success it is no longer there


def load(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Verify a checkpoint and return (model state, training state), on the CPU.

    Raises CheckpointError naming the file that is missing, damaged or not to be trusted.
    """
    model = load_model(checkpoint)
    try:
        return model, dict(torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True))
    except Exception as error:  # the files are what was written, so whatever it is, it is not for this program
        raise CheckpointError(f"{checkpoint} cannot be read: {first_line(error)}") from error


def load_model(checkpoint: Path) -> dict[str, Tensor]:
    """Verify all of a checkpoint and return the model state alone. Raises CheckpointError as `load` does."""
    verify(checkpoint)
    try:
        with safe_open(checkpoint / MODEL, "pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            tied = json.loads((file.metadata() or {}).get("tied", "{}"))
        return tensors | {name: tensors[first] for name, first in tied.items()}
    except Exception as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {first_line(error)}") from error


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies and holds no NaN, and for each newer one why it was skipped."""
    skipped: list[str] = []
    for checkpoint in reversed(listed(folder)):
        try:
            if not (spoiled := verify(checkpoint)["nan"]):
                return checkpoint, skipped
            skipped.append(f"{checkpoint}: {spoiled[0]} holds NaN")
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


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


def verify(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest when every file is as it was written. Raises CheckpointError naming the first that is not."""
    manifest = read_manifest(checkpoint)
    for name, wanted in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes instead of {wanted['bytes']}")
        if sha256(path) != wanted["sha256"]:
            raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}")
    return manifest


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest, checked against its own sha256. Raises CheckpointError."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} is no complete checkpoint: it has no {MANIFEST}")
    try:
        if path.stat().st_size > LARGEST_MANIFEST:
            raise CheckpointError(f"{path} is damaged: it has {path.stat().st_size:,} bytes")
        manifest = json.loads(path.read_bytes())
        if manifest["schema"] > SCHEMA:
            raise CheckpointError(
                f"{checkpoint} was written by framework {manifest['framework']} (format {manifest['schema']}); "
                f"this version reads formats up to {SCHEMA}"
            )
        files = {name: (wanted["bytes"], wanted["sha256"]) for name, wanted in manifest["files"].items()}
        whole = {MODEL, TRAINING} <= set(files) and isinstance(manifest["nan"], list)
        if manifest.pop("sha256") != own_sha256(manifest) or not whole:
            raise CheckpointError(f"{path} is damaged: it does not match its own sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error
    for name in files.keys() - {MODEL, TRAINING}:
        raise CheckpointError(f"{path} lists {name!r}, which is no file of a checkpoint")
    return manifest


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint: the files that its manifest lists, the manifest, and the folder if nothing else is in it.

    Raises CheckpointError when the folder or one of the files is a symbolic link, or a name leads elsewhere.
    """
    names = [*read_manifest(checkpoint)["files"], MANIFEST]
    refuse_links(checkpoint, *(checkpoint / name for name in names))
    try:
        aside = checkpoint.with_name(f".{checkpoint.name}-{uuid4().hex[:8]}.removed")
        os.rename(checkpoint, aside)  # so that a kill in the middle leaves no half checkpoint
        if not discard(aside, names):
            os.rename(aside, checkpoint)
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be removed: {first_line(error)}") from error


def clean(folder: Path) -> None:
    """Undo what a killed process left half done. Call it with the run's lock held, before `newest`."""
    if not folder.is_dir():
        return
    (folder / ASIDE).unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        match = HIDDEN.fullmatch(path.name)
        if match is None or path.is_symlink():
            continue
        if match[2] == ".replaced" and not (folder / match[1]).exists():
            os.rename(path, folder / match[1])
        else:
            discard(path, [*FILES, *(half.name for half in path.glob(".tmp*"))])  # save_file writes one and renames it


def discard(folder: Path, names: Iterable[str]) -> bool:
    """Delete those files and then the folder; return False when something else is in it, which stays."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    if any(folder.iterdir()):
        return False
    folder.rmdir()
    return True


def link_to(saved: Path, name: str) -> None:
    """Make a link beside a checkpoint lead to it. Raises CheckpointError."""
    aside, link = saved.with_name(ASIDE), saved.with_name(name)
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(saved.name)
        os.replace(aside, link)
    except OSError as error:
        raise CheckpointError(f"the link {link} cannot be made: {error.strerror}") from error


def refuse_links(*paths: Path) -> None:
    for path in paths:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link; a checkpoint is only removed where it really is")


# writing


def write(folder: Path, taken: Snapshot) -> None:
    """Fill a folder: the model, the training state, then the manifest; each is on the disk when this returns."""
    if taken.nbytes > LARGE:
        files = write_at_once(folder, taken)
    else:
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
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def write_model(path: Path, taken: Snapshot) -> None:
    try:
        save_file(taken.tensors, path, metadata={"tied": json.dumps(taken.tied)})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"step {taken.step} cannot be saved: the model's state: {first_line(error)}") from error


def write_training(path: Path, training: Any) -> None:
    with path.open("xb") as file:
        torch.save(training, file)


def write_at_once(folder: Path, taken: Snapshot) -> dict[str, Any]:
    """Write both files at the same time, with the sha256 of each following what is written; return what is `measured`.

    Hashing 100 MB takes half as long as writing them.
    """
    paths = [folder / MODEL, folder / TRAINING]
    writers = [partial(write_model, paths[0], taken), partial(write_training, paths[1], taken.training)]
    with ThreadPoolExecutor(4) as beside:
        done = [threading.Event() for _ in paths]
        digests = [beside.submit(follow, path, event) for path, event in zip(paths, done, strict=True)]
        both = [beside.submit(written, *each) for each in zip(writers, paths, done, strict=True)]
        sizes = [each.result() for each in both]
        found = zip(paths, sizes, digests, strict=True)
        return {path.name: {"bytes": size, "sha256": digest.result()} for path, size, digest in found}


def written(write: Callable[[], None], path: Path, done: threading.Event) -> int:
    """Write a file, say that it is done, and wait for the disk; returns its bytes."""
    try:
        write()
    finally:
        done.set()
    sync(path)
    return path.stat().st_size


def follow(path: Path, done: threading.Event) -> str:
    """Return the sha256 of a file that somebody writes from its beginning to its end, and is done with in a while."""
    digest = hashlib.sha256()
    while not path.exists():
        if done.wait(0.001) and not path.exists():
            return ""  # it could not be written
    with path.open("rb") as file:
        while True:
            over = done.is_set()  # before reading, as what comes later is read the next time
            while chunk := file.read(2**20):
                digest.update(chunk)
            if over:
                return digest.hexdigest()
            done.wait(0.001)


def holds_nan(tensor: Tensor) -> bool:
    """Whether a tensor has a NaN; infinity is no fault, a mask has it."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return False
    values = tensor if tensor.element_size() > 1 else tensor.float()  # there is no arithmetic on float8
    return bool(values.sum().isnan()) and bool(values.isnan().any())  # the sum is quick, but ∞ - ∞ is NaN too


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


def own_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# errors in words


def cause(error: BaseException, folder: Path, needed: int) -> str:
    """Say why writing failed, with the bytes needed and free when there was no room."""
    numbers = [e.errno for e in chain(error) if isinstance(e, OSError) and e.errno]
    numbers += [int(found) for found in re.findall(r"\(os error (\d+)\)", str(error))]
    if not folder.parent.exists():
        return f"the folder {folder.parent} does not exist any more"
    if not numbers:
        return first_line(error)
    full = numbers[0] in FULL
    room = f" (needs {needed:,} bytes, free are {free_bytes(folder):,})" if full else ""
    return os.strerror(numbers[0]) + room


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
