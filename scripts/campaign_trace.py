"""Stop a process at each system call that changes files, to kill it or to make the call fail.

The kernel stops the process (ptrace), so that the program is unchanged and calls of all threads
and languages are included. Linux on x86-64 only.
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

# numbers on x86-64 of the calls that change files by name, and by descriptor
BY_NAME = {
    76: "truncate",
    82: "rename",
    83: "mkdir",
    84: "rmdir",
    85: "create",
    86: "link",
    87: "unlink",
    88: "symlink",
    90: "chmod",
    258: "mkdir",
    263: "unlink",
    264: "rename",
    265: "link",
    266: "symlink",
    316: "rename",
}
OPEN = 2
OPENAT = 257
CREATES_OR_CUTS = os.O_CREAT | os.O_TRUNC
WRITES = {1: "write", 18: "write"}  # the third argument is the length of the buffer
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

# requests and options of ptrace, from linux/ptrace.h
TRACE_ME = 0
POKE_USER = 6
CONTINUE_TO_CALL = 24
SET_OPTIONS = 0x4200
CALL_INFO = 0x420E
MARK_CALLS = 1
FOLLOW_THREADS = 8
KILL_WITH_TRACER = 0x100000
AT_ENTRY = 1
AT_EXIT = 2
# positions of the registers rax, rdx and orig_rax
RESULT = 10 * 8
LENGTH = 12 * 8
NUMBER = 15 * 8
STOPPED_AT_CALL = signal.SIGTRAP | 0x80
ANY_THREAD = 0x40000000

How = Literal["killed before", "killed after", "killed within", "no room"]
libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Call:
    """A system call that changes a file, and the number of bytes of a write."""

    name: str
    length: int = 0


@dataclass(frozen=True)
class Fault:
    """A fault at the n-th call, counted from 0; a truncated write writes `length` bytes."""

    at: int
    how: How
    length: int = 0


def supported() -> str | None:
    """Return the reason if processes cannot be traced on this system, otherwise None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "tracing needs Linux on x86-64"
    try:
        _, status = traced(lambda: None, Path("/nowhere"))
    except OSError as error:
        return f"the kernel does not permit tracing: {error.strerror}"
    return None if status == 0 else "a traced process failed"


def traced(
    work: Callable[[], Any], folder: Path, fault: Fault | None = None
) -> tuple[list[Call], int]:
    """Call a function in a forked process, with or without a fault.

    Returns:
        The calls that changed files in the folder, and the exit status (negative: a signal).
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
    faulty: int | None = None  # the thread of the faulty call
    threads = {child}
    prefix = os.fsencode(folder)
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
            if when == AT_ENTRY and (call := _change(thread, values, prefix)):
                calls.append(call)
                if fault is not None and len(calls) == fault.at + 1:
                    faulty = thread
                    _enter(child, thread, fault)
            elif when == AT_EXIT and thread == faulty and fault is not None:
                faulty = None
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
    """Return AT_ENTRY or AT_EXIT, and the number and arguments of a thread's call."""
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
    if not path.startswith(folder):
        return None
    return Call(BY_DESCRIPTOR[number], third if number in WRITES else 0)


def _resume(thread: int, number: int = 0) -> None:
    with suppress(ProcessLookupError):  # the thread may have been killed
        _ptrace(CONTINUE_TO_CALL, thread, 0, number)


def _ptrace(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(request, thread, address, data & (2**64 - 1)) == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
