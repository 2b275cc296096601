"""Folders whose code may run in commands that only inform: `list`, `show` and TAB.

A project names plugins in `conf/config.yaml`, and a folder from a stranger does so, too. `train` and the other verbs
that compose an experiment run them; `list`, `show` and TAB do so only in folders that the user has trusted with
`framework trust`. Trust is by path, as in `git config safe.directory`: it holds also after the content has changed,
but no longer once the folder belongs to another user. It is kept in one file of the user's.
"""

import json
import os
import site
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from framework.errors import FrameworkError, RunError
from framework.errors.paths import expanded, shorter
from framework.registry.discovery import files_in, locate
from framework.system.files import open_file, parse_json, parse_yaml, write_file

MOST_BYTES = 2**20  # of a config file, and of the file of trusted folders
FRAMEWORK = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


class Named(NamedTuple):
    """A plugin that a config file names: the file, and the plugin as it would be loaded."""

    file: Path
    plugin: str


# the trusted folders


def trust_file() -> Path | None:
    """Return the file of trusted folders; None when the user has no home folder."""
    homes = (os.environ.get("XDG_STATE_HOME", ""), os.path.expanduser("~/.local/state"))
    home = next((path for path in homes if os.path.isabs(path)), None)
    return None if home is None else Path(home, "framework", "trusted.json")


def read_trusted() -> dict[str, int]:
    """Return the owner of each trusted folder, by its real path; {} when no folder was ever trusted.

    Raises RunError when the file of trusted folders is damaged, or may have been written by another user.
    """
    file = trust_file()
    if file is None:
        return {}
    try:
        with open_file(file.parent, file.name, most=MOST_BYTES) as opened:
            found = os.fstat(opened.fileno())
            content = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}") from error
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & stat.S_IWOTH:
        raise RunError(f"{file} may have been written by another user")
    folders = parse_json(content, file)
    folders = folders.get("folders") if isinstance(folders, dict) else None
    if not isinstance(folders, dict) or not all(type(owner) is int for owner in folders.values()):
        raise RunError(f"{file} holds no trusted folders")
    return folders


def is_trusted(folder: Path) -> bool:
    """Whether the user trusts a folder. Where that cannot be read, no folder is trusted."""
    try:
        return os.stat(folder).st_uid == read_trusted().get(os.path.realpath(folder))
    except (OSError, RunError):
        return False


def problem_of_file() -> str | None:
    """Return why no folder is trusted, if the file of trusted folders is damaged or another user's."""
    try:
        read_trusted()
    except RunError as error:
        return f"{error}; no folder is trusted"
    return None


def trust(folder: Path) -> None:
    """Trust a folder from now on. Raises RunError when that cannot be written."""
    write_trusted(known_folders() | {os.path.realpath(folder): os.stat(folder).st_uid})


def untrust(folder: Path) -> None:
    """Trust a folder no longer. Raises FrameworkError when it was not trusted."""
    path = os.path.realpath(folder)
    folders = known_folders()
    if path not in folders:
        raise FrameworkError(
            f"{escaped_path(path)} is not trusted (`framework trust --list` shows the folders that are)"
        )
    del folders[path]
    write_trusted(folders)


def known_folders() -> dict[str, int]:
    """Return the trusted folders; {} when the file is damaged or another user's: it is replaced."""
    try:
        return read_trusted()
    except RunError:
        return {}


