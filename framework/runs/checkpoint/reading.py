"""Verify and load checkpoints."""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from framework.errors import CheckpointError, RunError, short
from framework.runtime.shapes import first_line
from framework.system.files import MOST_BYTES, open_file, parse_json, read_bytes

from .checks import check_memory, check_size, check_torch_file, check_training_size
from .layout import (
    MANIFEST,
    MODEL,
    PARTS,
    SCHEMA_WITH_PARTS,
    TRAINING,
    listed,
    own_sha256,
    target_of,
)
from .parts import PartFiles, joined

# Errors of a JSON document that has another form than the written one.
JSON_FORM_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)


def load(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Verify a checkpoint and return its (model state, training state) on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged or not trusted; the message names it.
    """
    model = load_model(checkpoint)
    checkpoint = target_of(checkpoint)
    try:
        with open_checkpoint_file(checkpoint, TRAINING) as file:
            check_torch_file(file)
            file.seek(0)
            training = dict(torch.load(path_of(file), map_location="cpu", weights_only=True))
        check_training_size(training)
        names = filter(PARTS.fullmatch, read_manifest(checkpoint)["files"])
        with ExitStack() as stack:
            files = [stack.enter_context(open_checkpoint_file(checkpoint, name)) for name in names]
            training = joined(training, stack.enter_context(PartFiles(map(path_of, files))))
    except Exception as error:  # torch.load raises errors of many classes for an untrusted file
        raise CheckpointError(f"{checkpoint} cannot be read: {first_line(error)}") from error
    return model, training


def load_model(checkpoint: Path) -> dict[str, Tensor]:
    """Verify all files of a checkpoint and return its model state on the CPU.

    Raises:
        CheckpointError: as `load` does.
    """
    checkpoint = target_of(checkpoint)
    verify(checkpoint, to_load=True)
    try:
        with (
            open_checkpoint_file(checkpoint, MODEL) as opened_file,
            safe_open(path_of(opened_file), "pt", device="cpu") as file,
        ):
            names = file.keys()  # `file` itself cannot be iterated
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
        tied = json.loads(metadata.get("tied", "{}"))
        for name, first in tied.items():
            tensors[name] = tensors[first]
    except Exception as error:
        raise CheckpointError(f"{checkpoint} cannot be read: {first_line(error)}") from error
    return tensors


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is undamaged and without NaN.

    Returns:
        The checkpoint, None if there is none, and the reason why each newer one is skipped.
    """
    skipped: list[str] = []
    for checkpoint in reversed(listed(folder)):
        try:
            nan = verify(checkpoint)["nan"]
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        if not nan:
            return checkpoint, skipped
        skipped.append(f"{checkpoint}: {short(nan[0], most=200, quote=False)} holds NaN")
    return None, skipped


def verify(checkpoint: Path, to_load: bool = False) -> dict[str, Any]:
    """Check all files of a checkpoint against its manifest, and return the manifest.

    Args:
        to_load: also check that the files fit into the free memory.

    Raises:
        CheckpointError: a file is missing or differs; the message names the first such file.
    """
    manifest = read_manifest(checkpoint)
    checkpoint = target_of(checkpoint)
    files = manifest["files"]
    for name, expected in files.items():
        with open_checkpoint_file(checkpoint, name) as file:
            check_size(file, expected["bytes"], checkpoint / name)
    if to_load:
        check_memory(checkpoint, sum(expected["bytes"] for expected in files.values()))
    for name, expected in files.items():
        with open_checkpoint_file(checkpoint, name) as file:
            digest = sha256_of(file)
        if digest != expected["sha256"]:
            raise CheckpointError(
                f"{checkpoint / name} is damaged: its sha256 is not the one in {MANIFEST}"
            )
    return manifest


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint, checked against its own sha256.

    Raises:
        CheckpointError: the manifest is missing, damaged or of a later format.
    """
    checkpoint = target_of(checkpoint)
    path = checkpoint / MANIFEST
    try:
        manifest: dict[str, Any] = parse_json(read_bytes(checkpoint, MANIFEST), path)
        check_schema(manifest, checkpoint)
        files = manifest["files"]
        has_files = {MODEL, TRAINING} <= set(files)
        has_digests = all({"bytes", "sha256"} <= set(file) for file in files.values())
        is_complete = has_files and has_digests and isinstance(manifest["nan"], list)
        if manifest.pop("sha256") != own_sha256(manifest) or not is_complete:
            raise CheckpointError(f"{path} is damaged: it does not match its own sha256")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{checkpoint} is not a complete checkpoint: it has no {MANIFEST}"
        ) from None
    except RunError as error:
        raise CheckpointError(str(error)) from error
    except (*JSON_FORM_ERRORS, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error
    for name in files.keys() - {MODEL, TRAINING}:
        if PARTS.fullmatch(name):
            continue
        raise CheckpointError(f"{path} lists {short(name)}, which is not a file of a checkpoint")
    return manifest


def check_schema(manifest: dict[str, Any], checkpoint: Path) -> None:
    """Raise CheckpointError if a checkpoint has a later format than this version can read."""
    schema = manifest["schema"]
    if schema > SCHEMA_WITH_PARTS:
        raise CheckpointError(
            f"{checkpoint} was written by framework {short(manifest['framework'], quote=False)} "
            f"(format {short(schema)}); this version reads formats up to {SCHEMA_WITH_PARTS}"
        )


def step_in(checkpoint: Path) -> int:
    """Return the step in the manifest of a checkpoint.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    step = read_manifest(checkpoint)["step"]
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged: step is {step!r}")
    return step


def read_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's tensors by name, from the header of the file.

    Raises:
        CheckpointError: the file has another size than in the manifest, or its header cannot be
            read.
    """
    expected = read_manifest(checkpoint)["files"][MODEL]["bytes"]
    checkpoint = target_of(checkpoint)
    path = checkpoint / MODEL
    try:
        with open_checkpoint_file(checkpoint, MODEL) as file:
            check_size(file, expected, path)
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_BYTES:
                raise CheckpointError(f"{path} cannot be read: its header has {length:,} bytes")
            header = parse_json(file.read(length), path)
        header.pop("__metadata__", None)
        return {name: tuple(map(int, tensor["shape"])) for name, tensor in header.items()}
    except RunError as error:
        raise CheckpointError(str(error)) from error
    except (*JSON_FORM_ERRORS, OverflowError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error


def open_checkpoint_file(checkpoint: Path, name: str) -> BinaryIO:
    """Open a file of a checkpoint for reading.

    Raises:
        CheckpointError: the file is missing or cannot be opened.
    """
    try:
        return open_file(checkpoint, name)
    except FileNotFoundError:
        missing = checkpoint / name if checkpoint.is_dir() else checkpoint
        raise CheckpointError(f"{missing} is missing") from None
    except (OSError, RunError) as error:
        raise CheckpointError(first_line(error)) from error


def sha256_of(file: BinaryIO) -> str:
    """Return the sha256 of the rest of a file."""
    reader: Any = file  # typeshed wants a raw or buffered file, which a BinaryIO need not be
    return hashlib.file_digest(reader, "sha256").hexdigest()


def path_of(file: BinaryIO) -> str:
    """Return a path to an open file, for libraries that open files themselves."""
    return f"/dev/fd/{file.fileno()}"
