"""Stops a process at every system call by which it changes files, to kill it there or to make the call fail.

Nothing of the program is replaced: the kernel stops it (ptrace), whichever language and thread the call comes from.
Linux on x86-64 only.
"""

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# calls that change files by name, and by descriptor; x86-64 numbers
BY_NAME = {
    76: "truncate",
    82: "rename",
    83: "mkdir",
    84: "rmdir",
    85: "create",
    86: "link",
    87: "unlink",
    88: "symlink",
}
BY_NAME |= {
    90: "chmod",
    258: "mkdir",
    263: "unlink",
    264: "rename",
    265: "link",
    266: "symlink",
    316: "rename",
}
OPEN, OPENAT, CREATES_OR_CUTS = 2, 257, os.O_CREAT | os.O_TRUNC
WRITES = {1: "write", 18: "write"}  # of a buffer, whose length is the third argument
BY_DESCRIPTOR = {
    20: "write",
    74: "fsync",
    75: "fsync",
    77: "truncate",
    91: "chmod",
    285: "allocate",
    296: "write",
}
BY_DESCRIPTOR |= WRITES | {40: "write", 326: "write"}

TRACE_ME, CONTINUE_TO_CALL, SET_OPTIONS, CALL_INFO, POKE_USER = 0, 24, 0x4200, 0x420E, 6
MARK_CALLS, FOLLOW_THREADS, KILL_WITH_TRACER = 1, 8, 0x100000
LENGTH, RESULT, NUMBER = 12 * 8, 10 * 8, 15 * 8  # where rdx, rax and orig_rax lie
AT_ENTRY, AT_EXIT = 1, 2
STOPPED_AT_CALL = signal.SIGTRAP | 0x80
ANY_THREAD = 0x40000000

How = Literal["killed before", "killed after", "killed within", "no room"]
libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Call:
    """A system call that changes a file, and how many bytes a write was to write."""

    name: str
    length: int = 0


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th call, counted from 0; of a write cut short, `length` bytes are written."""

    at: int
    how: How
    length: int = 0


def supported() -> str | None:
    """Return why processes cannot be traced here, or None when they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "tracing needs Linux on x86-64"
    try:
        return None if traced(lambda: None, Path("/nowhere"))[1] == 0 else "a traced process failed"
    except OSError as error:
        return f"the kernel allows no tracing: {error.strerror}"


def traced(
    work: Callable[[], Any], folder: Path, fault: Fault | None = None
) -> tuple[list[Call], int]:
    """Do some work in a process of its own, with a fault or without.

    Returns the calls by which it changed files in that folder, and its exit status (less than 0: a signal).
    """
    child = os.fork()
    if child == 0:
        _work(work)
    os.waitpid(child, os.WUNTRACED)
    _ptrace(SET_OPTIONS, child, 0, MARK_CALLS | FOLLOW_THREADS | KILL_WITH_TRACER)
    return _follow(child, folder, fault)


def _work(work: Callable[[], Any]) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        _ptrace(TRACE_ME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        status = work() or 0
    except BaseException as error:
        print(f"  {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def _follow(child: int, folder: Path, fault: Fault | None) -> tuple[list[Call], int]:
    calls: list[Call] = []
    struck: int | None = None  # the thread in whose call the fault is
    threads, here = {child}, os.fsencode(folder)
    _resume(child)
    while True:
        thread, status = os.waitpid(-child, ANY_THREAD)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread == child:
                return calls, os.waitstatus_to_exitcode(status)
            continue
        if os.WSTOPSIG(status) != STOPPED_AT_CALL:
            passed_on = 0 if status >> 16 or thread not in threads else os.WSTOPSIG(status)
            threads.add(thread)
            _resume(thread, passed_on)
            continue
        with suppress(ProcessLookupError):  # another thread's call has killed it
            when, values = _call(thread)
            if when == AT_ENTRY and (call := _change(thread, values, here)):
                calls.append(call)
                if fault is not None and len(calls) == fault.at + 1:
                    struck = thread
                    _enter(child, thread, fault)
            elif when == AT_EXIT and thread == struck and fault is not None:
                struck = None
                _leave(child, thread, fault)
        _resume(thread)


def _enter(child: int, thread: int, fault: Fault) -> None:
    if fault.how in ("killed before", "no room"):
        _ptrace(POKE_USER, thread, NUMBER, -1)  # the call is not made
    if fault.how == "killed before":
        os.kill(child, signal.SIGKILL)
    elif fault.how == "killed within":
        _ptrace(POKE_USER, thread, LENGTH, fault.length)


def _leave(child: int, thread: int, fault: Fault) -> None:
    if fault.how == "no room":
        _ptrace(POKE_USER, thread, RESULT, -errno.ENOSPC)
    else:
        os.kill(child, signal.SIGKILL)


def _call(thread: int) -> tuple[int, tuple[int, ...]]:
    """Return whether a thread is at the entry or exit of a call, and the number and arguments."""
    info = ctypes.create_string_buffer(88)
    _ptrace(CALL_INFO, thread, len(info), ctypes.addressof(info))
    return info.raw[0], struct.unpack_from("7Q", info.raw, 24)


def _change(thread: int, values: tuple[int, ...], folder: bytes) -> Call | None:
    """Return the call if it is one that changes a file in the folder."""
    number, first, second, third = values[:4]
    if number in BY_NAME:
        return Call(BY_NAME[number])
    if number in (OPEN, OPENAT):
        flags = second if number == OPEN else third
        return Call("create") if flags & CREATES_OR_CUTS else None
    if number not in BY_DESCRIPTOR:
        return None
    try:
        path = os.readlink(os.fsencode(f"/proc/{thread}/fd/{first}"))
    except OSError:
        return None
    return (
        Call(BY_DESCRIPTOR[number], third if number in WRITES else 0)
        if path.startswith(folder)
        else None
    )


def _resume(thread: int, number: int = 0) -> None:
    with suppress(ProcessLookupError):  # killed meanwhile
        _ptrace(CONTINUE_TO_CALL, thread, 0, number)


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, thread, address, data & (2**64 - 1)) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
