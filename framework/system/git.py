"""Commit and uncommitted changes of a folder, read with git, without running its programs.

The configuration of a repository may name programs: file system monitors, external diffs, text
conversions, filters, hooks, transports. The repository may be untrusted, so that git is called with
all of them disabled.
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

TIMEOUT = 10.0  # seconds
MOST_DIFF_BYTES = 2**20  # of a diff
CUT = f"\n[cut after {MOST_DIFF_BYTES:,} bytes]"
NOT_RECORDED = (
    "[not recorded: the configuration of the repository names a filter {name!r}, which git would "
    "run]"
)
FILTERS = re.compile(r"filter\.(.+)\.(?:clean|smudge|process|required)", re.DOTALL)
KEPT = ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM")
OWN_SETTINGS = {
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.pager": "cat",
    "diff.external": "",
    "safe.bareRepository": "explicit",  # a folder with the files of a repository is not one
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
    """Return the commit of a folder and its uncommitted changes, cut after 1 MB.

    Both are None outside of a repository, without git, or if git fails or takes more than 10 s.
    """
    top = repository_of(folder)
    program = shutil.which("git", path=search_path(folder))
    if top is None or program is None:
        return None, None
    environment = environment_of(top)
    commit = output([program, *options(OWN_SETTINGS), "rev-parse", "HEAD"], folder, environment)
    if commit is None:
        return None, None
    return decoded(commit), diff(program, folder, environment)


def repository_of(folder: Path) -> Path | None:
    """Return the work tree of a folder: itself or its nearest parent with a `.git`, as in git.

    None for a bare repository: an older git would read its configuration.
    """
    for candidate in (folder, *folder.parents):
        if (candidate / ".git").is_file() or (candidate / ".git" / "HEAD").exists():
            return candidate
        if (candidate / "HEAD").exists() and (candidate / "objects").exists():  # it is bare
            return None
    return None


def search_path(folder: Path) -> str:
    """Return the PATH without relative entries and without those in a folder."""
    excluded = real_path(folder)

    def is_allowed(entry: str) -> bool:
        return os.path.isabs(entry) and not real_path(entry).is_relative_to(excluded)

    entries = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(filter(is_allowed, entries))


def environment_of(top: Path) -> dict[str, str]:
    """Return the environment of git in a work tree, without the user's GIT_* variables."""

    def is_kept(name: str) -> bool:
        return not name.startswith("GIT_") or name in KEPT

    kept = {name: value for name, value in os.environ.items() if is_kept(name)}
    return kept | {
        "PATH": search_path(top),
        "GIT_CEILING_DIRECTORIES": str(top.parent),
        "GIT_WORK_TREE": str(top),  # core.worktree could name any folder
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",  # for a git that does not know GIT_NO_LAZY_FETCH
        "GIT_TERMINAL_PROMPT": "0",
        "LC_ALL": "C",
    }


def options(settings: Mapping[str, str]) -> Iterator[str]:
    """Yield the options of git that set its configuration."""
    yield "--no-pager"
    for name, value in settings.items():
        yield "-c"
        yield f"{name}={value}"


def diff(program: str, folder: Path, environment: Mapping[str, str]) -> str | None:
    """Return the uncommitted changes; None if git fails. Filters of the repository do not run."""
    settings = dict(OWN_SETTINGS)
    list_settings = ["config", "--list", "--show-scope", "-z"]
    listed = output([program, *options(settings), *list_settings], folder, environment)
    if listed is None:
        return None
    for name in filters_of(listed):
        if not re.fullmatch(r"[\w.-]+", name):  # -c cannot set it
            return NOT_RECORDED.format(name=name)
        for key in ("clean", "smudge", "process"):
            settings[f"filter.{name}.{key}"] = ""
        settings[f"filter.{name}.required"] = "false"
    changes = output([program, *options(settings), *DIFF], folder, environment)
    return None if changes is None else decoded(changes)


def filters_of(listed: bytes) -> list[str]:
    """Return the names of the filters that the repository itself defines.

    Args:
        listed: the output of `git config --list --show-scope -z`.
    """
    fields = listed.decode("utf-8", errors="surrogateescape").split("\0")
    names = []
    for scope, setting in zip(fields[::2], fields[1::2], strict=False):
        match = FILTERS.fullmatch(setting.partition("\n")[0])
        if match is not None and scope not in ("system", "global", "command"):
            names.append(match[1])
    return list(dict.fromkeys(names))


def output(command: list[str], folder: Path, environment: Mapping[str, str]) -> bytes | None:
    """Return the output of a command, cut after MOST_DIFF_BYTES + 1 bytes; None if it fails.

    A command that takes longer than TIMEOUT fails. All its processes are killed at the end.
    """
    deadline = time.monotonic() + TIMEOUT
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
        if len(content) > MOST_DIFF_BYTES:
            return content
        status = process.wait(max(deadline - time.monotonic(), 0.1))
        return content if status == 0 else None
    except (TimeoutError, subprocess.TimeoutExpired):
        return None
    finally:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


def read_until(deadline: float, pipe: int) -> bytes:
    """Read a pipe until it is closed, or for MOST_DIFF_BYTES + 1 bytes.

    Args:
        deadline: a time of `time.monotonic`.

    Raises:
        TimeoutError: the deadline has passed.
    """
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    content = bytearray()
    while len(content) <= MOST_DIFF_BYTES:
        seconds = deadline - time.monotonic()
        if seconds <= 0 or not poll.poll(seconds * 1000):
            raise TimeoutError
        piece = os.read(pipe, 2**16)
        if not piece:
            break
        content += piece
    return bytes(content[: MOST_DIFF_BYTES + 1])


def decoded(content: bytes) -> str:
    """Return git's output as text. A diff may contain files of any encoding."""
    text = content[:MOST_DIFF_BYTES].decode("utf-8", errors="replace").strip()
    return text + CUT if len(content) > MOST_DIFF_BYTES else text
