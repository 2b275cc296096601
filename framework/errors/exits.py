"""Parts that end the program: `sys.exit` in a plugin, a callback or a data set."""

import argparse
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import PartExit
from .user_code import user_place

MAY_EXIT = (str(Path(__file__).parents[1]), argparse.__file__)


@contextmanager
def no_exit() -> Iterator[None]:
    """Raise PartExit instead of a SystemExit of a part.

    Such an exit would end the program, often with status 0, although the work is not done.
    """
    try:
        yield
    except SystemExit as error:
        if is_own_exit(error):
            raise
        raise PartExit(describe_exit(error)) from error


def is_own_exit(error: SystemExit) -> bool:
    """Return whether the framework or argparse ends the program.

    Submitit also may: its signal handler exits after it has requeued a job.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return True
    file = frames[-1].filename
    return file.startswith(MAY_EXIT) or "submitit" in Path(file).parts


def describe_exit(error: SystemExit) -> str:
    """Return a message with the place of the `sys.exit`."""
    status = "" if error.code is None else repr(error.code)
    place = user_place(error)
    where = "" if place is None else f" at {place}"
    return f"sys.exit({status}) is called{where}: a part must not end the program"
