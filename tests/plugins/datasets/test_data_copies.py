"""A data set can be pickled and copied, and a copy shares nothing with the original."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_images import draw
from test_offsets import INPUTS, SOURCES, VALUES
from torch import Tensor

import framework as fw
from framework.data.dataset import Data
from voices import small_voices

SMALL = {
    "digits": {},
    "blobs": {"samples": 60},
    "spirals": {"samples": 60},
    "friedman1": {"samples": 60},
    "iris": {},
    "diabetes": {},
    "seasonal": {"weeks": 2, "lookback": 4, "horizon": 2},
}
"""Settings of data sets that need no file."""


def source_in_files(source: Callable) -> Callable[[Path], Data]:
    return lambda folder: source(folder, INPUTS, VALUES)


def source_without_files(name: str) -> Callable[[Path], Data]:
    return lambda folder: fw.datasets.build(name, **SMALL[name])


def text_table(folder: Path) -> Data:
    lines = ["text,label", *(f"word{row} common,{'ab'[row % 2]}" for row in range(30))]
    (folder / "d.csv").write_text("\n".join(lines))
    return fw.datasets.build(
        "text_table", path=folder / "d.csv", tokenizer={"name": "word", "min_count": 1}
    )


def image_folder(folder: Path) -> Data:
    draw(folder / "cat", 10)
    draw(folder / "dog", 10)
    return fw.datasets.build("image_folder", path=folder, size=4)


def asterisk(folder: Path) -> Data:
    small_voices(folder)
    return fw.datasets.build("asterisk", path=folder, seconds=0.1, val_fraction=0.25)


BUILDERS = {name: source_in_files(source) for name, source in SOURCES.items()}
BUILDERS |= {name: source_without_files(name) for name in SMALL}
BUILDERS |= {build.__name__: build for build in (text_table, image_folder, asterisk)}


def contents(data: Data) -> dict[str, Any]:
    """Return all samples, their row numbers, and the facts and scale, as plain values."""
    found: dict[str, Any] = {"facts": copy.deepcopy(data.facts()), "scale": data.scale}
    for part in ("train", "val", "test"):
        split = getattr(data, part)
        found[part] = [as_lists(split[row]) for row in range(len(split))]
        found[f"rows of {part}"] = data.rows[part].tolist()
    return found


def as_lists(sample: tuple[Tensor, ...]) -> list[Any]:
    return [tensor.tolist() for tensor in sample]


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_copy_is_equal_and_its_refit_does_not_change_the_original(build, tmp_path):
    data = build(tmp_path)
    before = contents(data)
    known = data.rows["train"]
    half = len(known) // 2
    rows = {**data.rows, "train": known[:half], "val": known[half:]}
    refitted = []
    for copied in (pickle.loads(pickle.dumps(data)), copy.deepcopy(data)):
        assert contents(copied) == before
        copied.refit(rows)
        assert copied.rows["train"].tolist() == rows["train"].tolist()
        assert len(copied.train) < len(data.train)
        refitted.append(contents(copied))
    assert contents(data) == before
    data.refit(rows)
    for found in refitted:
        assert found == contents(data)
