"""Runs one command of `framework` in a scratch world, with limits, and tells all that it did beside its work."""

import os
import re
import resource
import signal
import stat
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

MOST_SECONDS = 10.0  # of CPU time, and of waiting for nothing
MOST_WALL = 60.0  # for each process that shares a core
IDLE = 6.0  # seconds without CPU time: it waits for something that does not come
MOST_MEMORY = 1_500_000  # kB
ROOM = 4 * 2**30  # bytes of address space beyond those at the start
OLD = 10**18  # nanoseconds: a time of access before all others

Kind = str  # executed, written, read, hang, traceback, memory, output, process, others
KINDS = (
    "executed",
    "written",
    "read",
    "hang",
    "traceback",
    "memory",
    "output",
    "process",
    "others",
)


@dataclass
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str
    seconds: float
    cpu: float
    memory: int
    hang: str = ""
    left: bool = False


def run(
    work: Callable[[], Any], world: Path, environment: dict[str, str], talk: Any = None
) -> Ended:
    """Call a function in a forked process, whose exit status is what it returns.

    Args:
        work: what the process does; it may replace itself by another program.
        world: the scratch folder; the working folder is work/ in it.
        talk: called with the file of the standard output once it has a line; then the process is sent SIGTERM.
    """
    streams = [world / "stdout", world / "stderr"]
    for file in streams:
        file.touch()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        become(work, world, environment, streams)
    hang = wait(child, talk, streams[0])
    _, status, used = os.wait4(child, 0)
    left = alive(child)
    if left:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    out, err = (
        file.read_bytes()[:5_000_000].decode("utf-8", "surrogateescape") for file in streams
    )
    cpu, seconds = used.ru_utime + used.ru_stime, time.monotonic() - began
    return Ended(
        os.waitstatus_to_exitcode(status), out, err, seconds, cpu, used.ru_maxrss, hang, left
    )


def become(
    work: Callable[[], Any], world: Path, environment: dict[str, str], streams: list[Path]
) -> None:
    """In the child: set limits, streams and folders, and do the work."""
    status = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(world / "work")
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(streams, 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        status = int(work() or 0)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 255)


def wait(child: int, talk: Any, out: Path) -> str:
    """Wait for a process to end; kill it and say why if it takes too long."""
    began, pause, busy, ticks, told = time.monotonic(), 0.002, time.monotonic(), 0.0, talk is None
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(pause)
        pause = min(1.3 * pause, 0.05)
        if not told and b"\n" in out.read_bytes():
            talk(out)
            told = True
            os.kill(child, signal.SIGTERM)
        now, (state, used) = time.monotonic(), activity(child)
        if used > ticks or state == "R":
            ticks, busy = used, now
        why = ""
        if used > MOST_SECONDS:
            why = f"{used:.0f} s of CPU time"
        elif now - busy > IDLE:
            why = f"waits since {now - busy:.0f} s, after {used:.1f} s of CPU time"
        elif now - began > MOST_WALL * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)):
            why = f"{now - began:.0f} s"
        if why:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            return why
    return ""


def activity(process: int) -> tuple[str, float]:
    """Return the state of a process (R: runs or could), and its CPU time with that of children that have ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0.0
    return fields[0], sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def alive(group: int) -> bool:
    """Whether a process of the group is left, after a moment to end in."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        time.sleep(0.01)
    return True


def program(arguments: list[str]) -> Callable[[], Any]:
    """Return the work that is the real command, in a new interpreter."""
    command = [str(Path(sys.executable).parent / "framework"), *arguments]
    return lambda: os.execv(command[0], command)


def ask_board(out: Path) -> None:
    """Ask TensorBoard for its runs and tags, as a browser does; the answers are added to its output."""
    text = out.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"http://127\.0\.0\.1:\d+/", text)
    if found is None:
        return
    time.sleep(0.5)  # until the data has been read
    for page in ("data/runs", "data/plugin/scalars/tags", "data/plugin/text/tags"):
        answer = ""
        with (
            suppress(OSError, ValueError),
            urllib.request.urlopen(found[0] + page, timeout=5) as reply,
        ):
            answer = reply.read().decode("utf-8", "replace")
        with out.open("a", encoding="utf-8") as file:
            file.write(f"{page}: {len(answer)} characters {answer if 'TOKEN' in answer else ''}\n")


# what is outside the run


@dataclass(frozen=True)
class Sentinel:
    """A file, folder or link that a command must leave alone."""

    kind: int
    size: int
    written: int
    read: int
    content: str


def snapshot(folders: list[Path]) -> dict[str, Sentinel]:
    """Return what is in some folders, themselves included."""
    found: dict[str, Sentinel] = {}
    for folder in folders:
        look(folder, found)
    return found


def look(path: Path, found: dict[str, Sentinel]) -> None:
    status, content = path.lstat(), ""
    if stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    if stat.S_ISREG(status.st_mode):
        content = sha256(path.read_bytes()).hexdigest() if status.st_size < 2**24 else "large"
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    found[str(path)] = Sentinel(
        status.st_mode, size, status.st_mtime_ns, status.st_atime_ns, content
    )
    if stat.S_ISDIR(status.st_mode):
        for inner in sorted(os.listdir(path)):
            look(path / inner, found)


