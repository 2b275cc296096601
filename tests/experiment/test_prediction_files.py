"""Predictions are written chunk by chunk, in several formats."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from framework.errors import FrameworkError
from framework.experiment.trained.prediction_columns import Form
from framework.experiment.trained.prediction_files import (
    choose_format,
    csv_pieces,
    write_predictions,
)

CLASSES = ["cat", "dog, big"]
FORM = Form(CLASSES)
CHUNKS = [
    (
        {"row": [1, 2]},
        {
            "class": ["dog, big", "cat"],
            "class_index": torch.tensor([1, 0]),
            "probabilities": torch.tensor([[0.1, 0.9], [0.5, 0.5]]),
        },
    ),
    (
        {"row": [3]},
        {
            "class": ["dog, big"],
            "class_index": torch.tensor([1]),
            "probabilities": torch.tensor([[0.0, 1.0]]),
        },
    ),
]
HEADER = 'row,class,class_index,probabilities:cat,"probabilities:dog, big"'


def written(folder, name, chunks=CHUNKS, form=FORM, chosen=None):
    """Write predictions and return the file."""
    path = folder / name
    rows = write_predictions(chunks, form, f"{folder}/{name}", chosen)
    assert rows == sum(len(next(iter(values.values()))) for _, values in chunks)
    return path


def test_csv_has_the_digits_of_float32(tmp_path):
    text = written(tmp_path, "y.csv").read_text()
    rows = [HEADER, '1,"dog, big",1,0.1,0.9', "2,cat,0,0.5,0.5", '3,"dog, big",1,0.0,1.0']
    assert text.splitlines() == rows


def test_float64_keeps_its_digits_where_float32_does_not_suffice(tmp_path):
    chunks = [({}, {"value": torch.tensor([1e9 + 0.25], dtype=torch.float64)})]
    near = written(tmp_path, "near.csv", chunks, Form())
    far = written(tmp_path, "far.csv", chunks, Form(is_float32=False))
    assert near.read_text() == "value\n1000000000.0\n"
    assert far.read_text() == "value\n1000000000.25\n"


def test_json_lines(tmp_path):
    lines = written(tmp_path, "y.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[0]) == {
        "row": 1,
        "class": "dog, big",
        "class_index": 1,
        "probabilities:cat": 0.1,
        "probabilities:dog, big": 0.9,
    }


def test_parquet_keeps_the_types(tmp_path):
    table = pyarrow.parquet.read_table(written(tmp_path, "y.parquet"))
    types = [str(kind) for kind in table.schema.types]
    assert types == ["int64", "string", "int64", "float", "float"]
    assert table["class"].to_pylist() == ["dog, big", "cat", "dog, big"]


def test_npy_has_the_probabilities(tmp_path):
    array = np.load(written(tmp_path, "y.npy"), allow_pickle=False)
    assert array.dtype == np.float32
    assert array.tolist() == np.float32([[0.1, 0.9], [0.5, 0.5], [0.0, 1.0]]).tolist()


def test_npz_has_the_columns(tmp_path):
    with np.load(written(tmp_path, "y.npz"), allow_pickle=False) as archive:
        assert archive["class"].tolist() == ["dog, big", "cat", "dog, big"]
        assert archive["row"].tolist() == [1, 2, 3]


def test_images_are_written_as_png(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    images = torch.zeros(2, 3, 4, 5)
    images[0, 0] = 1.0
    chunks = [({"file": ["a/cat.jpg", "b.png"]}, {"reconstruction": images})]
    folder = written(tmp_path, "y/", chunks, Form(to_pixels=lambda images: images))
    assert sorted(file.name for file in folder.iterdir()) == ["000001-cat.png", "000002-b.png"]
    pixels = np.asarray(pil.open(folder / "000001-cat.png"))
    assert pixels.shape == (4, 5, 3)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    with pytest.raises(FrameworkError, match="expected a new or empty folder"):
        written(tmp_path, "y/", chunks)


def test_predictions_that_are_no_images_are_refused(tmp_path):
    with pytest.raises(FrameworkError, match="are not images"):
        written(tmp_path, "y/")
    assert not list(tmp_path.iterdir())


def test_predictions_may_have_any_type(tmp_path):
    columns = {
        "z": torch.tensor([1 + 2j]),
        "yes": torch.tensor([True]),
        "id": torch.tensor([2**53 + 1]),
        "text": ["a"],
        "lists": [[1]],
    }
    chunks = [({}, columns)]
    for suffix in ("csv", "jsonl", "npz", "parquet"):
        written(tmp_path, f"y.{suffix}", chunks)
    assert (tmp_path / "y.csv").read_text().splitlines()[1] == f"(1+2j),True,{2**53 + 1},a,1"
    row = json.loads((tmp_path / "y.jsonl").read_text())
    assert row["z"] == "(1+2j)"
    assert row["id"] == 2**53 + 1


def test_names_and_texts_of_the_terminal_are_escaped():
    chunks = [({"file": ["\x1b[2J"]}, {"value": torch.tensor([1.0])})]
    text = b"".join(csv_pieces(chunks, Form(), repr)).decode()
    assert "\x1b" not in text


def test_a_column_of_the_file_cannot_have_the_name_of_a_prediction(tmp_path):
    with pytest.raises(FrameworkError, match="--id class: the predictions have a column"):
        written(tmp_path, "y.csv", [({"class": ["a", "b"]}, CHUNKS[0][1])])


def test_an_error_of_the_input_leaves_the_file_as_it_was(tmp_path):
    def broken():
        yield CHUNKS[0]
        raise FrameworkError("row 3")

    for suffix in ("csv", "jsonl", "npz", "npy", "parquet"):
        path = tmp_path / f"y.{suffix}"
        path.write_text("before")
        with pytest.raises(FrameworkError, match="row 3"):
            write_predictions(broken(), FORM, str(path))
        assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    ("output", "chosen", "message"),
    [
        ("y.txt", None, "--output y.txt: expected a .csv, .jsonl, .parquet, .npy, .npz file"),
        ("y", None, "--output y: expected"),
        ("no/y.csv", None, "--output no/y.csv: no folder no"),
        ("folder.csv", None, "--output folder.csv: expected a file"),
        ("-", "npy", "--format npy: expected csv or jsonl"),
    ],
)
def test_an_invalid_output_is_refused(tmp_path, monkeypatch, output, chosen, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(FrameworkError) as error:
        choose_format(output, chosen)
    assert message in str(error.value)


def test_an_output_that_cannot_be_written_is_an_error():
    with pytest.raises(FrameworkError, match=r"--output /proc/y\.csv"):
        write_predictions(CHUNKS, FORM, "/proc/y.csv")


def test_the_output_may_be_a_pipe(tmp_path):
    assert write_predictions(CHUNKS, FORM, "/dev/null", "csv") == 3
    assert Path("/dev/null").exists()
