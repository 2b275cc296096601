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
import io
import json
import os
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from framework.errors import CheckpointDiskFull, CheckpointError, RunError, short
from framework.registry.discovery import package_version
from framework.runtime.memory import available_bytes
from framework.runtime.shapes import first_line
from framework.system.files import (
    FULL,
    MOST_BYTES,
    MOST_DEPTH,
    TEMPORARY,
    free_disk_bytes,
    levels,
    open_file,
    parse_json,
    read_bytes,
    write_file,
)

from .snapshot import Facts, Snapshot, Weights, snapshot

MODEL, TRAINING, MANIFEST = FILES = ("model.safetensors", "training.pt", "MANIFEST.json")
SCHEMA = 1
VISIBLE = re.compile(r"step-(\d{8,})")
ASIDE = ".best"  # a link that has not got its name yet
HIDDEN = re.compile(r"\.(step-\d{8,})-[0-9a-f]{8}(\.replaced|\.removed)?")
MOST_PICKLE = (
    64 * 2**20
)  # bytes of the record of a torch file that says how its tensors lie in plain types
MOST_VALUES = 10_000_000  # of a training state, what is shared counted as often as it is used
GLOBALS = re.compile(
    r"torch\._utils _rebuild_(tensor_v2|tensor_v3|sparse_tensor)|torch \w+Storage|torch\.storage UntypedStorage"
    r"|torch\.serialization _get_layout|torch Size|torch [a-z]\w*|collections OrderedDict|_codecs encode"
)
"""What the pickle of a training state may name. Torch allows more, such as bytearray, which takes any memory."""
OTHER_GLOBALS = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")
SPARSE_FROM = 2**30  # bytes; smaller files are read whatever holes they have
MOST_HOLES = 16  # times as many bytes as there is data
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
    refuse_links(folder)
    if (folder / ASIDE).is_symlink() or (folder / ASIDE).is_file():
        (folder / ASIDE).unlink()
    for path in sorted(folder.iterdir()):
        match = HIDDEN.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if match[2] == ".replaced" and not os.path.lexists(folder / match[1]):
            os.rename(path, folder / match[1])
        else:
            half_written = [each.name for each in path.iterdir() if TEMPORARY.fullmatch(each.name)]
            half_written += [each.name for each in path.glob(".tmp*")]  # of save_file
            discard(path, [*FILES, *half_written])


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


def link_to(saved: Path, name: str) -> None:
    """Make a link beside a checkpoint lead to it. Raises CheckpointError.

    A folder of that name, which a copy without links has in place of one, is replaced.
    """
    aside, link = saved.with_name(ASIDE), saved.with_name(name)
    try:
        aside.unlink(missing_ok=True)
        aside.symlink_to(saved.name)
        if link.is_dir() and not link.is_symlink():
            copy = saved.with_name(
                f".{saved.name}-{uuid4().hex[:8]}.removed"
            )  # `clean` knows this name
            os.rename(link, copy)
            os.replace(aside, link)
            discard(copy, FILES)
        else:
            os.replace(aside, link)
    except OSError as error:
        raise save_error(error)(f"the link {link} cannot be made: {error.strerror}") from error


def set_aside(folder: Path, chosen: Path) -> None:
    """Make a checkpoint the newest one of its folder: rename those of later steps to step-00000080.aside.

    Call it with the run's lock held. A kill in the middle leaves the earliest of them in place. If `chosen` or `best`
    is a folder of that name, as in a copy without links, it becomes step-... or is set aside too.
    """
    step = step_in(chosen)
    best = folder / "best"
    try:
        for checkpoint in reversed(listed(folder)):
            if step_of(checkpoint) > step:
                os.rename(checkpoint, free_name(folder, step_of(checkpoint)))
        if best.is_symlink():
            if not best.exists():
                best.unlink()
        elif best.is_dir() and step_in(best) > step:
            os.rename(best, free_name(folder, step_in(best)))
        elif best == chosen and not (folder / folder_name(step)).exists():
            os.rename(best, folder / folder_name(step))
    except OSError as error:
        raise CheckpointError(
            f"the later checkpoints of {folder} cannot be renamed: {error.strerror}"
        ) from error


def step_in(checkpoint: Path) -> int:
    """Return the step of a checkpoint by its manifest. Raises CheckpointError."""
    step = read_manifest(checkpoint)["step"]
    if not isinstance(step, int) or step < 0:
        raise CheckpointError(f"{checkpoint / MANIFEST} is damaged: step is {step!r}")
    return step


