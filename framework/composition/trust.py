"""Trusted folders: `list`, `show` and TAB run the plugins of a project only in a trusted folder.

A project names plugins in `conf/config.yaml`, and so may an untrusted folder. `train` and the other
commands that compose an experiment run them in any folder. `list`, `show` and TAB run them only in
folders that the user has trusted with `framework trust`. Trust is by path, as in `git config
safe.directory`: it does not depend on the content, and ends when the folder belongs to another
user. It is stored in one file of the user.
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

MOST_CONFIG_BYTES = 2**20  # of a config file, and of the file of trusted folders
FRAMEWORK = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


class Named(NamedTuple):
    """A plugin that a config file names: the file, and the plugin's path or module name."""

    file: Path
    plugin: str


# the trusted folders


def trust_file() -> Path | None:
    """Return the file of trusted folders; None if the user has no home folder."""
    for home in (os.environ.get("XDG_STATE_HOME", ""), os.path.expanduser("~/.local/state")):
        if os.path.isabs(home):
            return Path(home, "framework", "trusted.json")
    return None


def read_trusted() -> dict[str, int]:
    """Return the user number of the owner of each trusted folder, by its real path.

    Raises:
        RunError: if the file of trusted folders is damaged, or another user may have written it.
    """
    file = trust_file()
    if file is None:
        return {}
    try:
        with open_file(file.parent, file.name, most=MOST_CONFIG_BYTES) as opened:
            status = os.fstat(opened.fileno())
            content = opened.read(MOST_CONFIG_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror}") from error
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & stat.S_IWOTH:
        raise RunError(f"{file} may have been written by another user")
    parsed = parse_json(content, file)
    folders = parsed.get("folders") if isinstance(parsed, dict) else None
    if not isinstance(folders, dict) or not all(type(owner) is int for owner in folders.values()):
        raise RunError(f"{file} is not a list of trusted folders")
    return folders


def is_trusted(folder: Path) -> bool:
    """Return whether the user trusts a folder; False if the trusted folders cannot be read."""
    try:
        return os.stat(folder).st_uid == read_trusted().get(os.path.realpath(folder))
    except (OSError, RunError):
        return False


def problem_of_file() -> str | None:
    """Return why the file of trusted folders cannot be used, or None."""
    try:
        read_trusted()
    except RunError as error:
        return f"{error}; no folder is trusted"
    return None


def trust(folder: Path) -> None:
    """Trust a folder.

    Raises:
        RunError: the file of trusted folders cannot be written.
    """
    folders = known_folders()
    folders[os.path.realpath(folder)] = os.stat(folder).st_uid
    write_trusted(folders)


def untrust(folder: Path) -> None:
    """Stop trusting a folder.

    Raises:
        FrameworkError: the folder is not trusted.
        RunError: the file of trusted folders cannot be written.
    """
    path = os.path.realpath(folder)
    folders = known_folders()
    if path not in folders:
        raise FrameworkError(
            f"{escaped_path(path)} is not trusted "
            "(`framework trust --list` prints the trusted folders)"
        )
    del folders[path]
    write_trusted(folders)


def known_folders() -> dict[str, int]:
    """Return the trusted folders; {} if the file cannot be used, so that it is replaced."""
    try:
        return read_trusted()
    except RunError:
        return {}


