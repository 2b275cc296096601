"""Settings are read from the signature of a part."""

from collections.abc import Callable

import pytest
from torch import nn

import framework as fw
from framework import ContractError
from framework.registry.schema import read_settings


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


def test_an_annotation_with_an_unknown_name_is_an_error():
    def part(x: "Missing" = 1): ...  # noqa: F821

    with pytest.raises(
        ContractError, match=r"annotations of .*part cannot be read: name 'Missing'"
    ):
        read_settings(part)


def test_a_setting_can_name_a_part_or_a_list_of_parts():
    def part(
        activation: fw.Activation = "relu",
        blocks: list[fw.Block] = (),
        norm: fw.Norm | None = None,
        width=1,
    ): ...

    settings = read_settings(part)
    assert [s.part for s in settings.values()] == ["activation", "block", "norm", None]
    assert [s.many for s in settings.values()] == [False, True, False, False]