def write_trusted(folders: dict[str, int]) -> None:
    file = trust_file()
    if file is None:
        raise FrameworkError(
            "trusted folders cannot be kept: neither XDG_STATE_HOME nor HOME is an absolute path"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{file.parent} cannot be made: {error.strerror}") from error
    write_file(file.parent, file.name, json.dumps({"folders": folders}, indent=2) + "\n")


# what would run


def named_plugins(folder: Path) -> list[Named]:
    """Return the plugins that the config files of a folder name, read as data."""
    found = []
    for config in config_folders_of(folder):
        for file in [config / "config.yaml", *sorted((config / "experiment").glob("*.yaml"))]:
            found += [Named(file, locate(plugin, config, folder)) for plugin in plugins_in(file)]
    return found


def config_folders_of(folder: Path) -> list[Path]:
    """Return `conf` of a project; and the folder itself, if it can be given to --config-dir."""
    candidates = (folder / "conf", folder)
    return [
        each
        for each in candidates
        if (each / "config.yaml").is_file() or (each / "experiment").is_dir()
    ]


def plugins_in(file: Path) -> list[str]:
    """Return what `plugins:` lists in a config file; [] when the file is missing or cannot be read."""
    try:
        if not file.is_file() or file.stat().st_size > MOST_BYTES:
            return []
        content = parse_yaml(file.read_bytes(), file)
    except (OSError, RunError):
        return []
    plugins = content.get("plugins") if isinstance(content, dict) else None
    return (
        [plugin for plugin in plugins if isinstance(plugin, str)]
        if isinstance(plugins, list)
        else []
    )


def description(folder: Path) -> list[str]:
    """Return lines for the user who is about to trust a folder: what would run, and what is unusual about it."""
    lines = []
    for file, plugin in named_plugins(folder):
        path = folder / expanded(plugin)
        lines.append(
            f"{escaped_path(shorter(file))} names the plugin {escaped_path(shorter(plugin))} ({sort_of(path)})"
        )
    if not lines:
        lines.append("its config files name no plugins so far")
    status = folder.stat()
    if status.st_uid != os.geteuid():
        lines.append(f"warning: the folder belongs to another user (number {status.st_uid})")
    if status.st_mode & stat.S_IWOTH:
        lines.append("warning: every user of this machine can write to the folder")
    return lines


def sort_of(plugin: Path) -> str:
    if plugin.is_dir():
        count = len(list(files_in(plugin)))
        return f"folder with {count} .py {'file' if count == 1 else 'files'}"
    return "file" if plugin.is_file() else "module"


def escaped_path(text: str) -> str:
    """Return a path as it is or, with control characters in it, escaped."""
    return text if text.isprintable() else ascii(text)


# modules in the working folder


@contextmanager
def importing_from_elsewhere(folder: str | Path, needed: Sequence[str] = ()) -> Iterator[list[str]]:
    """Import no module from a folder: leave its entries out of `sys.path`; yields those.

    PYTHONPATH, or `python -m`, may put the working folder there. An entry stays if this package or an installed one
    lies in it, or one of the modules `needed`, which the user has named.
    """
    before = list(sys.path)
    left_out = [
        entry for entry in entries_in(folder) if not any(holds(entry, module) for module in needed)
    ]
    sys.path[:] = [entry for entry in before if entry not in left_out]
    try:
        yield left_out
    finally:
        if left_out:
            sys.path[:] = before


def entries_in(folder: str | Path) -> list[str]:
    """Return the entries of `sys.path` in a folder, but those of installed packages; [] if the folder is deleted."""
    try:
        real = os.path.realpath(folder)
    except OSError:
        return []
    entries = [
        entry for entry in sys.path if is_below(entry, [real]) and os.path.exists(entry or ".")
    ]
    if not entries:
        return []
    installed = [sys.prefix, sys.base_prefix, *site.getsitepackages(), site.getusersitepackages()]
    other = [
        entry
        for entry in entries
        if not is_below(entry, installed) and os.path.realpath(entry) != FRAMEWORK
    ]
    listed = paths_of_installed() if other else []
    return [entry for entry in other if not is_below(entry, listed)]


def is_below(path: str, folders: Iterable[str]) -> bool:
    """Whether a path is one of these folders or lies in one."""
    real = os.path.realpath(path)
    return any(Path(real).is_relative_to(os.path.realpath(folder)) for folder in folders)


def paths_of_installed() -> list[str]:
    """Return the folders that packages installed in editable mode are imported from."""
    files = [file for folder in site.getsitepackages() for file in Path(folder).glob("*.pth")]
    lines = [
        line.strip()
        for file in files
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines()
    ]
    return [line for line in lines if os.path.isabs(line)]


def holds(entry: str, module: str) -> bool:
    """Whether an entry of `sys.path` has a module."""
    path = Path(entry, module.partition(".")[0])
    return path.is_dir() or path.with_name(f"{path.name}.py").is_file()
