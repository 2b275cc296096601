"""Ranges, the description of types, and the types that a config can hold."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import framework as fw
from framework import ContractError, Range
from framework.registry.annotations import describe_type, expressible


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", [0, 0.5], [-0.1, 1]),
        ("(0, inf)", [1e-300, 1e300], [0, math.inf]),
        ("[-1e3, 2.5]", [-1000, 2.5], [2.6]),
    ],
)
def test_an_interval_includes_its_ends_at_square_brackets(interval, inside, outside):
    assert all(number in Range(interval) for number in inside)
    assert not any(number in Range(interval) for number in outside)


@pytest.mark.parametrize("wrong", ["0..1", "[0 1]", "[0, 1", "[a, b]"])
def test_a_malformed_interval_is_refused(wrong):
    with pytest.raises(ContractError, match="is not an interval: expected one like"):
        Range(wrong)


def test_types_are_described_in_words():
    assert describe_type(fw.Activation) == "name of an activation"
    assert describe_type(list[fw.Block]) == "list of name of a block"
    assert describe_type(float | torch.Tensor | None) == "float or null"
    assert describe_type(Path) == "path"
    assert describe_type(Any) == "any"


@pytest.mark.parametrize(
    "annotation",
    [int, None, Any, list[int], dict[str, float], fw.Norm | None, float | torch.Tensor],
)
def test_types_that_a_config_can_hold(annotation):
    assert expressible(annotation)


@pytest.mark.parametrize(
    "annotation",
    [torch.Tensor, Callable, torch.Tensor | None, list[torch.Tensor], type],
)
def test_types_that_no_config_can_hold(annotation):
    assert not expressible(annotation)
