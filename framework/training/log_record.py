"""Checks the values that callbacks log, and names the line that logs an invalid one."""

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


def checked_record(values: Any, trainer_tags: Collection[str]) -> dict[str, float | Tensor]:
    """Return logged values by tag, as floats or tensors with one element.

    Args:
        values: the argument of `trainer.log`.
        trainer_tags: the tags of the trainer's own values, whose replacement gives a warning.

    Raises:
        SettingError: a value is not a number, or a tag is not a text. The message has the tag and
            the line.
    """
    if not isinstance(values, Mapping):
        raise SettingError(
            f"trainer.log: expected a dict of values by tag, got {describe_logged(values)}"
            f"{location()}"
        )
    record: dict[str, float | Tensor] = {}
    for tag, value in values.items():
        if not isinstance(tag, str) or not tag:
            raise SettingError(f"trainer.log: expected a text as tag, got {tag!r}{location()}")
        if tag in trainer_tags:
            warnings.warn(
                f"trainer.log({tag!r}): it replaces the value that the trainer itself logs with "
                f"this tag{location()}",
                stacklevel=3,
            )
        number = as_scalar(value)
        if number is None:
            raise SettingError(
                f"trainer.log({tag!r}): expected a number or a tensor with one number, got "
                f"{describe_logged(value)}{location()}"
            )
        record[tag] = number
    return record


def as_scalar(value: Any) -> float | Tensor | None:
    """Return a number as a float, and a tensor with one element without reading it, else None."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            return None
        return value.detach()
    if isinstance(value, str | bytes):
        return None
    if isinstance(value, Complex) and not isinstance(value, Real):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def describe_logged(value: Any) -> str:
    """Return a description of a value for a message."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, str | bool | int | float | complex):
        return short(value)
    return f"a value of type {type(value).__name__}"


def location() -> str:
    """Return the line that logs: " (mine.py:15 in on_step_end of the callback Mine)", or ""."""
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
