"""Durations in settings: `90s | 30min | 1.5h`."""

import re
from typing import Annotated

from framework.errors import SettingError
from framework.registry.annotations import Pattern

from .state import SECONDS

DURATION = r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|h)\s*"
FORM = "a duration like 90s, 30min or 1.5h"
Duration = Annotated[str, Pattern(DURATION, FORM)]


def duration_seconds(duration: str) -> float:
    """Return the seconds of a duration.

    Raises:
        SettingError: the text is not a duration.
    """
    match = re.fullmatch(DURATION, duration)
    if match is None:
        raise SettingError(f"expected {FORM}, got {duration!r}")
    return float(match[1]) * SECONDS[match[2]]
