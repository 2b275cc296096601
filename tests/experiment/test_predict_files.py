"""Files are predicted in chunks, and their rows are named; runs are evaluated on other data."""

import io
import json

import numpy as np
import pytest
import torch

import framework as fw
from framework.data.input_rows import find_input_files, regrouped
from framework.errors import DataError
from framework.experiment.trained.load import chunk_reader
from framework_plugins.datasets.array_data import ArrayData
from framework_plugins.datasets.readers import tables

TRAIN = "trainer.max_steps=30 loggers=[json_lines] run.name=r"


def write_table(path, start, stop, header=True):
    lines = ["id,a,b,y,kind"] if header else []
    for row in range(start, stop):
        a = row % 7 - 3
        lines.append(f'k{row},{a},"x, {row % 2}",{2 * a + row % 2},{"high" if a > 0 else "low"}')
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def trained(command, tmp_path):
    """A run that classifies the rows of a table, in the working folder."""
    write_table(tmp_path / "t.csv", 0, 200)
    data = "data=table data.path=t.csv data.target=kind 'data.ignore=[id,y]'"
    status, _, err = command(f"train {data} {TRAIN}")
    assert status == 0, err
    return "runs/default/r"


def predicted(command, line):
    status, out, err = command(line)
    assert status == 0, err
    return [row.split(",") for row in out.splitlines()]


def test_rows_have_numbers_ids_and_files(command, trained, tmp_path):
    (tmp_path / "days").mkdir()
    write_table(tmp_path / "days" / "1.csv", 0, 3)
    write_table(tmp_path / "days" / "2.csv", 3, 5)
    rows = predicted(command, f"predict {trained} --input t.csv --output -")
    assert rows[0][:3] == ["row", "class", "class_index"]
    assert [row[0] for row in rows[1:]] == [str(row) for row in range(1, 201)]
    expected = [row[1:3] for row in rows[1:6]]
    several = [["days/1.csv", str(row)] for row in (1, 2, 3)]
    several += [["days/2.csv", str(row)] for row in (1, 2)]
    for files in ("days", "'days/*.csv'", "days/1.csv days/2.csv"):
        rows = predicted(command, f"predict {trained} --input {files} --output -")
        assert rows[0][:2] == ["file", "row"]
        assert [row[:2] for row in rows[1:]] == several
        assert [row[2:4] for row in rows[1:]] == expected
    rows = predicted(command, f"predict {trained} --input ./days/1.csv --output -")
    assert rows[0][:2] == ["row", "class"]
    rows = predicted(command, f"predict {trained} --input days/2.csv --id id --output -")
    assert [row[0] for row in rows] == ["id", "k3", "k4"]


def test_standard_input_is_predicted(command, trained, tmp_path, monkeypatch):
    expected = predicted(command, f"predict {trained} --input t.csv --output -")
    stream = io.TextIOWrapper(io.BytesIO((tmp_path / "t.csv").read_bytes()))
    monkeypatch.setattr("sys.stdin", stream)
    assert predicted(command, f"predict {trained} --input - --output -") == expected


@pytest.mark.parametrize("weight", ["null", "balanced"])
def test_other_data_need_the_data_of_training_for_balanced_weights_only(
    weight, command, trained, tmp_path
):
    status, _, err = command(f"rerun {trained} task.loss.weight={weight} run.name=w")
    assert status == 0, err
    write_table(tmp_path / "new.csv", 0, 50)
    line = "eval runs/default/w --data new.csv --json"
    expected = command(line)[1]
    assert "data/accuracy" in json.loads(expected)["metrics"]
    (tmp_path / "t.csv").unlink()
    status, out, err = command(line)
    if weight == "null":
        assert (status, out) == (0, expected)
    else:
        assert status == 2
        assert "t.csv: no such file" in err


def test_a_run_is_evaluated_on_other_data(command, trained, tmp_path):
    write_table(tmp_path / "new.csv", 0, 50)
    status, out, err = command(f"eval {trained} --data new.csv --json")
    assert status == 0, err
    values = json.loads(out)["metrics"]
    rows = predicted(command, f"predict {trained} --input new.csv --output -")
    truth = ["high" if row % 7 - 3 > 0 else "low" for row in range(50)]
    right = [row[1] == label for row, label in zip(rows[1:], truth, strict=True)]
    assert values["data/accuracy"] == pytest.approx(np.mean(right))
    text = (tmp_path / "new.csv").read_text()
    (tmp_path / "odd.csv").write_text(text.replace("high", "other"))
    for line, message in [
        ("--data odd.csv", "'other' is no class of the run; expected one of high, low"),
        ("--data no.csv", "--data no.csv: no such file"),
        ("--data new.csv --split val", "give --split or --data, not both"),
    ]:
        status, _, err = command(f"eval {trained} {line}")
        assert status == 2
        assert message in err
        assert err.count("\n") == 1


