"""Locks on the files of runs and sweeps, and file systems that have none."""

import errno
import fcntl
import os
import platform
import re
from pathlib import Path
from typing import IO, Any

from framework.errors import RunError, SettingError

SWITCH = "FRAMEWORK_LOCKS"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def are_off() -> bool:
    """Whether the environment says FRAMEWORK_LOCKS=off. Raises SettingError for any value but on and off."""
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise SettingError(f"the environment variable {SWITCH}={value}: expected on or off")
    return value == "off"


def lock(file: IO[Any], path: Path, *, wait: bool) -> bool:
    """Lock an open file until it is closed (a kill closes it); return False if another process holds the lock.

    With FRAMEWORK_LOCKS=off nothing is locked.

    Args:
        file: the open file.
        path: its path, for the message.
        wait: wait for the lock instead of returning False.

    Raises RunError if the file system does not support locks.
    """
    if are_off():
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        reason = f"its file system does not support locks ({error.strerror})"
        advice = f"use another run.root, or set the environment variable {SWITCH}=off"
        raise RunError(f"{path} cannot be locked: {reason}; {advice}") from error
    return True


class HeldLock:
    """The lock file of a folder whose only writer this process is, until it is closed.

    It names the process. Without locks that is all there is: it is emptied when it is closed.
    """

    def __init__(self, file: IO[Any]):
        self.file, self.process = file, os.getpid()

    def close(self) -> None:
        """Let others write. In a forked process, only close the file."""
        if not self.file.closed and are_off() and os.getpid() == self.process:
            self.file.truncate(0)
        self.file.close()


def this_process() -> str:
    """Return what a lock file says of its holder."""
    return f"process {os.getpid()} on {platform.node()}"


def is_gone(holder: str) -> bool:
    """Whether the holder that a lock file names was a process of this machine that has ended."""
    match = re.fullmatch(rf"process (\d+) on {re.escape(platform.node())}", holder)
    if match is None:
        return False
    try:
        os.kill(int(match[1]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False
