"""Durations and values of a config as text, for all commands."""

import json
from typing import Any

from framework.errors import short
from framework.errors.terminal import printable


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, such as 8.2 s, 12.5 min or 3.1 h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"


def small_duration(seconds: float) -> str:
    """Return a duration also in microseconds or milliseconds."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else duration(seconds)


def value_text(value: Any, most: int) -> str:
    """Return a value of a config or a JSON file in one line of at most `most` characters."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return printable(short(value, most, quote=False))
