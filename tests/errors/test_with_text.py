"""An error with another text keeps its class and its attributes."""

import pytest
import torch
from torch import nn

from framework import SettingError, activations
from framework.errors import ConfigError, DataError, FrameworkError
from framework.runtime.memory import OutOfMemory
from framework.runtime.shapes import build_chain


class Numbered(FrameworkError):
    def __init__(self, number, place):
        self.number = number
        super().__init__(f"{place} {number}")


def test_class_and_attributes_are_kept():
    error = Numbered(7, place="row").with_text("data.csv: row 7")
    assert (type(error), str(error), error.number) == (Numbered, "data.csv: row 7", 7)


@pytest.mark.parametrize("cls", [DataError, SettingError, OutOfMemory])
def test_the_text_is_replaced(cls):
    error = cls("no").with_text("a: no")
    assert (type(error), str(error)) == (cls, "a: no")


def test_the_problems_of_a_config_are_the_lines_of_the_text():
    error = ConfigError(["a=1: no"]).with_text("model: a=1: no")
    assert error.problems == ["model: a=1: no"]


def test_a_config_error_of_a_setting_names_the_part(monkeypatch):
    entry = activations.get("elu")

    def refuse(self, value):
        raise ConfigError(["one", "two"])

    monkeypatch.setattr(type(entry.settings["alpha"]), "convert", refuse)
    with pytest.raises(ConfigError) as caught:
        entry.checked({"alpha": 1.0})
    assert caught.value.problems == [f"{entry}: alpha: one", "two"]


class Pair(nn.Module):
    def forward(self, x: torch.Tensor):
        return x, x


def test_a_block_that_returns_no_tensor_is_named_once():
    def pair(shape):
        return Pair()

    with pytest.raises(FrameworkError, match=r"^block 1 \(pair\) returns a tuple, not a tensor$"):
        build_chain([pair], (3,))
