"""Defaults in configs of earlier versions, which wrote every default, objects as their text."""

import re
from collections.abc import Mapping
from typing import Any

from .plain_values import NotPlain, identical_values, is_default_factory, plain_value
from .schema import Setting, accepts


def means_default(value: Any, setting: Setting) -> bool:
    """Return whether a value in a config stands for a default that the config cannot hold.

    Args:
        value: as the config has it.
        setting: a setting whose default is not typeable.
    """
    if setting.required:
        return False
    if is_default_factory(setting.default):
        return value == str(setting.default) and not accepts(setting, value)
    try:
        return identical_values(value, plain_value(setting.default))
    except NotPlain:
        return False


def is_old_text(value: Any, setting: Setting) -> bool:
    """Return whether an earlier version wrote this value for a default that a config cannot hold.

    The run may have been trained with the default or with the text itself.
    """
    if setting.required:
        return False
    try:
        written = old_text(setting.default)
        if identical_values(written, plain_value(setting.default)):
            return False
    except NotPlain:
        pass
    except Exception:  # a __str__ that fails
        return False
    return without_address(repr(value)) == without_address(repr(written))


def old_text(default: Any) -> Any:
    """Return the form in which earlier versions wrote a default into a config."""
    if isinstance(default, list | tuple):
        return [old_text(item) for item in default]
    if isinstance(default, Mapping):
        return {str(key): old_text(item) for key, item in default.items()}
    return default if isinstance(default, int | float | str | None) else str(default)


def without_address(text: str) -> str:
    """Return the text of an object without its address in memory."""
    return re.sub(r"0x[0-9a-f]+", "0x", text)