def age(folders: list[Path]) -> None:
    """Set the times of access back, so that the next one shows (with the mount option relatime as well)."""
    for folder in folders:
        paths = [folder, *folder.rglob("*")]
        for path in reversed(paths):
            status = path.lstat()
            if not stat.S_ISLNK(status.st_mode):
                os.utime(path, ns=(OLD, status.st_mtime_ns))


def times_of_access(folder: Path) -> bool:
    """Whether the file system of a folder keeps times of access."""
    file = folder / "probe"
    file.write_text("x")
    age([file])
    file.read_text()
    kept = file.stat().st_atime_ns != OLD
    file.unlink()
    return kept


def changes(before: dict[str, Sentinel], after: dict[str, Sentinel]) -> tuple[list[str], list[str]]:
    """Return what was written, made or removed, and what was read."""
    written, read = [], []
    for path in sorted({*before, *after}):
        old, new = before.get(path), after.get(path)
        if old is None or new is None:
            written.append(f"{'made' if old is None else 'removed'}: {path}")
        elif (old.kind, old.size, old.written, old.content) != (
            new.kind,
            new.size,
            new.written,
            new.content,
        ):
            written.append(f"changed: {path}")
        elif new.read != OLD and not stat.S_ISLNK(old.kind):
            read.append(f"read: {path}")
    return written, read


def holds(folder: Path, token: bytes, but: set[tuple[int, int]]) -> list[str]:
    """Return the regular files in a folder that contain a token; but: files by device and number."""
    found = []
    for above, _, names in os.walk(folder):
        for name in names:
            path = Path(above, name)
            status = path.lstat()
            known = (status.st_dev, status.st_ino) in but
            if (
                stat.S_ISREG(status.st_mode)
                and not known
                and status.st_size < 2**24
                and token in path.read_bytes()
            ):
                found.append(str(path))
    return found


# what is said

CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]|[\udc80-\udcff]"
)
FAULTS = {
    "a traceback": re.compile(r"Traceback \(most recent call last\)"),
    "an internal error": re.compile(r"internal error at \S+|framework: a fault at \S+"),
    "an ignored exception": re.compile(r"Exception ignored"),
    "an abort": re.compile(r"terminate called|Fatal Python error"),
}
SHELL = re.compile(r"[;&|`]|\$\(")


def faults(ended: Ended, token: str) -> list[tuple[Kind, str]]:
    """Return what is wrong with the exit status and the output of a command. token: that must not be in it."""
    wrong: list[tuple[Kind, str]] = []
    text = f"{ended.out}\n{ended.err}"
    if ended.hang:
        wrong.append(("hang", ended.hang))
    elif ended.status not in (0, 2):
        wrong.append(("traceback", f"exit status {ended.status}: {last_line(ended)}"))
    else:
        for what, pattern in FAULTS.items():
            if match := pattern.search(text):
                wrong.append(("traceback", f"{what}: {line_at(text, match.start())}"))
    if ended.memory > MOST_MEMORY:
        wrong.append(("memory", f"{ended.memory:,} kB"))
    if ended.left:
        wrong.append(("process", "a process is left"))
    if token and token in text:
        wrong.append(("read", f"the token is in the output: {line_at(text, text.index(token))}"))
    if match := re.search(r"\.py:\d+: \w*Warning", text):
        wrong.append(("output", f"a warning as Python shows it: {line_at(text, match.start())}"))
    if match := CONTROL.search(text):
        wrong.append(("output", f"{match[0]!r} in {line_at(text, match.start())!r}"))
    if re.search(r"^(framework: )?all is well|^framework: framework:", text, re.MULTILINE):
        wrong.append(("output", "a forged line"))
    if ended.status == 2 and not ended.hang and "framework: " not in ended.err:
        wrong.append(("output", f"exit status 2 without a message: {last_line(ended)}"))
    if max(map(len, ended.err.splitlines()), default=0) > 4_000 or len(ended.err) > 60_000:
        wrong.append(("output", f"an error of {len(ended.err):,} characters: {ended.err[:80]!r}"))
    commands = [
        line
        for line in text.splitlines()
        if line.startswith(("measure ", "go on ", "watch ", "best "))
    ]
    unquoted = [line for line in commands if SHELL.search(re.sub(r"'[^']*'", "", line))]
    if unquoted:
        wrong.append(("output", f"an unquoted command: {unquoted[0][:120]}"))
    return wrong


def last_line(ended: Ended) -> str:
    lines = [line for line in ended.err.splitlines() if line.strip()] or [""]
    return lines[-1][:220]


def line_at(text: str, place: int) -> str:
    start = text.rfind("\n", 0, place) + 1
    line = text[start:].partition("\n")[0]
    near = max(place - start - 100, 0)
    return line[near : near + 220]
