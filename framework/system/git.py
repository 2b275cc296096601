"""Commit and uncommitted changes of a folder, read with git; nothing that the repository configures is run.

A repository's own configuration may name programs: file system monitors, external diffs, text conversions, filters,
hooks, transports. A folder from a stranger has such a configuration, so that git is called without them.
"""

import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from framework.errors.paths import real_path

SECONDS = 10.0
MOST_BYTES = 2**20  # of a diff
CUT = f"\n[cut after {MOST_BYTES:,} bytes]"
NOT_RECORDED = "[not recorded: the configuration of the repository names a filter {name!r}, which git would run]"
FILTERS = re.compile(r"filter\.(.+)\.(?:clean|smudge|process|required)", re.DOTALL)
KEPT = ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")
OWN_SETTINGS = {
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.pager": "cat",
    "diff.external": "",
    "safe.bareRepository": "explicit",  # not a folder that is laid out as a repository itself
    "submodule.recurse": "false",
}
DIFF = (
    "diff",
    "--no-ext-diff",
    "--no-textconv",
    "--no-color",
    "--ignore-submodules=dirty",
    "--submodule=short",
    "HEAD",
)


def commit_and_diff(folder: Path) -> tuple[str | None, str | None]:
    """Return the commit of a folder and the changes since then; None outside a repository or without git.

    A diff is cut after 1 MB. None too if git takes more than 10 s.
    """
    top = repository_of(folder)
    program = git_program(folder)
    if top is None or program is None:
        return None, None
    environment = environment_of(top, program)
    commit = output([program, *options(OWN_SETTINGS), "rev-parse", "HEAD"], folder, environment)
    if commit is None:
        return None, None
    return decoded(commit), diff(program, folder, environment)


def repository_of(folder: Path) -> Path | None:
    """Return the work tree that a folder lies in, as git looks for it: the nearest folder with a `.git`."""
    for each in (folder, *folder.parents):
        if (each / ".git").is_file() or (each / ".git" / "HEAD").exists():
            return each
        if (each / "HEAD").exists() and (each / "objects").exists():
            return (
                None  # laid out as a repository itself: an older git would read its configuration
            )
    return None


def git_program(folder: Path) -> str | None:
    """Return git from the PATH, but none in the folder itself: a PATH may hold "." or an empty entry."""
    return shutil.which("git", path=search_path(folder))


def search_path(folder: Path) -> str:
    inside = real_path(folder)
    entries = os.environ.get("PATH", os.defpath).split(os.pathsep)
    kept = [
        each
        for each in entries
        if os.path.isabs(each) and not real_path(Path(each)).is_relative_to(inside)
    ]
    return os.pathsep.join(kept)


def environment_of(top: Path, program: str) -> dict[str, str]:
    """Return the environment of git: without the user's GIT_* variables, which are about another command."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name in KEPT
    }
    return (
        environment
        | {
            "PATH": search_path(top),
            "GIT_CEILING_DIRECTORIES": str(top.parent),
            "GIT_WORK_TREE": str(
                top
            ),  # core.worktree could name a folder of which the diff should not hold a copy
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_ALLOW_PROTOCOL": "none",  # nothing is fetched, also not by a git that does not know the line above
            "GIT_TERMINAL_PROMPT": "0",
            "LC_ALL": "C",
        }
    )


def options(settings: Mapping[str, str]) -> Iterator[str]:
    yield "--no-pager"
    for name, value in settings.items():
        yield from ("-c", f"{name}={value}")


def diff(program: str, folder: Path, environment: Mapping[str, str]) -> str | None:
    settings = dict(OWN_SETTINGS)
    listed = output(
        [program, *options(OWN_SETTINGS), "config", "--list", "--show-scope", "-z"],
        folder,
        environment,
    )
    if listed is None:
        return None
    for name in filters_of(listed):
        if not re.fullmatch(r"[\w.-]+", name):  # it could not be given with -c
            return NOT_RECORDED.format(name=name)
        settings |= {f"filter.{name}.{key}": "" for key in ("clean", "smudge", "process")}
        settings[f"filter.{name}.required"] = "false"
    found = output([program, *options(settings), *DIFF], folder, environment)
    return None if found is None else decoded(found)


def filters_of(listed: bytes) -> list[str]:
    """Return the names of the filters that the configuration of the repository itself defines."""
    fields = listed.decode("utf-8", errors="surrogateescape").split("\0")
    names = []
    for scope, setting in zip(fields[::2], fields[1::2], strict=False):
        match = FILTERS.fullmatch(setting.partition("\n")[0])
        if match is not None and scope not in ("system", "global", "command"):
            names.append(match[1])
    return list(dict.fromkeys(names))


def output(command: list[str], folder: Path, environment: Mapping[str, str]) -> bytes | None:
    """Return at most MOST_BYTES + 1 bytes of what a command prints; None if it fails or takes too long.

    Afterwards neither it nor a process that it started runs any more.
    """
    deadline = time.monotonic() + SECONDS
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (OSError, ValueError):
        return None
    assert process.stdout is not None
    try:
        content = read_until(deadline, process.stdout.fileno())
        if len(content) <= MOST_BYTES and process.wait(max(deadline - time.monotonic(), 0.1)) != 0:
            return None
        return content
    except (TimeoutError, subprocess.TimeoutExpired):
        return None
    finally:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def read_until(deadline: float, pipe: int) -> bytes:
    """Return what a pipe yields until it is closed, or MOST_BYTES + 1 bytes. Raises TimeoutError."""
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    content = bytearray()
    while len(content) <= MOST_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not waiting.poll(left * 1000):
            raise TimeoutError
        piece = os.read(pipe, 2**16)
        if not piece:
            break
        content += piece
    return bytes(content[: MOST_BYTES + 1])


def decoded(content: bytes) -> str:
    """Return what git printed; a diff may hold a file of any encoding."""
    text = content[:MOST_BYTES].decode("utf-8", errors="replace").strip()
    return text + CUT if len(content) > MOST_BYTES else text
