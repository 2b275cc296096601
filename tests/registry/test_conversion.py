"""Values of a config or a command line are converted to the annotated types of settings."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

import framework as fw
from framework import Pattern, Range, SettingError
from framework.registry.conversion import convert

Word = Annotated[str, Pattern(r"[a-z]+", "a word")]


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (1e3, int, 1000),
        (1, float, 1.0),
        (math.inf, float, math.inf),
        (True, bool, True),
        ("a", str, "a"),
        (7, str, "7"),
        ("a/b", Path, Path("a/b")),
        (None, int | None, None),
        (2, int | float, 2),
        (2.0, int | float, 2.0),
        (2, str | float, 2.0),
        ("2", float | str, "2"),
        (0.5, Literal["none"] | float, 0.5),
        ("none", Literal["none"] | float, "none"),
        (16, Literal["16", "bf16"], "16"),
        (2, Literal["2", 2], 2),
        (8, int | list[int], 8),
        ((8, 9), int | list[int], [8, 9]),
        ([1, 2], tuple[float, float], (1.0, 2.0)),
        ([1, 2, 3], tuple[int, ...], (1, 2, 3)),
        ([1, 2], Sequence[float], [1.0, 2.0]),
        ([1, "x"], list, [1, "x"]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ([0.5, 1], list[fw.Fraction], [0.5, 1.0]),
        (None, Annotated[float | None, Range("[0, 1]")], None),
        ("abc", Word, "abc"),
        (object, Any, object),
    ],
)
def test_a_value_becomes_the_annotated_type(value, annotation, expected):
    converted = convert(value, annotation)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("fast", float, "expected float, got 'fast'"),
        (1.5, int, "expected int, got 1.5"),
        (math.inf, int, "expected int, got inf"),
        (True, int, "expected int, got True"),
        (1, bool, "expected bool, got 1"),
        (None, int, "expected int, got None"),
        (1.5, str, "expected str, got 1.5"),
        (0, fw.PositiveInt, "expected int in [1, inf), got 0"),
        (1.0, fw.Rate, "expected float in [0, 1), got 1.0"),
        (math.nan, fw.PositiveFloat, "expected float in (0, inf), got nan"),
        ("x", fw.PositiveFloat | None, "expected float in (0, inf) or null, got 'x'"),
        ("median", Literal["mean", "sum"], "expected one of mean, sum, got 'median'"),
        (True, Literal[1, 2], "expected one of 1, 2, got True"),
        ([1], tuple[float, float], "expected [float, float], got [1]"),
        ([1, "x"], list[int], "expected list of int, got [1, 'x']"),
        ("ab", list[str], "expected list of str, got 'ab'"),
        ([1], dict[str, int], "expected dict of int, got [1]"),
        ({"a": "b"}, dict[str, int], "expected dict of int, got {'a': 'b'}"),
        ("A1", Word, "expected a word, got 'A1'"),
        (
            -1,
            fw.PositiveInt | list[fw.PositiveInt],
            "expected int in [1, inf) or list of int in [1, inf), got -1",
        ),
    ],
)
def test_the_error_of_a_wrong_value_states_the_expected_type(value, annotation, message):
    with pytest.raises(SettingError) as raised:
        convert(value, annotation)
    assert str(raised.value) == message
