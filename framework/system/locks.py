"""Locks on the files of runs and sweeps, also on file systems without locks."""

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
    """Return whether locks are disabled by the environment variable FRAMEWORK_LOCKS=off.

    Raises:
        SettingError: the variable is neither on nor off.
    """
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise SettingError(f"environment variable {SWITCH}={value}: expected on or off")
    return value == "off"


def lock(file: IO[Any], path: Path, *, wait: bool) -> bool:
    """Lock an open file until it is closed, at the latest when the process ends.

    With FRAMEWORK_LOCKS=off nothing is locked.

    Args:
        file: the open file.
        path: its path, for the message.
        wait: wait for the lock instead of returning False.

    Returns:
        Whether this process has the lock; False if another process holds it.

    Raises:
        RunError: the file system does not support locks.
    """
    if are_off():
        return True
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.flock(file, operation)
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
    """The locked file of a folder to which only this process may write.

    The file contains the name of the process. With FRAMEWORK_LOCKS=off this name is the only lock,
    so that `close` removes it.
    """

    def __init__(self, file: IO[Any]):
        self.file = file
        self.process = os.getpid()

    def close(self) -> None:
        """Release the lock. A forked process only closes its copy of the file."""
        if not self.file.closed and are_off() and os.getpid() == self.process:
            self.file.truncate(0)
        self.file.close()


def this_process() -> str:
    """Return the name of this process, as a lock file contains it."""
    return f"process {os.getpid()} on {platform.node()}"


def has_ended(holder: str) -> bool:
    """Return whether a holder, as `this_process` names it, has ended on this machine."""
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