def test_errors_of_the_input_name_file_and_row(command, trained, tmp_path):
    write_table(tmp_path / "bad.csv", 0, 5)
    with (tmp_path / "bad.csv").open("a") as file:
        file.write('k9,many,"x, 1",1,high\n')
    for line, message in [
        ("--input bad.csv", "bad.csv, row 6, column 'a': 'many' is not a number"),
        ("--input 'no/*.csv'", "--input no/*.csv: no file has such a name"),
        ("--input t.csv --id nobody", "t.csv has no column 'nobody'"),
        ("--input - -", "expected - (standard input) at most once"),
    ]:
        status, _, err = command(f"predict {trained} {line} --output -")
        assert status == 2
        assert message in err
        assert err.count("\n") == 1


def test_the_rows_of_a_table_are_the_same_in_chunks(tmp_path, monkeypatch):
    """Blocks end within quoted cells with line ends, and the last row has no line end."""
    rows = [f'{row},"text {row}\n""{row}""",{row / 3}' for row in range(500)]
    path = tmp_path / "t.csv"
    path.write_bytes("\r\n".join(['n,"long\nname",x', *rows]).encode("utf-8-sig"))
    whole = tables.read_table(path)
    monkeypatch.setattr(tables, "CHUNK_BYTES", 100)
    chunks = list(tables.read_table_chunks(path, 10, list(whole)))
    assert len(chunks) > 50
    assert list(whole) == ["n", "long\nname", "x"]
    for label, cells in whole.items():
        joined = [cell for chunk in chunks for cell in chunk[label].to_pylist()]
        assert joined == cells.to_pylist()


def test_an_error_in_a_later_chunk_names_its_line(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "1,2\n" * 100 + "1,2,3\n")
    monkeypatch.setattr(tables, "CHUNK_BYTES", 50)
    with pytest.raises(DataError, match="line 102: 3 cells, but 2 columns"):
        list(tables.read_table_chunks(path, 10, ["a"]))


def test_a_plugin_that_overrides_only_read_inputs_is_used():
    class Own(fw.Data):
        @classmethod
        def read_chunks(cls, file, facts):
            raise AssertionError

    class Special(Own):
        @classmethod
        def read_inputs(cls, path, facts):
            return torch.ones(2, 3)

    (rows,) = chunk_reader(Special)(fw.InputFile("x"), {})
    assert rows.inputs.shape == (2, 3)


def test_chunks_are_regrouped_without_a_change_of_order():
    chunks = []
    first = 0
    for size in (5, 1, 7, 3):
        chunks.append(fw.InputRows(torch.arange(first, first + size)[:, None], first=first + 1))
        first += size
    groups = list(regrouped(chunks, 4))
    sizes = [sum(map(len, group)) for group in groups]
    assert sizes == [4, 4, 4, 4]
    values = [value for group in groups for chunk in group for value in chunk.inputs.flatten()]
    assert [int(value) for value in values] == list(range(16))
    firsts = [chunk.first for group in groups for chunk in group]
    assert firsts == [int(chunk.inputs[0]) + 1 for group in groups for chunk in group]


def test_a_folder_is_searched_for_the_suffixes_of_the_data(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/1.CSV", "a.csv", ".hidden.csv", "a.txt"):
        (tmp_path / name).write_text("x")
    found = find_input_files([str(tmp_path)], [".csv"])
    assert [str(file.relative_to(tmp_path)) for file in found] == ["a.csv", "b/1.CSV"]
    assert find_input_files([str(tmp_path)], []) == [tmp_path]
    with pytest.raises(DataError, match="expected files with a suffix of"):
        find_input_files([str(tmp_path)], [".png"])


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_rows_of_an_array_are_the_same_in_chunks(tmp_path, order):
    array = np.arange(70, dtype="<i4").reshape(10, 7, order=order)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array)
    facts = {"in_shape": [7], "mean": 3.0, "std": 2.0}
    expected = torch.from_numpy((array - 3.0) / 2.0).float()
    for name, count in (("x.npy", 4 if order == "C" else 1), ("x.npz", 1)):
        chunks = list(ArrayData.read_chunks(fw.InputFile(tmp_path / name, rows=3), facts))
        assert len(chunks) == count
        assert [chunk.first for chunk in chunks] == [1, 4, 7, 10][:count]
        assert torch.equal(torch.cat([chunk.inputs for chunk in chunks]), expected)
