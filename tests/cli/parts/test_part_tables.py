"""The output of `list` and `show`, as tables of any width and as JSON."""

import io
import json
import math
from importlib.metadata import version

import pytest
import torch
from rich.console import Console

from framework import Activation, NonNegativeFloat, PositiveFloat, Rate
from framework.cli.parts.tables import find_part, kind_of, list_kinds, part_page, parts_table
from framework.composition.catalogue import read_index
from framework.errors import SettingError, UnknownName
from framework.registry.registry import Kind, Registry
from framework.runtime.display.console import console


class Sgdx:
    """Walk downhill, with a tail of the past (Robbins & Monro 1951). More follows.

    And more.

    Args:
        lr: how far, see `the paper <https://example.org>`__ and :math:`x`.
        betas: two rates.
        limit: a bound.
    """

    def __init__(
        self,
        params,
        lr: PositiveFloat,
        betas: tuple[Rate, Rate] = (0.9, 0.999),
        limit: NonNegativeFloat = math.inf,
    ): ...


@pytest.fixture
def shop(monkeypatch):
    """Return an index of two optimizers and a callback."""
    monkeypatch.setattr(Registry, "every", {})
    optimizer = Registry(Kind("optimizer", ("params",), ("params",), doc="the update rule"))
    callback = Registry(Kind("callback", many=True, doc="listens"))
    optimizer.register("sgdx", Sgdx, aliases=["sx"])
    optimizer.register("adam", torch.optim.Adam)
    callback.register(
        "adam", lambda every="1epoch", activation="relu": None, types={"activation": Activation}
    )
    return read_index()


def text(renderable, width=80) -> str:
    """Return a table as text."""
    output = io.StringIO()
    Console(file=output, width=width).print(renderable)
    return output.getvalue()


def test_a_part_is_found_by_name_alias_or_kind_and_name(shop):
    assert find_part(shop, "sgdx") == find_part(shop, "sx") == find_part(shop, "optimizer/sx")
    assert find_part(shop, "sgdx")["kind"] == "optimizer"
    assert find_part(shop, "sgdx")["name"] == "sgdx"
    assert find_part(shop, "callbacks/adam") == find_part(shop, "callback/adam")
    assert kind_of(shop, "optimizers") == "optimizer"


def test_a_part_of_several_kinds_is_ambiguous(shop):
    with pytest.raises(SettingError, match=r"'adam' .*optimizer/adam .*callback/adam"):
        find_part(shop, "adam")


@pytest.mark.parametrize(
    ("target", "suggestion"),
    [
        ("sgdd", "'sgdx'"),
        ("optimiser/adam", "'optimizer'"),
        ("optimizer/adm", "'adam'"),
        ("callback/sgdx", "'sgdx' is an optimizer"),
    ],
)
def test_an_unknown_part_is_an_error_with_a_suggestion(shop, target, suggestion):
    with pytest.raises(UnknownName, match=f"there is no .*{suggestion}"):
        find_part(shop, target)


def test_a_part_in_plain_types_can_be_written_as_json(shop):
    part = json.loads(json.dumps(find_part(shop, "sgdx"), allow_nan=False))
    lr, betas, limit = part.pop("settings")
    assert lr["required"]
    assert "default" not in lr
    assert lr["range"] == "(0, inf)"
    assert lr["doc"].startswith("how far")
    assert betas["default"] == [0.9, 0.999]
    assert betas["type"] == "[float in [0, 1), float in [0, 1)]"
    assert limit["default"] == "inf"
    assert part["source"].startswith(__file__)
    assert part["aliases"] == ["sx"]
    assert part["package"] is None
    assert part["summary"] == "Walk downhill, with a tail of the past (Robbins & Monro 1951)"
    activation = find_part(shop, "callback/adam")["settings"][1]
    assert activation["part"] == "activation"
    assert activation["default"] == "relu"


def test_the_source_of_a_class_of_torch_is_torch(shop):
    part = find_part(shop, "optimizer/adam")
    assert part["module"] == "torch.optim.adam"
    assert "torch/optim/adam.py:" in part["source"]
    assert part["package"] == "torch"
    assert part["version"] == version("torch")
    assert part["registered"].startswith(__file__)


def test_the_page_of_a_part_has_its_settings_source_and_an_example(shop):
    page = part_page(find_part(shop, "sgdx"))
    shown = text(page)
    assert shown.startswith("optimizer/sgdx  also sx\n")
    assert "how far, see the paper and x" in text(page, 200), "without reStructuredText"
    assert "[0.9,0.999]" in shown
    assert "required" in shown
    assert "test_part_tables.py:" in shown
    assert "framework train optimizer=sgdx optimizer.lr=..." in " ".join(shown.split())
    page = part_page(find_part(shop, "callback/adam"))
    assert "framework train +callbacks=adam callbacks.adam.every=1epoch" in text(page, 200)


def test_tables_list_the_kinds_and_the_parts_of_a_kind(shop):
    kinds = [line.split(maxsplit=2) for line in text(list_kinds(shop)).splitlines()[1:]]
    assert [kind[:2] for kind in kinds] == [["optimizer", "2"], ["callbacks", "1"]]
    lines = text(parts_table(shop, "optimizer")).splitlines()
    assert [line.split()[0] for line in lines] == ["optimizer", "adam", "sgdx"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_tables_of_all_parts_fit_the_width(width):
    index = read_index()
    for kind, about in index.kinds.items():
        pages = [parts_table(index, kind)]
        if width == 80:
            pages += map(part_page, about["parts"].values())
        for page in pages:
            assert max(map(len, text(page, width).splitlines())) <= width


def test_a_pipe_gets_no_colours_and_no_wrapped_lines():
    output = io.StringIO()
    console(output).print(parts_table(read_index(), "optimizer"))
    rows = output.getvalue().splitlines()
    assert "\x1b" not in output.getvalue()
    assert len(rows) == 1 + len(Registry.every["optimizer"])
