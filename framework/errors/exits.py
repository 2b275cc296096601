"""Code of a part that ends the program: `sys.exit` in a plugin, a callback or a data set."""

import argparse
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import PartExit
from .user_code import user_place

OWN = (str(Path(__file__).parents[1]), argparse.__file__)


@contextmanager
def no_exit() -> Iterator[None]:
    """Raise PartExit in the place of a SystemExit that neither this package nor argparse raised.

    Such an exit would end the program with its status, often 0, and nothing would tell that the work is not done.
    """
    try:
        yield
    except SystemExit as error:
        if is_own_exit(error):
            raise
        raise PartExit(describe_exit(error)) from error


def is_own_exit(error: SystemExit) -> bool:
    """Whether this package itself ends the program, with the status of a command or after a signal; submitit does so in
    its signal handler, when it has queued a job again."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return True
    file = frames[-1].filename
    return file.startswith(OWN) or "submitit" in Path(file).parts


def describe_exit(error: SystemExit) -> str:
    """Say where the program would have been ended."""
    status = "" if error.code is None else repr(error.code)
    place = user_place(error)
    where = "" if place is None else f" at {place}"
    return f"sys.exit({status}) is called{where}: a part must not end the program"
