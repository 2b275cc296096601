"""Plain values: the numbers, texts, lists and dicts in which a config holds settings."""

from enum import Enum
from pathlib import PurePath
from reprlib import Repr
from typing import Any

MOST_LEVELS = 50  # levels of lists and dicts in a default


class NotPlain(Exception):
    """A config cannot hold a value, or one of its items."""


def plain_value(value: Any, depth: int = 0) -> Any:
    """Return a value as a config holds it.

    A tuple becomes a list, a path a text, a member of an enumeration its name.

    Raises:
        NotPlain: the value, or one of its items, is any other object.
    """
    if depth > MOST_LEVELS:
        raise NotPlain
    if isinstance(value, Enum):
        return plain_value(value.name, depth)
    if isinstance(value, PurePath):
        return str(value)
    if type(value) is str:
        check_encodable(value)
        return value
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) in (list, tuple):
        return [plain_value(item, depth + 1) for item in value]
    if type(value) is dict:
        return {plain_key(key): plain_value(item, depth + 1) for key, item in value.items()}
    raise NotPlain


def plain_key(key: Any) -> Any:
    """Return the key of a dict as a config holds it.

    Raises:
        NotPlain: the key is of another type than a text, a number or a truth value.
    """
    if isinstance(key, Enum):
        return plain_key(key.name)
    if type(key) not in (str, int, float, bool):
        raise NotPlain
    return key


def check_encodable(text: str) -> None:
    """Raise NotPlain for a text that UTF-8 cannot encode: it contains half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotPlain from None


def is_builtin(value: Any, depth: int = 0) -> bool:
    """Return whether a value consists of Python's own plain types only, without subclasses."""
    if depth > MOST_LEVELS:
        return False
    if type(value) in (list, tuple):
        return all(is_builtin(item, depth + 1) for item in value)
    if type(value) is dict:
        items = [*value.keys(), *value.values()]
        return all(is_builtin(item, depth + 1) for item in items)
    return value is None or type(value) in (bool, int, float, str)


def identical_values(one: Any, other: Any) -> bool:
    """Return whether two plain values are equal in value and type, also NaN and signed zeros."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return identical_values(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(identical_values, one, other))
    if isinstance(one, float):
        return repr(one) == repr(other)
    return bool(one == other)


def restore_tuples(value: Any, like: Any) -> Any:
    """Return a value in which a list is a tuple wherever it is one in `like`.

    Items beyond the end of `like` are restored like its last item.
    """
    if isinstance(value, dict) and type(like) is dict:
        return {key: restore_tuples(item, like.get(key)) for key, item in value.items()}
    if not isinstance(value, list | tuple) or type(like) not in (list, tuple):
        return value
    items = []
    for number, item in enumerate(value):
        template = like[min(number, len(like) - 1)] if like else None
        items.append(restore_tuples(item, template))
    is_tuple = isinstance(value, tuple) or type(like) is tuple
    return tuple(items) if is_tuple else items


DEFAULT_REPR = Repr()
DEFAULT_REPR.maxlevel = 2
DEFAULT_REPR.maxstring = 40
DEFAULT_REPR.maxother = 60


def readable(default: Any) -> str:
    """Return a default for display: a function by its name, other objects without an address."""
    if is_default_factory(default):
        return "a new object each time"
    if isinstance(default, Enum):
        return str(default)
    name = getattr(default, "__name__", None)
    if callable(default) and isinstance(name, str):
        module = getattr(default, "__module__", None)
        return f"{module}.{name}" if module and module != "builtins" else name
    try:
        text = " ".join(DEFAULT_REPR.repr(default).split())
    except Exception:  # its own __repr__ may fail
        return type(default).__name__
    if text.startswith("<") or " at 0x" in text:
        return type(default).__name__
    return text


def is_default_factory(default: Any) -> bool:
    """Return whether a default stands for the `default_factory` of a dataclass field."""
    return type(default).__module__ == "dataclasses"
