"""What callbacks log: numbers by tag, checked while the line that logs them is still known."""

import sys
import warnings
from collections.abc import Collection, Mapping
from numbers import Complex, Real
from types import FrameType
from typing import Any

from torch import Tensor

from framework.contracts.callback import Callback
from framework.errors import SettingError, short
from framework.errors.user_code import owner_of, place_of


def checked_record(values: Any, taken: Collection[str]) -> dict[str, float | Tensor]:
    """Return values by tag, as floats or tensors with one number.

    Args:
        values: what a callback logs.
        taken: the tags of the trainer's own values; to replace one of them gives a warning.

    Raises SettingError, with the tag and the line, for a value that is no number and for a tag that
    is no text.
    """
    if not isinstance(values, Mapping):
        expected = "expected a dict of values by tag"
        raise SettingError(f"trainer.log: {expected}, got {what(values)}{by_whom()}")
    record: dict[str, float | Tensor] = {}
    for tag, value in values.items():
        if not isinstance(tag, str) or not tag:
            raise SettingError(f"trainer.log: expected a text as tag, got {tag!r}{by_whom()}")
        if tag in taken:
            said = "it replaces the value that the trainer itself logs by this tag"
            warnings.warn(f"trainer.log({tag!r}): {said}{by_whom()}", stacklevel=3)
        number = as_number(value)
        if number is None:
            said = f"expected a number or a tensor with one number, got {what(value)}"
            raise SettingError(f"trainer.log({tag!r}): {said}{by_whom()}")
        record[tag] = number
    return record


def as_number(value: Any) -> float | Tensor | None:
    """Return a value as a float, a tensor as it is (nothing is read), or None for anything else."""
    if isinstance(value, Tensor):
        return value.detach() if value.numel() == 1 and not value.is_complex() else None
    if isinstance(value, str | bytes):
        return None
    if isinstance(value, Complex) and not isinstance(value, Real):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def what(value: Any) -> str:
    """Return what a value is, for a message."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, str | bool | int | float | complex):
        return short(value)
    return f"a value of type {type(value).__name__}"


def by_whom() -> str:
    """Return the line that logs, as " (mine.py:15 in on_step_end of the callback Mine)", or ""."""
    frame: FrameType | None = sys._getframe(1)
    place = None
    while frame is not None:
        if place is None and owner_of(frame) == "user":
            place = place_of(frame, frame.f_lineno)
        caller = frame.f_locals.get("self")
        if isinstance(caller, Callback):
            owner = f"the callback {type(caller).__name__}"
            return f" (by {owner})" if place is None else f" ({place} of {owner})"
        frame = frame.f_back
    return "" if place is None else f" ({place})"
