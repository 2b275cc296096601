"""Run a command of `framework` in a scratch folder with limits, and report its side effects."""

import os
import re
import resource
import signal
import stat
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

MOST_SECONDS = 10.0  # limit of the CPU time
MOST_WALL = 60.0  # limit of the wall time, for each process that shares a core
IDLE = 6.0  # limit of the seconds without CPU time
MOST_MEMORY = 1_500_000  # kB
ADDRESS_SPACE = 4 * 2**30  # additional bytes
OLD = 10**18  # an access time (ns) before all others

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
    """The end of a command: exit status, output and used resources."""

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
    """Call a function in a forked process; its return value is the exit status.

    Args:
        work: The function; it may replace the process by another program.
        world: The scratch folder; the working folder is its subfolder work.
        environment: The environment variables.
        talk: Function that is called with the file of the standard output after its first line;
            then the process gets SIGTERM.
    """
    streams = [world / "stdout", world / "stderr"]
    for file in streams:
        file.touch()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        run_in_child(work, world, environment, streams)
    hang = wait(child, talk, streams[0])
    _, status, used = os.wait4(child, 0)
    left = alive(child)
    if left:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    texts = [file.read_bytes()[:5_000_000].decode("utf-8", "surrogateescape") for file in streams]
    return Ended(
        os.waitstatus_to_exitcode(status),
        out=texts[0],
        err=texts[1],
        seconds=time.monotonic() - began,
        cpu=used.ru_utime + used.ru_stime,
        memory=used.ru_maxrss,
        hang=hang,
        left=left,
    )


def run_in_child(
    work: Callable[[], Any], world: Path, environment: dict[str, str], streams: list[Path]
) -> None:
    """Set limits, streams and folders in the child process, and call the function."""
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
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_SPACE, size + ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28))
        sys.stdin = os.fdopen(0)
        sys.stdout = os.fdopen(1, "w")
        sys.stderr = os.fdopen(2, "w")
        status = int(work() or 0)
    except SystemExit as error:
        if error.code is None:
            status = 0
        elif isinstance(error.code, int):
            status = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 255)


def wait(child: int, talk: Any, out: Path) -> str:
    """Wait for the end of a process; kill it and return the reason if it exceeds a limit."""
    began = time.monotonic()
    pause = 0.002
    last_active = began
    last_used = 0.0
    must_talk = talk is not None
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(pause)
        pause = min(1.3 * pause, 0.05)
        if must_talk and b"\n" in out.read_bytes():
            talk(out)
            must_talk = False
            os.kill(child, signal.SIGTERM)
        now = time.monotonic()
        state, used = activity(child)
        if used > last_used or state == "R":
            last_used = used
            last_active = now
        reason = ""
        if used > MOST_SECONDS:
            reason = f"{used:.0f} s of CPU time"
        elif now - last_active > IDLE:
            reason = f"idle for {now - last_active:.0f} s, after {used:.1f} s of CPU time"
        elif now - began > MOST_WALL * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)):
            reason = f"{now - began:.0f} s"
        if reason:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            return reason
    return ""


