"""A disk of any size in memory, visible only to one process and its children."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = 4096
# flags of unshare and mount, from linux/sched.h and linux/mount.h
NEW_MOUNTS = 0x20000
NEW_USER = 0x10000000
PRIVATE = 1 << 18
RECURSIVE = 1 << 14


def mount(place: Path, size: int) -> None:
    """Mount an empty disk of `size` bytes for this process.

    Raises:
        OSError: The system does not permit it.
    """
    if sys.platform != "linux":
        raise OSError(0, "a disk for one process needs Linux")
    user = os.getuid()
    group = os.getgid()
    _check(libc().unshare(NEW_MOUNTS | (NEW_USER if user else 0)))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _check(libc().mount(b"none", b"/", None, PRIVATE | RECURSIVE, None))
    _check(libc().mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()))


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def pages_free(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize // PAGE


@contextmanager
def pages_left(place: Path, pages: int) -> Iterator[None]:
    """Fill a disk until `pages` pages of 4 KiB are free."""
    filler = place / "filler"
    filler.write_bytes(bytes(max(pages_free(place) - pages, 0) * PAGE))
    try:
        yield
    finally:
        filler.unlink()
