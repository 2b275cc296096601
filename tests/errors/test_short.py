"""Values in messages are short, and show plain values as Python writes them."""

import enum
from pathlib import Path

import pytest
import torch

from framework import did_you_mean, short
from framework.errors import nearest, with_article


class Mode(enum.Enum):
    SOFT = 1


class Unnamed:
    __name__ = 3


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("fast", "'fast'"),
        (0.5, "0.5"),
        (True, "True"),
        (None, "None"),
        (1j, "1j"),
        ([1, "a"], "[1, 'a']"),
        ((1, 2), "(1, 2)"),
        ({"a": [1]}, "{'a': [1]}"),
        (torch.Size([2, 3]), "(2, 3)"),
        (Path("a"), repr(Path("a"))),
        (Mode.SOFT, "Mode.SOFT"),
        (torch.relu, "relu"),
        (Mode, "Mode"),
        (torch.ones(3), "a Tensor"),
        ([torch.ones(3), max], "[a Tensor, max]"),
        (object(), "an object"),
        (Unnamed(), "an Unnamed"),
    ],
)
def test_a_value_is_shown_in_a_message(value, text):
    assert short(value) == text


def test_a_long_value_is_shortened():
    assert short("x" * 1000) == "'" + "x" * 27 + "..." + "x" * 28 + "'"
    assert short("x" * 1000, most=9, quote=False) == "xxx...xxx"
    assert len(short(list(range(10**6)))) == 60
    assert len(short([[[["x" * 1000] * 1000] * 1000] * 1000] * 1000)) == 60


def test_a_text_without_quotes_is_shown_as_typed():
    assert short("fast", quote=False) == "fast"
    assert short(["fast"], quote=False) == "['fast']"


def test_the_suggestion_is_the_most_similar_name_or_a_list():
    assert nearest("LeakyReLU", ["leaky_relu", "relu"]) == "leaky_relu"
    assert did_you_mean("adm", ["adam", "sgd"]) == "did you mean 'adam'?"
    assert did_you_mean("x", ["adam", "sgd"]) == "available: adam, sgd"
    assert did_you_mean("x", ["adam", "sgd"], most=1) == "available: adam, ..."
    assert did_you_mean("x", []) == "none is available"
    assert [with_article("optimizer"), with_article("loss")] == ["an optimizer", "a loss"]
