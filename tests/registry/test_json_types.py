"""The JSON schema of a setting accepts the values that conversion accepts."""

from enum import Enum, Flag
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from framework.errors import SettingError
from framework.registry.annotations import Pattern, Range
from framework.registry.conversion import convert
from framework.registry.json_types import json_type, setting_type
from framework.registry.schema import Setting

Color = Enum("Color", "RED GREEN")
Mode = Flag("Mode", "READ WRITE")
TEXT = ["string", "integer"]
VALUES = [
    *[0, 1, 7, -3, 2.0, 0.5, 1e9, True, None, "", "a", "RED", "READ|WRITE", "16", 16],
    *[[], [1], [1, 2], [1.5, "a"], ["a"], {}, {"a": 1}, {"a": "b"}, [[1]]],
]
TYPES = [
    *[int, float, bool, str, Path, None, Any, list, dict, int | None, float | str],
    *[list[int], tuple[int, ...], tuple[int, str], dict[str, int], list[list[int]]],
    *[Literal["a", "16"], Literal[1, "b"], Color, Mode, list[int] | int | None],
    Annotated[int, Range("[1, inf)")],
    Annotated[float, Range("[0, 1)")],
    Annotated[float, Range("(0, 2]")] | None,
    Annotated[str, Pattern("[a-z]+", "letters")],
]


@pytest.mark.parametrize("annotation", TYPES, ids=str)
def test_schema_and_conversion_agree(annotation):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json_type(annotation))
    for value in VALUES:
        try:
            convert(value, annotation)
            accepted = True
        except SettingError:
            accepted = False
        if isinstance(value, int | float) and json_type(annotation).get("type") == TEXT:
            continue  # the pattern is not for numbers that are used as texts; 2.0 is an integer
        assert validator.is_valid(value) == accepted, value


def test_a_default_outside_the_range_is_accepted():
    setting = Setting("size", Annotated[int, Range("[1, inf)")], -1)
    assert setting_type(setting) == {"anyOf": [{"type": "integer", "minimum": 1}, {"const": -1}]}


def test_named_groups_and_flags_are_left_out():
    assert "pattern" not in json_type(Annotated[str, Pattern("(?i)a", "an a")])
