"""The CSV logger: columns that appear later, exact values, and a resumed run."""

import csv
import math

import pytest

import framework as fw


def opened(folder, step=0):
    logger = fw.loggers.build("csv")
    logger.open(folder, step, ["loss"])
    return logger


def log(logger, step, **values):
    tags = {f"train/{name}": value for name, value in values.items()}
    logger.scalars(tags, step=step, epoch=1, wall_seconds=0.25)


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_new_tag_adds_a_column_and_values_are_exact(tmp_path):
    logger = opened(tmp_path)
    log(logger, 10, loss=1 / 3)
    log(logger, 20, loss=math.nan, accuracy=0.1 + 0.2)
    logger.scalars({'odd,"tag"': math.inf}, step=30, epoch=2, wall_seconds=1.0)
    logger.close()
    log(logger, 40, loss=1.0)  # after close: nothing, and no error
    first, second, third = rows(tmp_path)
    assert float(first["train/loss"]) == 1 / 3
    assert first["train/accuracy"] == ""
    assert (first["step"], first["epoch"], first["wall_seconds"]) == ("10", "1", "0.250")
    assert math.isnan(float(second["train/loss"]))
    assert float(second["train/accuracy"]) == 0.1 + 0.2
    assert third['odd,"tag"'] == "inf"


def test_a_resumed_run_drops_the_rows_after_its_checkpoint_and_those_of_the_test(tmp_path):
    first = opened(tmp_path)
    for step in (10, 20, 30):
        log(first, step, loss=step)
    first.scalars({"test/loss": 1.0}, step=20, epoch=1, wall_seconds=1.0)
    first.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("15,1")  # of the write during which the process was killed
    second = opened(tmp_path, step=20)
    log(second, 30, loss=31, accuracy=1)
    second.close()
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [
        ("10", "10.0"),
        ("20", "20.0"),
        ("30", "31.0"),
    ]


def test_another_file_is_replaced_and_a_link_is_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("something else")
    logger = opened(tmp_path)
    log(logger, 10, loss=1)
    logger.close()
    assert [row["step"] for row in rows(tmp_path)] == ["10"]
    (tmp_path / "metrics.csv").rename(tmp_path / "other.csv")
    (tmp_path / "metrics.csv").symlink_to(tmp_path / "other.csv")
    with pytest.raises(fw.RunError, match="symbolic link"):
        opened(tmp_path)


def test_without_a_folder_it_warns():
    with pytest.warns(UserWarning, match="no folder"):
        opened(None).close()
