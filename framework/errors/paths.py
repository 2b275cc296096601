"""Paths with `~` as a user types them; paths and overrides in suggested commands."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

from . import SettingError
from .terminal import printable

INSTALLED = ("/site-packages/", "/dist-packages/")
"""Folders of installed packages."""


def expanded(path: str | Path) -> Path:
    """Return a path with a leading `~` or `~user` replaced by the home folder.

    An existing file or folder with a name that begins with `~` has priority.

    Raises:
        SettingError: the user does not exist.
    """
    text = os.path.expanduser(path)
    first = text.partition(os.sep)[0]
    if first.startswith("~") and not os.path.lexists(first):
        raise SettingError(f"{str(path)!r} names the home folder of an unknown user {first[1:]!r}")
    return Path(text)


def real_path(path: str | Path) -> Path:
    """Return the absolute path without links; unlike `Path.resolve`, it accepts circular links."""
    return Path(os.path.realpath(path))


def with_homes(value: Any) -> Any:
    """Return a value with `~` replaced in every path, also in copies of lists, tuples and dicts."""
    if isinstance(value, Path):
        return expanded(value)
    if type(value) in (list, tuple):
        return type(value)(with_homes(item) for item in value)
    if type(value) is dict:
        return {key: with_homes(item) for key, item in value.items()}
    return value


def shorter(path: str | Path) -> str:
    """Return a path below the working folder relative to it, any other path unchanged."""
    try:
        return str(real_path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def in_package(path: str | Path) -> str:
    """Return a path as `shorter` does; that of an installed package without the folders above."""
    shown = shorter(path)
    for folder in INSTALLED:
        shown = shown.rpartition(folder)[2]
    return shown


def pasted(path: str | Path) -> str:
    """Return a path as an argument of a shell command in the working folder."""
    text = str(path)
    if text.startswith("-"):
        text = f"./{text}"  # not an option
    return quoted(text)


def quoted(word: str) -> str:
    """Return a text as an argument of a shell command.

    Characters that must not reach the terminal, and bytes that are not UTF-8, are written as in
    $'\\x1b' (bash, zsh).
    """
    if printable(word) == word and not re.search(r"[\udc80-\udcff]", word):
        return shlex.quote(word)
    escaped = ""
    for character in word:
        if character in "\\'":
            escaped += f"\\{character}"
        elif character.isprintable():
            escaped += character
        else:
            escaped += "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
    return f"$'{escaped}'"


def override(key: str, value: bool | int | float | str | list[str]) -> str:
    """Return an override for a shell command, such as data.path=x.csv or ignore=[name]."""
    if isinstance(value, list):
        return quoted_override(f"{key}=[{','.join(map(typed, value))}]")
    return quoted_override(f"{key}={typed(value)}")


def quoted_override(text: str) -> str:
    """Return an override as an argument of a shell command; brackets of a list are not quoted."""
    return text if re.fullmatch(r"[\w.+~=/:,\[\]-]+", text) else quoted(text)


def typed(value: bool | int | float | str) -> str:
    """Return a value as it is typed after the = of an override."""
    if isinstance(value, bool):
        return repr(value).lower()
    if not isinstance(value, str):
        return repr(value)
    if re.fullmatch(r"[\w./][\w./:+-]*", value) and not is_other_type(value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def is_other_type(text: str) -> bool:
    """Return whether a text without quotes would be read as a number, a truth value or null."""
    if text.lower() in ("null", "true", "false"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
