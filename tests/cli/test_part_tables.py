"""What `list` and `show` print, for people at any width and for programs."""

import io
import json
import math
from importlib.metadata import version

import pytest
import torch
from rich.console import Console

from framework import Activation, NonNegativeFloat, PositiveFloat, Rate
from framework.cli.part_tables import find_part, kind_of, list_kinds, part_page, parts_table
from framework.composition.catalogue import read_index
from framework.errors import SettingError, UnknownName
from framework.registry.registry import Kind, Registry
from framework.runtime.console import console


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
    output = io.StringIO()
    Console(file=output, width=width).print(renderable)
    return output.getvalue()


def test_find(shop):
    assert find_part(shop, "sgdx") == find_part(shop, "sx") == find_part(shop, "optimizer/sx")
    assert (find_part(shop, "sgdx")["kind"], find_part(shop, "sgdx")["name"]) == (
        "optimizer",
        "sgdx",
    )
    assert find_part(shop, "callbacks/adam") == find_part(shop, "callback/adam")
    assert kind_of(shop, "optimizers") == "optimizer"
    with pytest.raises(
        SettingError, match="'adam' is several parts: optimizer/adam, callback/adam"
    ):
        find_part(shop, "adam")
    with pytest.raises(UnknownName, match="no part 'sgdd'; did you mean 'sgdx'"):
        find_part(shop, "sgdd")
    with pytest.raises(UnknownName, match="no kind of part 'optimiser'; did you mean 'optimizer'"):
        find_part(shop, "optimiser/adam")
    with pytest.raises(UnknownName, match="no optimizer 'adm'; did you mean 'adam'"):
        find_part(shop, "optimizer/adm")
    with pytest.raises(UnknownName, match="no callback 'sgdx'; 'sgdx' is an optimizer"):
        find_part(shop, "callback/sgdx")


def test_a_part_in_plain_types_is_json(shop):
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


def test_a_class_of_torch_is_from_torch(shop):
    part = find_part(shop, "optimizer/adam")
    assert part["module"] == "torch.optim.adam"
    assert "torch/optim/adam.py:" in part["source"]
    assert part["package"] == "torch"
    assert part["version"] == version("torch")
    assert part["registered"].startswith(__file__)


def test_show(shop):
    shown = text(part_page(find_part(shop, "sgdx")))
    assert shown.startswith("optimizer/sgdx  also sx\n")
    assert "how far, see the paper and x" in text(
        part_page(find_part(shop, "sgdx")), 200
    )  # no marks of reStructuredText
    assert "[0.9,0.999]" in shown
    assert "required" in shown
    assert "test_part_tables.py:" in shown
    assert "framework train optimizer=sgdx optimizer.lr=..." in " ".join(shown.split())
    assert "framework train +callbacks=adam callbacks.adam.every=1epoch" in text(
        part_page(find_part(shop, "callback/adam")), 200
    )


def test_lists(shop):
    kinds = [line.split(maxsplit=2) for line in text(list_kinds(shop)).splitlines()[1:]]
    assert [kind[:2] for kind in kinds] == [["optimizer", "2"], ["callbacks", "1"]]
    assert [line.split()[0] for line in text(parts_table(shop, "optimizer")).splitlines()] == [
        "optimizer",
        "adam",
        "sgdx",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_real_part_fits_the_width(width):
    index = read_index()
    for kind, about in index.kinds.items():
        pages = [parts_table(index, kind), *map(part_page, about["parts"].values())][
            : None if width == 80 else 1
        ]
        for page in pages:
            assert max(map(len, text(page, width).splitlines())) <= width


def test_in_a_pipe_there_is_no_colour_and_nothing_is_wrapped():
    output = io.StringIO()
    console(output).print(parts_table(read_index(), "optimizer"))
    rows = output.getvalue().splitlines()
    assert "\x1b" not in output.getvalue()
    assert len(rows) == 1 + len(Registry.every["optimizer"])