def activity(process: int) -> tuple[str, float]:
    """Return the state of a process (R: running or runnable) and its CPU time.

    The CPU time includes that of children that have ended.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0.0
    return fields[0], sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def alive(group: int) -> bool:
    """Return whether a process of the group still runs after 3 seconds."""
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
    """Return a function that runs the real command in a new interpreter."""
    command = [str(Path(sys.executable).parent / "framework"), *arguments]
    return lambda: os.execv(command[0], command)


def ask_board(out: Path) -> None:
    """Request the runs and tags from TensorBoard like a browser, and append them to its output."""
    text = out.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"http://127\.0\.0\.1:\d+/", text)
    if found is None:
        return
    time.sleep(0.5)  # wait until TensorBoard has read the data
    for page in ("data/runs", "data/plugin/scalars/tags", "data/plugin/text/tags"):
        answer = ""
        with (
            suppress(OSError, ValueError),
            urllib.request.urlopen(found[0] + page, timeout=5) as reply,
        ):
            answer = reply.read().decode("utf-8", "replace")
        with out.open("a", encoding="utf-8") as file:
            file.write(f"{page}: {len(answer)} characters {answer if 'TOKEN' in answer else ''}\n")


# files outside the run


@dataclass(frozen=True)
class Sentinel:
    """A file, folder or link that no command may change; access times are not compared."""

    kind: int
    size: int
    written: int
    content: str
    read: int = field(compare=False)


def snapshot(folders: list[Path]) -> dict[str, Sentinel]:
    """Return the state of folders and their content."""
    found: dict[str, Sentinel] = {}
    for folder in folders:
        add_sentinels(folder, found)
    return found


def add_sentinels(path: Path, found: dict[str, Sentinel]) -> None:
    status = path.lstat()
    size = status.st_size
    content = ""
    if stat.S_ISDIR(status.st_mode):
        size = 0
    elif stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        content = sha256(path.read_bytes()).hexdigest() if size < 2**24 else "large"
    found[str(path)] = Sentinel(
        status.st_mode, size, status.st_mtime_ns, content, status.st_atime_ns
    )
    if stat.S_ISDIR(status.st_mode):
        for inner in sorted(os.listdir(path)):
            add_sentinels(path / inner, found)


def age(folders: list[Path]) -> None:
    """Set old access times, so that the next access changes them (also with relatime)."""
    for folder in folders:
        paths = [folder, *folder.rglob("*")]
        for path in reversed(paths):
            status = path.lstat()
            if not stat.S_ISLNK(status.st_mode):
                os.utime(path, ns=(OLD, status.st_mtime_ns))


def times_of_access(folder: Path) -> bool:
    """Return whether the file system of a folder records access times."""
    file = folder / "probe"
    file.write_text("x")
    age([file])
    file.read_text()
    kept = file.stat().st_atime_ns != OLD
    file.unlink()
    return kept


def changes(before: dict[str, Sentinel], after: dict[str, Sentinel]) -> tuple[list[str], list[str]]:
    """Return the changed, created or removed files, and the files that were read."""
    written = []
    read = []
    for path in sorted({*before, *after}):
        old = before.get(path)
        new = after.get(path)
        if old is None:
            written.append(f"created: {path}")
        elif new is None:
            written.append(f"removed: {path}")
        elif old != new:
            written.append(f"changed: {path}")
        elif new.read != OLD and not stat.S_ISLNK(old.kind):
            read.append(f"read: {path}")
    return written, read


def files_with(token: bytes, folder: Path, known: set[tuple[int, int]]) -> list[str]:
    """Return the regular files in a folder that contain a token.

    Args:
        token: The content to find.
        folder: The folder, searched with all subfolders.
        known: Devices and inodes of excluded files.
    """
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            status = path.lstat()
            if (status.st_dev, status.st_ino) in known or not stat.S_ISREG(status.st_mode):
                continue
            if status.st_size < 2**24 and token in path.read_bytes():
                found.append(str(path))
    return found


# output

CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]|[\udc80-\udcff]"
)
FAULTS = {
    "a traceback": re.compile(r"Traceback \(most recent call last\)"),
    "an internal error": re.compile(r"internal error at \S+|framework: a fault at \S+"),
    "an ignored exception": re.compile(r"Exception ignored"),
    "an abort": re.compile(r"terminate called|Fatal Python error"),
}
COMMAND_LINES = ("measure ", "resume ", "watch ", "best ")
SHELL = re.compile(r"[;&|`]|\$\(")


def faults(ended: Ended, token: str) -> list[tuple[Kind, str]]:
    """Return the problems of a command's exit status, resources and output.

    Args:
        ended: The end of the command.
        token: A text that must not be in the output; empty to skip this check.
    """
    wrong: list[tuple[Kind, str]] = []
    text = f"{ended.out}\n{ended.err}"
    if ended.hang:
        wrong.append(("hang", ended.hang))
    elif ended.status not in (0, 2):
        wrong.append(("traceback", f"exit status {ended.status}: {last_line(ended)}"))
    else:
        for name, pattern in FAULTS.items():
            if match := pattern.search(text):
                wrong.append(("traceback", f"{name}: {line_at(text, match.start())}"))
    if ended.memory > MOST_MEMORY:
        wrong.append(("memory", f"{ended.memory:,} kB"))
    if ended.left:
        wrong.append(("process", "a process is left"))
    if token and token in text:
        wrong.append(("read", f"the token is in the output: {line_at(text, text.index(token))}"))
    if ended.status == 2 and not ended.hang and "framework: " not in ended.err:
        wrong.append(("output", f"exit status 2 without a message: {last_line(ended)}"))
    if max(map(len, ended.err.splitlines()), default=0) > 4_000 or len(ended.err) > 60_000:
        wrong.append(("output", f"an error of {len(ended.err):,} characters: {ended.err[:80]!r}"))
    wrong += [("output", problem) for problem in output_faults(text)]
    return wrong


def output_faults(text: str) -> Iterator[str]:
    """Yield raw warnings, control characters, forged lines and unquoted commands of an output."""
    if match := re.search(r"\.py:\d+: \w*Warning", text):
        yield f"a raw Python warning: {line_at(text, match.start())}"
    if match := CONTROL.search(text):
        yield f"{match[0]!r} in {line_at(text, match.start())!r}"
    if re.search(r"^(framework: )?all is well|^framework: framework:", text, re.MULTILINE):
        yield "a forged line"
    for line in text.splitlines():
        is_command = line.startswith(COMMAND_LINES)
        if is_command and SHELL.search(re.sub(r"'[^']*'", "", line)):
            yield f"an unquoted command: {line[:120]}"
            return


def last_line(ended: Ended) -> str:
    lines = [line for line in ended.err.splitlines() if line.strip()] or [""]
    return lines[-1][:220]


def line_at(text: str, position: int) -> str:
    start = text.rfind("\n", 0, position) + 1
    line = text[start:].partition("\n")[0]
    first = max(position - start - 100, 0)
    return line[first : first + 220]
