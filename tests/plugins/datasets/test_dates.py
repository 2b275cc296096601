"""Columns of dates in a table become parts of dates and the elapsed time."""

from datetime import date, timedelta

import pytest
import torch

import framework as fw
from framework.errors import DataError, FrameworkError

fw.discover()
START = date(2023, 12, 20)
DAYS = 120


@pytest.fixture
def table(tmp_path):
    """A table of consecutive days, whose target is the weekday."""
    path = tmp_path / "days.csv"
    rows = [START + timedelta(days=day) for day in range(DAYS)]
    lines = [f"{day},{day.weekday()}" for day in rows]
    path.write_text("\n".join(["sold,target", *lines, ",3"]) + "\n")
    return path


def load(path, **settings):
    return fw.datasets.build("table", path=path, target="target", **settings)


def raw_parts(data):
    """Return the value of each part before it is standardized, over all rows; by its name."""
    parts = {}
    index = 0
    splits = (data.train, data.val, data.test)
    inputs = torch.cat([split.tensors[0] for split in splits if split is not None]).double()
    for column in data.column_facts:
        parts[column["part"]] = inputs[:, index] * column["std"] + column["mean"]
        index += 2 if column.get("missing") else 1
    assert index == inputs.shape[1]
    return parts


def test_a_date_becomes_the_parts_of_a_date(table):
    parts = raw_parts(load(table, dates=["sold"]))
    days = [date(1970, 1, 1) + timedelta(days=round(days.item())) for days in parts["elapsed"]]
    known = [day for day in days if START <= day < START + timedelta(days=DAYS)]
    assert len({*known}) >= DAYS - 1
    for row, day in enumerate(days):
        expected = {
            "year": day.year,
            "month": day.month,
            "week": day.isocalendar().week,
            "day": day.day,
            "weekday": day.weekday(),
            "day_of_year": day.timetuple().tm_yday,
            "is_month_start": day.day == 1,
            "is_month_end": (day + timedelta(days=1)).day == 1,
            "is_year_end": (day.month, day.day) == (12, 31),
            "is_year_start": (day.month, day.day) == (1, 1),
            "is_quarter_end": (day.month, day.day) in ((3, 31), (12, 31)),
            "is_quarter_start": (day.month, day.day) in ((1, 1), (4, 1)),
        }
        found = {name: parts[name][row].item() for name in expected}
        if abs(found["weekday"] - round(found["weekday"])) > 1e-3:
            continue  # the empty cell, which has the mean of each part
        expected = {name: float(value) for name, value in expected.items()}
        assert found == pytest.approx(expected, abs=1e-3), day


def test_the_time_of_day_is_used_if_there_is_one(tmp_path):
    path = tmp_path / "times.csv"
    hours = [f"2024-02-{1 + hour // 24:02}T{hour % 24:02}:30:00" for hour in range(96)]
    lines = [f"{time},{hour % 3}" for hour, time in enumerate(hours)]
    path.write_text("\n".join(["at,target", *lines]))
    parts = raw_parts(load(path, dates=["at"]))
    assert {round(hour, 3) for hour in parts["hour"].tolist()} == set(range(24))
    assert parts["minute"].tolist() == pytest.approx([30.0] * 96)


def test_a_new_file_gets_the_same_parts(table, tmp_path):
    data = load(table, dates=["sold"], val_fraction=0.0, test_fraction=0.0)
    read = type(data).read_inputs(table, data.facts())
    assert torch.equal(read, data.train.tensors[0])
    chunks = list(type(data).read_chunks(fw.InputFile(table, rows=7), data.facts()))
    assert torch.equal(torch.cat([chunk.inputs for chunk in chunks]), read)


def test_only_one_input_says_that_a_date_is_missing(table):
    data = load(table, dates=["sold"], val_fraction=0.0, test_fraction=0.0)
    marked = [column["part"] for column in data.column_facts if column.get("missing")]
    assert marked == ["elapsed"]


def test_many_dates_without_the_setting_are_an_error_that_names_it(table):
    with pytest.raises(FrameworkError, match=r"dates=\[sold\]"):
        load(table, max_categories=50)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["2024-01-01", "soon"], "row 2, column 'd': 'soon' is not a date such as 2024-01-31"),
        (["2024-01-01", "2024-01-01T10:00:00+01:00"], "some dates have a time zone"),
    ],
)
def test_a_cell_that_is_no_date_is_named(tmp_path, cells, message):
    path = tmp_path / "t.csv"
    path.write_text("d,target\n" + "".join(f"{cell},{row}\n" for row, cell in enumerate(cells)))
    with pytest.raises(DataError) as error:
        load(path, dates=["d"])
    assert message in str(error.value)


def test_the_target_cannot_be_a_date_feature(table):
    with pytest.raises(DataError, match="is the target or left out"):
        load(table, dates=["target"])
