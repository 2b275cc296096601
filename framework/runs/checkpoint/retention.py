"""Remove, link and rename checkpoints."""

import os
from pathlib import Path
from uuid import uuid4

from framework.errors import CheckpointError
from framework.runtime.shapes import first_line
from framework.system.files import TEMPORARY

from .layout import (
    HIDDEN_FOLDER,
    MANIFEST,
    TEMPORARY_LINK,
    TEMPORARY_PARTS,
    discard,
    files_in,
    folder_name,
    listed,
    refuse_links,
    step_of,
)
from .reading import read_manifest, step_in
from .save_errors import save_error


def remove(checkpoint: Path) -> None:
    """Delete the files that a manifest lists, the manifest, and the folder if it is empty then.

    Raises:
        CheckpointError: the manifest cannot be read, or the folder or a file is a symbolic link.
    """
    names = [*read_manifest(checkpoint)["files"], MANIFEST]
    refuse_links(checkpoint)
    refuse_links(*(checkpoint / name for name in names))
    hidden = removed_name(checkpoint)
    try:
        os.rename(checkpoint, hidden)  # so that a kill leaves no partial checkpoint
        if not discard(hidden, names):
            os.rename(hidden, checkpoint)
    except OSError as error:
        raise CheckpointError(f"{checkpoint} cannot be removed: {first_line(error)}") from error


def clean(folder: Path) -> None:
    """Undo or complete the changes that a killed process left unfinished.

    Call it with the lock of the run held, before `newest`.
    """
    if not folder.is_dir():
        return
    refuse_links(folder)
    link = folder / TEMPORARY_LINK
    if link.is_symlink() or link.is_file():
        link.unlink()
    for path in sorted(folder.iterdir()):
        match = HIDDEN_FOLDER.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        checkpoint = folder / match[1]
        if match[2] == ".replaced" and not os.path.lexists(checkpoint):
            os.rename(path, checkpoint)
        else:
            discard(path, [*files_in(path), *temporary_files(path)])


def temporary_files(folder: Path) -> list[str]:
    """Return the names of files that were being written, and of those of `StateSaver`."""
    names = []
    for name in os.listdir(folder):
        of_saver = TEMPORARY_PARTS.fullmatch(name) is not None
        of_writer = TEMPORARY.fullmatch(name) is not None  # `write_file`
        if of_saver or of_writer or name.startswith(".tmp"):  # `save_file`
            names.append(name)
    return names


def removed_name(checkpoint: Path) -> Path:
    """Return a hidden path for a checkpoint that is being removed; `clean` recognizes it."""
    return checkpoint.with_name(f".{checkpoint.name}-{uuid4().hex[:8]}.removed")


def link_to(saved: Path, name: str) -> None:
    """Let the link `name`, in the folder of the checkpoints, lead to a checkpoint.

    A folder of that name, which a copy without links contains instead, is replaced.

    Raises:
        CheckpointError: the link cannot be made.
    """
    temporary = saved.with_name(TEMPORARY_LINK)
    link = saved.with_name(name)
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(saved.name)
        if link.is_dir() and not link.is_symlink():
            copy = removed_name(saved)
            os.rename(link, copy)
            os.replace(temporary, link)
            discard(copy, files_in(copy))
        else:
            os.replace(temporary, link)
    except OSError as error:
        raise save_error(error)(f"the link {link} cannot be created: {error.strerror}") from error


def set_aside(folder: Path, chosen: Path) -> None:
    """Make a checkpoint the newest one: rename those of later steps to step-00000080.aside.

    Call it with the lock of the run held. The latest step is renamed first, so that a kill leaves
    the steps in order. In a copy without links, `best` is a folder: it is set aside too if its step
    is later, and renamed to step-... if it is the chosen checkpoint.

    Raises:
        CheckpointError: a checkpoint cannot be renamed.
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


def free_name(folder: Path, step: int) -> Path:
    """Return an unused name for a checkpoint of a step that is set aside."""
    path = folder / f"{folder_name(step)}.aside"
    number = 1
    while path.exists() or path.is_symlink():
        number += 1
        path = folder / f"{folder_name(step)}.aside-{number}"
    return path
