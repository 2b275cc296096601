"""The errors of saving a checkpoint."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from framework.errors import CheckpointDiskFull, CheckpointError
from framework.runtime.shapes import first_line
from framework.system.files import FULL, free_disk_bytes


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
