"""The state of a run: its status.json, and whether a process holds the lock of its folder."""

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from framework.errors import FrameworkError, RunError
from framework.system.files import open_file
from framework.system.locks import MOST_HOLDER_BYTES, has_ended, lock, locks_disabled

from .file_names import CONFIG, METRICS, STATUS_FILE

MOST_STATUS = 2**20  # bytes of a status.json that is read
FRESH_SECONDS = 600.0  # since the last write of a run on another machine that counts as running

State = Literal["running", "paused", "testing", "stale", "failed", "stopped", "done", "unknown"]
"""The state of a run.

running: a process writes to the folder. paused: it waits between two steps, as `framework tell` has
requested. testing: the training has ended, and the test may follow. stale: its process has ended
without a result, such as by SIGKILL. failed: an error has ended it. stopped: a signal, or a
callback in a run whose test was interrupted, has ended it. done: complete. unknown: status.json is
missing or damaged.
"""
ACTIVE: tuple[State, ...] = ("running", "paused", "testing")
"""The states of a run whose process is alive."""


def state_of(run: Path, status: Any) -> State:
    """Return the state of a run.

    Args:
        run: its folder.
        status: the status in its status.json: running, paused, testing, stopped, failed or done.
    """
    if status == "done":
        return "done"
    if status == "failed":
        return "failed"
    if status == "stopped":
        return "testing" if is_written(run) else "stopped"  # the test may follow
    for active in ACTIVE:
        if status == active:
            return active if is_written(run) else "stale"
    return "unknown"


def is_written(run: Path) -> bool:
    """Return whether a process writes to a run folder now.

    The process of this machine holds the lock. A process of another machine has written within the
    last `FRESH_SECONDS`: its lock may be invisible here.
    """
    try:
        file = open_file(run, ".lock", "r")
    except (OSError, RunError):
        return False
    with file:
        holder = file.read(MOST_HOLDER_BYTES).decode("utf-8", errors="replace").strip()
        if not holder.startswith("process ") or not is_own_machine(holder):
            return bool(holder) and is_fresh(run)
        if locks_disabled():
            return not has_ended(holder)
        try:
            # A process that starts to write retries for a while if the last holder has ended.
            return not lock(file, run / ".lock", wait=False)
        except (OSError, FrameworkError):  # no locks on this file system
            return not has_ended(holder)


def is_own_machine(holder: str) -> bool:
    """Return whether a process, as a lock file names it, is of this machine."""
    return holder.partition(" on ")[2] == os.uname().nodename


def is_fresh(run: Path) -> bool:
    """Return whether the status or the metrics of a run were written a short time ago."""
    for file in (STATUS_FILE, METRICS):
        try:
            written = os.lstat(run / file).st_mtime
        except OSError:
            continue
        if abs(time.time() - written) < FRESH_SECONDS:
            return True
    return False


def status_of(run: Path) -> str | None:
    """Return the status of a run, such as "done"; None if it is unknown."""
    status = read_status(run).get("status")
    return status if isinstance(status, str) else None


def read_status(run: Path) -> dict[str, Any]:
    """Return the content of status.json; empty if the file is missing or damaged.

    The fingerprint of the config is left out if the config is newer than status.json.
    """
    try:
        with open_file(run, STATUS_FILE, most=MOST_STATUS) as file:
            updated = os.fstat(file.fileno()).st_mtime_ns
            status = json.loads(file.read(MOST_STATUS))
    except (OSError, RunError, ValueError, RecursionError):
        return {}
    if not isinstance(status, dict):
        return {}
    if "config" in status and updated < os.lstat(run / CONFIG).st_mtime_ns:
        del status["config"]
    return status