def free_name(folder: Path, step: int) -> Path:
    """Return a name that no earlier checkpoint of the step has that was set aside."""
    path = folder / f"{folder_name(step)}.aside"
    number = 1
    while path.exists() or path.is_symlink():
        number += 1
        path = folder / f"{folder_name(step)}.aside-{number}"
    return path


def refuse_links(*paths: Path) -> None:
    for path in paths:
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a symbolic link; checkpoints are not read or written through links"
            )


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


# reading


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


def check_size(file: BinaryIO, expected: int, path: Path) -> None:
    """Raise CheckpointError for a file of another size, and for a large one of which nearly all is holes, which could
    take hours to read.
    """
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        raise CheckpointError(f"{path} has {size} bytes instead of {expected}")
    if size < SPARSE_FROM:
        return
    data = end = 0
    while data * MOST_HOLES < size:
        try:
            start = os.lseek(file.fileno(), end, os.SEEK_DATA)
        except OSError:  # there is no more data
            raise CheckpointError(
                f"{path} has {size:,} bytes, but data for {data:,} bytes only"
            ) from None
        end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
        data += end - start


def check_memory(checkpoint: Path, needed: int) -> None:
    """Raise CheckpointError when the files of a checkpoint do not fit into the free memory."""
    free = available_bytes()
    if free is not None and needed > free:
        raise CheckpointError(
            f"{checkpoint} has {needed:,} bytes; {free:,} bytes of memory are free"
        )


def check_torch_file(file: BinaryIO) -> None:
    """Raise CheckpointError for a torch file that would take more memory than it has bytes, or that names more than
    tensors and plain types.
    """
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        compressed = [
            record.filename for record in records if record.compress_type != zipfile.ZIP_STORED
        ]
        if compressed:
            raise CheckpointError(f"its record {compressed[0]} is compressed")
        if sum(record.file_size for record in records) > size:
            raise CheckpointError(f"its records have more than its {size:,} bytes")
        for record in records:
            if not record.filename.endswith("/data.pkl"):
                continue
            if record.file_size > MOST_PICKLE:
                raise CheckpointError(
                    f"its record {record.filename} has {record.file_size:,} bytes"
                )
            check_pickle(archive.read(record))


def check_pickle(content: bytes) -> None:
    for code, argument, _ in pickletools.genops(content):
        if code.name in OTHER_GLOBALS:
            raise CheckpointError(f"it has the instruction {code.name}, which no checkpoint has")
        if code.name == "GLOBAL" and GLOBALS.fullmatch(str(argument)) is None:
            raise CheckpointError(
                f"it names {str(argument)[:100]}, which is neither a tensor nor a plain type"
            )


def check_training_size(training: dict[str, Any]) -> None:
    """Raise CheckpointError for a state that would take much more memory, or time, than its file has bytes."""
    count = 0
    for depth, level in enumerate(levels(training), 1):
        count += len(level)
        if count > MOST_VALUES or depth > MOST_DEPTH:
            raise CheckpointError(
                f"its state has more than {MOST_VALUES:,} values, or is more than {MOST_DEPTH} deep"
            )
        for value in level:
            if isinstance(value, Tensor):
                check_strides(value)


def check_strides(tensor: Tensor) -> None:
    """Raise CheckpointError for a tensor with more numbers than are stored."""
    if tensor.layout is torch.strided and tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"a tensor of shape {short(list(tensor.shape))} is stored with fewer numbers"
        )


# writing


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


def own_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# errors in words


def cause(error: BaseException, folder: Path, needed: int) -> str:
    """Say why writing failed, with the bytes needed and free when there was no room."""
    number = number_of(error)
    if not folder.parent.exists():
        return f"the folder {folder.parent} does not exist any more"
    if number is None:
        return first_line(error)
    full = number in FULL
    room = (
        f" ({needed:,} bytes are needed, {free_disk_bytes(folder):,} bytes are free)"
        if full
        else ""
    )
    return os.strerror(number) + room


def save_error(error: BaseException) -> type[CheckpointError]:
    """Return the class in which an error of saving is raised."""
    return CheckpointDiskFull if number_of(error) in FULL else CheckpointError


def number_of(error: BaseException) -> int | None:
    """Return the system's number of an error, or of that which caused it; None when there is none."""
    numbers = [e.errno for e in error_chain(error) if isinstance(e, OSError) and e.errno]
    # A SafetensorError has the number in its text only.
    numbers += [int(found) for found in re.findall(r"\(os error (\d+)\)", str(error))]
    return numbers[0] if numbers else None


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
