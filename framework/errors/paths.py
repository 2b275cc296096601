"""Paths as a user types them, and paths and values as suggested commands show them."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

from . import SettingError
from .terminal import printable


def expanded(path: str | Path) -> Path:
    """Return a path with a leading `~` or `~user` replaced by that home folder.

    A file or folder of the working folder whose name begins with `~` stays as it is.

    Raises SettingError when there is no such user.
    """
    text = os.path.expanduser(path)
    first = text.partition(os.sep)[0]
    if first.startswith("~") and not os.path.lexists(first):
        raise SettingError(f"{str(path)!r} names the home folder of an unknown user {first[1:]!r}")
    return Path(text)


def real_path(path: str | Path) -> Path:
    """Return the absolute path that links lead to; unlike `Path.resolve`, also if they lead in a circle."""
    return Path(os.path.realpath(path))


def with_homes(value: Any) -> Any:
    """Return a value in which every path has its `~` replaced, also in lists, tuples and dicts, which are copied."""
    if isinstance(value, Path):
        return expanded(value)
    if type(value) in (list, tuple):
        return type(value)(with_homes(item) for item in value)
    if type(value) is dict:
        return {key: with_homes(item) for key, item in value.items()}
    return value


def shorter(path: str | Path) -> str:
    """Return a path relative to the working folder if it is below it."""
    try:
        return str(real_path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def pasted(path: str | Path) -> str:
    """Return a path as a word of a shell command that works in the working folder."""
    text = str(path)
    if text.startswith("-"):
        text = f"./{text}"  # otherwise it would be read as an option
    return quoted(text)


def quoted(word: str) -> str:
    """Return a word of a shell command.

    Characters that must not reach the terminal, and bytes that are no UTF-8, are written as in $'\\x1b' (bash, zsh).
    """
    if printable(word) == word and not re.search(r"[\udc80-\udcff]", word):
        return shlex.quote(word)
    coded = ""
    for character in word:
        if character in "\\'":
            coded += f"\\{character}"
        elif character.isprintable():
            coded += character
        else:
            coded += "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
    return f"$'{coded}'"


def override(key: str, value: bool | int | float | str | list[str]) -> str:
    """Return an override as a word of a shell command, such as data.path=x.csv or ignore=[name]."""
    if isinstance(value, list):
        return quoted_override(f"{key}=[{','.join(map(typed, value))}]")
    return quoted_override(f"{key}={typed(value)}")


def quoted_override(text: str) -> str:
    """Return an override as a word of a shell command. The brackets of a list need no quotes."""
    return text if re.fullmatch(r"[\w.+~=/:,\[\]-]+", text) else quoted(text)


def typed(value: bool | int | float | str) -> str:
    """Return a value as it is typed after the = of an override."""
    if not isinstance(value, str):
        return repr(value).lower() if isinstance(value, bool) else repr(value)
    if re.fullmatch(r"[\w./][\w./:+-]*", value) and not is_other_type(value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def is_other_type(text: str) -> bool:
    """Whether a text without quotes would be read as a number, a truth value or null."""
    if text.lower() in ("null", "true", "false"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