def write_trusted(folders: dict[str, int]) -> None:
    """Write the file of trusted folders."""
    file = trust_file()
    if file is None:
        raise FrameworkError(
            "trusted folders cannot be stored: neither XDG_STATE_HOME nor HOME is an absolute path"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{file.parent} cannot be created: {error.strerror}") from error
    write_file(file.parent, file.name, json.dumps({"folders": folders}, indent=2) + "\n")


# the plugins of a folder


def named_plugins(folder: Path) -> list[Named]:
    """Return the plugins that the config files of a folder name; nothing is imported."""
    found = []
    for config in (folder / "conf", folder):  # a project's; one for --config-dir
        if not has_config(config):
            continue
        for file in [config / "config.yaml", *sorted((config / "experiment").glob("*.yaml"))]:
            found += [Named(file, locate(plugin, config, folder)) for plugin in plugins_in(file)]
    return found


def has_config(folder: Path) -> bool:
    """Return whether a folder has config files."""
    return (folder / "config.yaml").is_file() or (folder / "experiment").is_dir()


def plugins_in(file: Path) -> list[str]:
    """Return the list `plugins` of a config file; [] if the file is missing or unreadable."""
    try:
        if not file.is_file() or file.stat().st_size > MOST_CONFIG_BYTES:
            return []
        content = parse_yaml(file.read_bytes(), file)
    except (OSError, RunError):
        return []
    plugins = content.get("plugins") if isinstance(content, dict) else None
    if not isinstance(plugins, list):
        return []
    return [plugin for plugin in plugins if isinstance(plugin, str)]


def description(folder: Path) -> list[str]:
    """Return lines for the question whether to trust a folder: its plugins, and warnings."""
    lines = []
    for file, plugin in named_plugins(folder):
        form = form_of(folder / expanded(plugin))
        name = escaped_path(shorter(plugin))
        lines.append(f"{escaped_path(shorter(file))} names the plugin {name} ({form})")
    if not lines:
        lines.append("its config files name no plugins")
    status = folder.stat()
    if status.st_uid != os.geteuid():
        lines.append(f"warning: the folder belongs to another user (user id {status.st_uid})")
    if status.st_mode & stat.S_IWOTH:
        lines.append("warning: every user of this machine can write to the folder")
    return lines


def form_of(plugin: Path) -> str:
    """Return whether a plugin is a file, a folder with a number of files, or a module."""
    if plugin.is_dir():
        count = len(list(files_in(plugin)))
        return f"folder with {count} .py {'file' if count == 1 else 'files'}"
    return "file" if plugin.is_file() else "module"


def escaped_path(text: str) -> str:
    """Return a path; escaped if it contains control characters."""
    return text if text.isprintable() else ascii(text)


# modules in the working folder


@contextmanager
def importing_from_elsewhere(folder: str | Path, needed: Sequence[str] = ()) -> Iterator[list[str]]:
    """Remove the entries in a folder from `sys.path`, so that no module is imported from it.

    PYTHONPATH or `python -m` may add the working folder to `sys.path`. Entries that contain this
    package or an installed one stay.

    Args:
        needed: modules that the user has named; entries that contain one of them stay.

    Yields:
        The removed entries.
    """
    before = list(sys.path)
    left_out = entries_in(folder)
    for module in needed:
        left_out = [entry for entry in left_out if not holds(entry, module)]
    sys.path[:] = [entry for entry in before if entry not in left_out]
    try:
        yield left_out
    finally:
        if left_out:
            sys.path[:] = before


def entries_in(folder: str | Path) -> list[str]:
    """Return the entries of `sys.path` in a folder, except those of installed packages.

    Returns [] if the folder does not exist any more.
    """
    try:
        real = os.path.realpath(folder)
    except OSError:
        return []
    found = []
    installed = [sys.prefix, sys.base_prefix, *site.getsitepackages(), site.getusersitepackages()]
    for entry in sys.path:
        if not is_below(entry, [real]) or not os.path.exists(entry or "."):
            continue
        if not is_below(entry, installed) and os.path.realpath(entry) != FRAMEWORK:
            found.append(entry)
    editable = paths_of_installed() if found else []
    return [entry for entry in found if not is_below(entry, editable)]


def is_below(path: str, folders: Iterable[str]) -> bool:
    """Return whether a path is one of these folders or lies in one."""
    real = os.path.realpath(path)
    return any(Path(real).is_relative_to(os.path.realpath(folder)) for folder in folders)


def paths_of_installed() -> list[str]:
    """Return the folders of packages that are installed in editable mode."""
    found = []
    for folder in site.getsitepackages():
        for file in Path(folder).glob("*.pth"):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [line.strip() for line in lines if os.path.isabs(line.strip())]
    return found


def holds(entry: str, module: str) -> bool:
    """Return whether an entry of `sys.path` contains a module."""
    path = Path(entry, module.partition(".")[0])
    return path.is_dir() or path.with_name(f"{path.name}.py").is_file()
