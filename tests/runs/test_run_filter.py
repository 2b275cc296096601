"""The expressions of `framework runs --where`."""

import pytest

from framework.errors import SettingError
from framework.runs.overview.run_filter import parse_filter

RUN = {
    "optimizer": "adamw",
    "optimizer.lr": 0.001,
    "val/accuracy": 0.93,
    "val/f1-score": float("nan"),
    "image": True,
    "norm": "null",
    "momentum": None,
    "tags": ["baseline", "good"],
    "name": "default/my run",
    "started": "2026-12-01 09:30:00",
    "seed": 1,
}


def matches(text, run=RUN):
    return parse_filter(text, lambda name, place: name)(run.get)


@pytest.mark.parametrize(
    "text",
    [
        "optimizer=adamw",
        "optimizer==adamw",
        "optimizer != sgd",
        "optimizer.lr=1e-3 and val/accuracy>0.9",
        "val/accuracy>=0.93 and val/accuracy<=0.93",
        "seed=1 and seed=1.0",
        "image=true and norm=null",
        "tags=good and tags~BASE",
        "name~'my run'",
        'name="default/my run"',
        "started>2026-11-30 and started<2026-12-02",
        "optimizer=sgd or seed=1 and image=true",
        "not (optimizer=sgd or seed=2)",
        "NOT optimizer=sgd AND seed<2",
        "momentum!=0.9",
        "not momentum=0.9",
        "seed<1 or seed<=1",
        "optimizer=ada* and optimizer!=*x and tags=go* and optimizer.lr=*",
    ],
)
def test_matching_expressions(text):
    assert matches(text)


@pytest.mark.parametrize(
    "text",
    [
        "optimizer=adam",
        "optimizer.lr='0.001'",
        "momentum=0.9",
        "momentum<0.9 or momentum>=0.9",
        "val/f1-score>0 or val/f1-score<=0 or val/f1-score=0",
        "optimizer=adamw and seed=2",
        "(optimizer=adamw or seed=2) and seed=2",
        "not optimizer=adamw or seed=2",
        "seed=abc or seed<abc",
        "image<1",
        "tags=bas",
        "optimizer='ada*'",
        "momentum=*",
        "optimizer=*[a-z]",
    ],
)
def test_expressions_that_do_not_match(text):
    assert not matches(text)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 1),
        ("optimizer", 10),
        ("optimizer=", 11),
        ("optimizer=adamw seed=1", 17),
        ("(optimizer=adamw", 17),
        ("optimizer=adamw)", 16),
        ("optimizer=adamw and", 20),
        ("optimizer='adamw", 11),
        ("=adamw", 1),
        ("and", 1),
        ("seed (1)", 6),
        ("not " * 60 + "seed=1", 201),
    ],
)
def test_errors_name_the_position(text, position):
    with pytest.raises(SettingError, match=f"position {position}: expected"):
        matches(text)


def test_an_unknown_column_is_reported_with_its_position():
    def resolve(name, place):
        raise SettingError(f"{place}: there is no column {name}")

    with pytest.raises(SettingError, match="position 4: there is no column lr"):
        parse_filter("   lr=1", resolve)
