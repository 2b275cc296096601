"""Locks on the files of runs and sweeps.

FRAMEWORK_LOCKS=off is for file systems without locks: nothing is locked then, and the name of the
process in the file of a `WriterLock` is the only lock.
"""

import errno
import fcntl
import os
import platform
import re
import time
from pathlib import Path
from typing import IO, Any, BinaryIO
from weakref import ref

from framework.errors import RunError, SettingError

from .files import open_file

LOCKS_VARIABLE = "FRAMEWORK_LOCKS"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
PATIENCE = 2.0  # seconds that the workers of a killed run have to end
MOST_HOLDER_BYTES = 300  # "process 4194304 on HOST"; a host name has at most 255 bytes


class WriterLock:
    """The lock of a folder to which only this process may write; a kill releases it.

    The locked file contains the name of the process.
    """

    def __init__(self, folder: Path, name: str = ".lock"):
        """Lock a folder until `close`.

        Args:
            folder: an existing folder of a run or a sweep.
            name: the name of the locked file in it.

        Raises:
            RunError: another process holds the lock, or the file system does not support locks.
            OSError: the file cannot be opened or written.
        """
        self.path = folder / name
        self.process = os.getpid()
        self.file = open_file(folder, name, "a")
        try:
            self._acquire()
            self.file.truncate(0)
            self.file.write(this_process().encode())
            self.file.flush()
        except BaseException:
            self.file.close()
            raise
        close_in_forked_processes(self.file)

    def _acquire(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not lock(self.file, self.path, wait=False):
            holder = self._holder()
            if not has_ended(holder) or time.monotonic() > deadline:
                raise RunError(
                    f"{self.path.parent} is being written by {holder or 'another process'}: "
                    "wait for it, or choose another run.name"
                )
            time.sleep(0.01)
        holder = self._holder()
        if locks_disabled() and holder and not has_ended(holder):
            raise RunError(
                f"{self.path.parent} is being written by {holder}: "
                f"wait for it; if it has ended, delete {self.path}"
            )

    def _holder(self) -> str:
        """Return the name of the process in the file; "" for none."""
        self.file.seek(0)
        return self.file.read(MOST_HOLDER_BYTES).decode("utf-8", errors="replace").strip()

    def close(self) -> None:
        """Release the lock. A forked process only closes its copy of the file."""
        if not self.file.closed and locks_disabled() and os.getpid() == self.process:
            self.file.truncate(0)
        self.file.close()


def lock(file: IO[Any], path: Path, *, wait: bool) -> bool:
    """Lock an open file until it is closed, at the latest when the process ends.

    With FRAMEWORK_LOCKS=off nothing is locked.

    Args:
        path: its path, for the message.
        wait: wait for the lock instead of returning False.

    Returns:
        True if this process has the lock, False if another process holds it.

    Raises:
        RunError: the file system does not support locks.
    """
    if locks_disabled():
        return True
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        raise RunError(
            f"{path} cannot be locked: its file system does not support locks ({error.strerror}); "
            f"use another run.root, or set the environment variable {LOCKS_VARIABLE}=off"
        ) from error
    return True


def lock_holder(folder: Path, name: str = ".lock") -> str | None:
    """Return the process that has the lock of a folder, or None.

    It is None also if FRAMEWORK_LOCKS=off, because then a killed process of another machine cannot
    be told from a running one.
    """
    if locks_disabled():
        return None
    try:
        file = open_file(folder, name, "r+")  # NFS locks only files that are open for writing
    except (OSError, RunError):  # missing, because no process has written in the folder; or a link
        return None
    with file:
        if lock(file, folder / name, wait=False):
            return None
        holder = file.read(MOST_HOLDER_BYTES).decode("utf-8", errors="replace").strip()
    return holder or "another process"


def locks_disabled() -> bool:
    """Return whether FRAMEWORK_LOCKS=off disables locks.

    Raises:
        SettingError: the variable is neither on nor off.
    """
    value = os.environ.get(LOCKS_VARIABLE, "on")
    if value not in ("on", "off"):
        raise SettingError(f"environment variable {LOCKS_VARIABLE}={value}: expected on or off")
    return value == "off"


def this_process() -> str:
    """Return the name of this process, as a lock file contains it."""
    return f"process {os.getpid()} on {platform.node()}"


def has_ended(holder: str) -> bool:
    """Return whether a process, as `this_process` names it, has ended on this machine."""
    match = re.fullmatch(rf"process (\d+) on {re.escape(platform.node())}", holder)
    if match is None:
        return False
    try:
        os.kill(int(match[1]), 0)  # only checks that the process exists
    except PermissionError:  # it exists, and belongs to another user
        return False
    except (ProcessLookupError, OverflowError):
        return True
    return False


def close_in_forked_processes(file: BinaryIO) -> None:
    """Close a file in processes forked from now on: a data worker would keep its lock."""
    reference = ref(file)

    def close() -> None:
        opened = reference()
        if opened is not None:
            opened.close()

    os.register_at_fork(after_in_child=close)
