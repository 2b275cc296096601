"""Verify and load checkpoints."""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from framework.errors import CheckpointError, RunError, short
from framework.runtime.shapes import first_line
from framework.system.files import MOST_BYTES, open_file, parse_json, read_bytes

from .checks import check_memory, check_size, check_torch_file, check_training_size
from .layout import MANIFEST, MODEL, SCHEMA, TRAINING, listed, own_sha256, target_of


def load(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Verify a checkpoint and return (model state, training state), on the CPU.

    Raises CheckpointError naming the file that is missing, damaged or not to be trusted.
    """
    model = load_model(checkpoint)
    checkpoint = target_of(checkpoint)
    try:
        with opened(checkpoint, TRAINING) as file:
            check_torch_file(file)
            file.seek(0)
            training = dict(torch.load(path_of(file), map_location="cpu", weights_only=True))
        check_training_size(training)
        return model, training
    except (
        Exception
    ) as error:  # the files are what was written, so whatever it is, it is not for this program
        raise CheckpointError(f"{checkpoint} cannot be read: {first_line(error)}") from error


def load_model(checkpoint: Path) -> dict[str, Tensor]:
    """Verify all of a checkpoint and return the model state alone. Raises CheckpointError as `load` does."""
    checkpoint = target_of(checkpoint)
    verify(checkpoint, to_load=True)
    try:
        with (
            opened(checkpoint, MODEL) as model,
            safe_open(path_of(model), "pt", device="cpu") as file,
        ):
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
            skipped.append(f"{checkpoint}: {str(spoiled[0])[:200]} holds NaN")
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def verify(checkpoint: Path, to_load: bool = False) -> dict[str, Any]:
    """Return the manifest when every file is as it was written.

    Args:
        to_load: whether the files have to fit into the free memory.

    Raises CheckpointError naming the first file that is not as it was written.
    """
    manifest = read_manifest(checkpoint)
    checkpoint = target_of(checkpoint)
    files = manifest["files"]
    for name, wanted in files.items():
        with opened(checkpoint, name) as file:
            check_size(file, wanted["bytes"], checkpoint / name)
    if to_load:
        check_memory(checkpoint, sum(wanted["bytes"] for wanted in files.values()))
    for name, wanted in files.items():
        path = checkpoint / name
        with opened(checkpoint, name) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            if digest != wanted["sha256"]:
                raise CheckpointError(f"{path} is damaged: its sha256 is not the one in {MANIFEST}")
    return manifest


def read_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors by name, which its header holds; no tensor is read.

    Raises CheckpointError.
    """
    checkpoint = target_of(checkpoint)
    path = checkpoint / MODEL
    try:
        with opened(checkpoint, MODEL) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_BYTES:
                raise CheckpointError(f"{path} cannot be read: its header has {length:,} bytes")
            header = parse_json(file.read(length), path)
        header.pop("__metadata__", None)
        return {name: tuple(map(int, tensor["shape"])) for name, tensor in header.items()}
    except (
        OSError,
        RunError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest, checked against its own sha256. Raises CheckpointError."""
    checkpoint = target_of(checkpoint)
    path = checkpoint / MANIFEST
    try:
        manifest = parse_json(read_bytes(checkpoint, MANIFEST), path)
        if manifest["schema"] > SCHEMA:
            raise CheckpointError(
                f"{checkpoint} was written by framework {str(manifest['framework'])[:100]} "
                f"(format {short(manifest['schema'])}); "
                f"this version reads formats up to {SCHEMA}"
            )
        files = {
            name: (wanted["bytes"], wanted["sha256"]) for name, wanted in manifest["files"].items()
        }
        whole = {MODEL, TRAINING} <= set(files) and isinstance(manifest["nan"], list)
        if manifest.pop("sha256") != own_sha256(manifest) or not whole:
            raise CheckpointError(f"{path} is damaged: it does not match its own sha256")
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{checkpoint} is no complete checkpoint: it has no {MANIFEST}"
        ) from None
    except RunError as error:
        raise CheckpointError(str(error)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from error
    for name in files.keys() - {MODEL, TRAINING}:
        raise CheckpointError(f"{path} lists {short(name)}, which is no file of a checkpoint")
    return manifest


def step_in(checkpoint: Path) -> int:
    """Return the step of a checkpoint by its manifest. Raises CheckpointError."""
    step = read_manifest(checkpoint)["step"]
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged: step is {step!r}")
    return step


def opened(checkpoint: Path, name: str) -> BinaryIO:
    """Open a file of a checkpoint to read. Raises CheckpointError."""
    try:
        return open_file(checkpoint, name)
    except FileNotFoundError:
        missing = checkpoint / name if checkpoint.is_dir() else checkpoint
        raise CheckpointError(f"{missing} is missing") from None
    except (OSError, RunError) as error:
        raise CheckpointError(first_line(error)) from error


def path_of(file: BinaryIO) -> str:
    """Return a path that leads to an open file, for libraries that open files themselves."""
    return f"/dev/fd/{file.fileno()}"
