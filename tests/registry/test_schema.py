import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from torch import nn

import framework as fw
from framework.errors import ContractError, SettingError
from framework.registry.schema import (
    Pattern,
    Range,
    convert,
    describe_type,
    expressible,
    parameter_docs,
    read_settings,
)

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
    ("value", "annotation", "said"),
    [
        ("fast", float, "should be float, not 'fast'"),
        (1.5, int, "should be int, not 1.5"),
        (math.inf, int, "should be int, not inf"),
        (True, int, "should be int, not True"),
        (1, bool, "should be bool, not 1"),
        (None, int, "should be int, not None"),
        (1.5, str, "should be str, not 1.5"),
        (0, fw.PositiveInt, "should be int in [1, inf), not 0"),
        (1.0, fw.Rate, "should be float in [0, 1), not 1.0"),
        (math.nan, fw.PositiveFloat, "should be float in (0, inf), not nan"),
        ("x", fw.PositiveFloat | None, "should be float in (0, inf) or null, not 'x'"),
        ("median", Literal["mean", "sum"], "should be one of mean, sum, not 'median'"),
        (True, Literal[1, 2], "should be one of 1, 2, not True"),
        ([1], tuple[float, float], "should be [float, float], not [1]"),
        ([1, "x"], list[int], "should be list of int, not [1, 'x']"),
        ("ab", list[str], "should be list of str, not 'ab'"),
        ([1], dict[str, int], "should be dict of int, not [1]"),
        ({"a": "b"}, dict[str, int], "should be dict of int, not {'a': 'b'}"),
        ("A1", Word, "should be a word, not 'A1'"),
        (
            -1,
            fw.PositiveInt | list[fw.PositiveInt],
            "should be int in [1, inf) or list of int in [1, inf), not -1",
        ),
    ],
)
def test_a_wrong_value_is_told_what_would_be_right(value, annotation, said):
    with pytest.raises(SettingError) as raised:
        convert(value, annotation)
    assert str(raised.value) == said


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", [0, 0.5], [-0.1, 1]),
        ("(0, inf)", [1e-300, 1e300], [0, math.inf]),
        ("[-1e3, 2.5]", [-1000, 2.5], [2.6]),
    ],
)
def test_intervals_are_mathematical(interval, inside, outside):
    assert all(number in Range(interval) for number in inside)
    assert not any(number in Range(interval) for number in outside)


@pytest.mark.parametrize("wrong", ["0..1", "[0 1]", "[0, 1", "[a, b]"])
def test_a_malformed_interval_is_found_where_it_is_written(wrong):
    with pytest.raises(ContractError, match="is no interval; write it like"):
        Range(wrong)


def test_types_in_words():
    assert describe_type(fw.Activation) == "name of an activation"
    assert describe_type(list[fw.Block]) == "list of name of a block"
    assert describe_type(float | torch.Tensor | None) == "float or null"
    assert describe_type(Path) == "path"
    assert describe_type(Any) == "any"


def test_what_a_config_can_express():
    assert all(
        map(
            expressible,
            [int, None, Any, list[int], dict[str, float], fw.Norm | None, float | torch.Tensor],
        )
    )
    assert not any(
        map(expressible, [torch.Tensor, Callable, torch.Tensor | None, list[torch.Tensor], type])
    )


def test_settings_are_read_from_the_signature():
    def part(
        given,
        depth: fw.PositiveInt,
        rate=0.5,
        flag=False,
        limit: fw.PositiveFloat | None = None,
        hook: Callable = print,
        *rest,
        **more,
    ):
        """A part.

        Args:
            depth (int): number of layers. More text.
            rate: how fast,
                in samples a second. Default: 0.5
            flag (bool, optional):
                whether it waves (default: ``False``)
        """

    settings = read_settings(part, given=["given"])
    assert list(settings) == ["depth", "rate", "flag", "limit"]
    assert settings["depth"].required
    assert settings["rate"].type_text == "float"
    assert settings["rate"].doc == "how fast, in samples a second"
    assert settings["flag"].doc == "whether it waves"
    assert settings["depth"].doc == "number of layers"
    assert settings["limit"].type_text == "float in (0, inf) or null"
    assert settings["limit"].default is None


def test_a_required_parameter_must_be_expressible():
    def part(hook: type[nn.Module]): ...

    with pytest.raises(
        ContractError, match=r"parameter 'hook' of .*part has type .*Give it a default"
    ):
        read_settings(part)
    assert read_settings(part, hide=["hook"]) == {}
    assert read_settings(part, types={"hook": str})["hook"].annotation is str


def test_annotations_that_do_not_exist_are_reported():
    def part(x: "Missing" = 1): ...  # noqa: F821

    with pytest.raises(
        ContractError, match=r"annotations of .*part cannot be read: name 'Missing'"
    ):
        read_settings(part)


def test_docs_of_a_class_may_stand_in_the_class_its_init_or_its_parent():
    class Parent:
        """A parent.

        Args:
            width: of the parent.
        """

        def __init__(self, width=1): ...

    class Child(Parent):
        """A child."""

    class Other(Parent):
        """Another.

        Args:
            width: of the other.
        """

        def __init__(self, width=1, depth=2):
            """Make it.

            Args:
                depth: of the other.
            """

    assert parameter_docs(Child) == {"width": "of the parent"}
    assert parameter_docs(Other) == {"width": "of the other", "depth": "of the other"}


def test_torchs_own_docs_are_read():
    docs = parameter_docs(torch.optim.AdamW)
    assert docs["lr"] == "learning rate"
    assert docs["betas"].startswith("coefficients used for computing running averages")
    assert parameter_docs(nn.ELU)["alpha"] == "the alpha value for the ELU formulation"


def test_a_setting_knows_its_part():
    def part(
        activation: fw.Activation = "relu",
        blocks: list[fw.Block] = (),
        norm: fw.Norm | None = None,
        width=1,
    ): ...

    settings = read_settings(part)
    assert [s.part for s in settings.values()] == ["activation", "block", "norm", None]
    assert [s.many for s in settings.values()] == [False, True, False, False]
