"""The errors of saving a checkpoint."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from framework.errors import CheckpointDiskFull, CheckpointError
from framework.runtime.shapes import first_line
from framework.system.files import FULL, free_disk_bytes


def save_error(error: BaseException) -> type[CheckpointError]:
    """Return the class in which an error of saving is raised."""
    return CheckpointDiskFull if error_number(error) in FULL else CheckpointError


def failure_cause(error: BaseException, folder: Path, needed: int) -> str:
    """Return why a checkpoint cannot be written, as text for a message.

    Args:
        folder: of the checkpoints.
        needed: the bytes of the checkpoint, which are named if the disk is full.
    """
    if not folder.parent.exists():
        return f"the folder {folder.parent} no longer exists"
    number = error_number(error)
    if number is None:
        return first_line(error)
    cause = os.strerror(number)
    if number in FULL:
        free = free_disk_bytes(folder)
        cause += f" ({needed:,} bytes are needed, {free:,} bytes are free)"
    return cause


def error_number(error: BaseException) -> int | None:
    """Return the errno of an error or of one of its causes; None without one."""
    for cause in error_chain(error):
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno
    # A SafetensorError has the number in its text only.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return None if found is None else int(found[1])


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
