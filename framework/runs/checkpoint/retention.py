"""Remove, link and rename checkpoints."""

import os
from pathlib import Path
from uuid import uuid4

from framework.errors import CheckpointError
from framework.runtime.shapes import first_line
from framework.system.files import TEMPORARY

from .layout import (
    ASIDE,
    FILES,
    HIDDEN,
    MANIFEST,
    discard,
    folder_name,
    listed,
    refuse_links,
    step_of,
)
from .reading import read_manifest, step_in
from .save_errors import save_error


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


def free_name(folder: Path, step: int) -> Path:
    """Return a name that no earlier checkpoint of the step has that was set aside."""
    path = folder / f"{folder_name(step)}.aside"
    number = 1
    while path.exists() or path.is_symlink():
        number += 1
        path = folder / f"{folder_name(step)}.aside-{number}"
    return path
