"""`framework data convert`: tables and folders of files become Arrow files."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import framework as fw
from framework.cli.main import main
from framework.data import convert as module
from framework.data.convert import convert
from framework.errors import DataError

ROWS = 300


def read(path):
    """Return all rows of an Arrow file; its buffers are not compressed."""
    with pa.memory_map(str(path)) as source:
        before = pa.total_allocated_bytes()
        table = pa.ipc.open_file(source).read_all()
        assert pa.total_allocated_bytes() == before
        return pa.table(table.to_pydict(), table.schema)


@pytest.fixture
def small_parts(monkeypatch):
    """Read and write in small parts, as a large input is."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(module, "BATCH_BYTES", 2000)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("packed", [False, True])
def test_the_types_of_csv_columns_fit_all_rows(tmp_path, packed):
    lines = ["whole;late;text;gap"]
    for row in range(ROWS):
        late = row if row < 200 else row + 0.5
        text = row if row < 290 else f'"a;b\n{row}"'
        lines.append(f"{row};{late};{text};{'NA' if row == 250 else row}")
    content = "\n".join(lines).encode()
    path = tmp_path / ("t.csv.gz" if packed else "t.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    out = tmp_path / "t.arrow"
    assert convert(path, out) == {str(out): ROWS}
    table = read(out)
    assert [str(kind) for kind in table.schema.types] == ["int64", "double", "string", "int64"]
    assert table["whole"].to_pylist() == list(range(ROWS))
    assert table["late"][250].as_py() == 250.5
    assert table["text"][299].as_py() == "a;b\n299"
    assert table["gap"].null_count == 1
    with pa.memory_map(str(out)) as source:
        assert pa.ipc.open_file(source).num_record_batches > 3


@pytest.mark.usefixtures("small_parts")
def test_json_lines_are_converted(tmp_path):
    rows = []
    for row in range(ROWS):
        number = row if row < 200 else row + 0.5
        rows.append({"x": [number, 1], "label": "ab"[row % 2]} | ({"late": 1} if row > 250 else {}))
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    convert(path, tmp_path / "t.arrow")
    table = read(tmp_path / "t.arrow")
    assert table["x"][250].as_py() == [250.5, 1.0]
    assert table["label"].to_pylist() == [row["label"] for row in rows]
    assert table["late"].null_count == 251


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", ["parquet", "compressed", "stream"])
def test_parquet_and_arrow_files_are_written_again_without_compression(tmp_path, kind):
    x = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 4)
    label = pa.array(["cat", "dog", "cat"] * (ROWS // 3)).dictionary_encode()
    table = pa.table({"x": lists, "label": label})
    path = tmp_path / f"t.{'parquet' if kind == 'parquet' else 'feather'}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "compressed":
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(str(path), table.schema, options=options) as writer:
            writer.write_table(table)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    convert(path, tmp_path / "out.arrow")
    data = fw.datasets.build(
        "arrow", path=tmp_path / "out.arrow", normalize=False, val_fraction=0.0, test_fraction=0.0
    )
    assert data.classes == ["cat", "dog"]
    order = np.arange(ROWS)[::-1].copy()
    inputs, _ = data.train.gather(torch.from_numpy(order))
    np.testing.assert_array_equal(inputs.numpy(), x[order])


def folder_of(root, kind, classes=("cat", "dog"), count=3):
    """Write files, which need not be valid: their bytes are copied."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.{kind}").write_bytes(f"{name} {number}".encode())
    return root


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("suffix", "column"), [("png", "image"), ("wav", "audio")])
def test_a_folder_of_classes_becomes_a_column_of_bytes(tmp_path, suffix, column):
    folder_of(tmp_path / "in", suffix)
    (tmp_path / "in/cat/notes.md").write_text("not copied")
    convert(tmp_path / "in", tmp_path / "out.arrow")
    table = read(tmp_path / "out.arrow")
    assert table["label"].to_pylist() == [0, 0, 0, 1, 1, 1]
    assert table[column][4].as_py() == {"bytes": b"dog 1", "path": f"1.{suffix}"}
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features[column] == {"_type": column.capitalize()}
    assert features["label"] == {"names": ["cat", "dog"], "_type": "ClassLabel"}


def test_a_folder_with_parts_becomes_a_folder(tmp_path):
    folder_of(tmp_path / "in/train", "txt", count=8)
    folder_of(tmp_path / "in/valid", "txt", classes=["dog"], count=2)
    out = tmp_path / "out"
    rows = convert(tmp_path / "in", out)
    assert rows == {str(out / "train.arrow"): 16, str(out / "val.arrow"): 2}
    data = fw.datasets.build("arrow", path=out, max_length=4)
    assert data.classes == ["cat", "dog"]
    assert (len(data.val), data.val.labels.tolist()) == (2, [1, 1])
    with pytest.raises(DataError, match="exists already"):
        convert(tmp_path / "in", out)
    convert(tmp_path / "in", out, overwrite=True)
    (out / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="folder with other files"):
        convert(tmp_path / "in", out, overwrite=True)
    folder_of(tmp_path / "in/test", "txt", classes=["cow"])
    with pytest.raises(DataError, match="cow: no such class"):
        convert(tmp_path / "in", tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_existing_output_is_kept_without_overwrite(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    out = tmp_path / "t.arrow"
    out.write_text("mine")
    with pytest.raises(DataError, match="--overwrite replaces it"):
        convert(path, out)
    assert out.read_text() == "mine"
    convert(path, out, overwrite=True)
    assert read(out)["b"].to_pylist() == [2]
    with pytest.raises(DataError, match="is the input"):
        convert(path, path, overwrite=True)


BAD = {
    "empty.csv": b"",
    "header.csv": b"a,b\n",
    "twice.csv": b"a,a\n1,2\n",
    "short.csv": b"a,b\n1,2\n3\n",
    "latin.csv": "a,b\n1,é\n".encode("latin-1"),
    "bad.jsonl": b'{"a": 1}\n{"a": \n',
    "mixed.jsonl": b'{"a": 1}\n' * 3 + b'{"a": {"b": 1}}\n',
    "bad.parquet": b"PAR1 no",
    "bad.arrow": b"ARROW1\0\0 no",
    "cut.csv.gz": gzip.compress(b"a,b\n1,2\n" * 1000)[:30],
    "t.xlsx": b"x",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_line_and_leaves_no_file(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(SystemExit) as ended:
        main(["data", "convert", str(tmp_path / name), str(tmp_path / "out.arrow")])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.count("\n") == 1
    assert name in printed.err
    assert os.listdir(tmp_path) == [name]


def test_a_folder_without_classes_or_with_mixed_files_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="has no folders"):
        convert(tmp_path / "in", tmp_path / "out")
    folder_of(tmp_path / "in", "md")
    with pytest.raises(DataError, match="has no files with the suffixes"):
        convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/cat/a.png").write_bytes(b"x")
    (tmp_path / "in/dog/a.wav").write_bytes(b"x")
    with pytest.raises(DataError, match="several kinds: audio, image"):
        convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="inside of the input"):
        convert(tmp_path / "in", tmp_path / "in/out")


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DataError, match="cannot be written: No space left"):
        convert(path, tmp_path / "out.arrow")
    assert os.listdir(tmp_path) == ["t.csv"]


def test_ctrl_c_leaves_no_file(tmp_path):
    path = tmp_path / "t.csv"
    with open(path, "w", encoding="utf-8") as file:
        file.write("a,b,c\n")
        file.writelines("1,2.5,some text of a row\n" * 10_000 for _ in range(200))
    command = [sys.executable, "-m", "framework", "data", "convert", "t.csv", "out.arrow"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(os.listdir(tmp_path)) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert os.listdir(tmp_path) == ["t.csv"]
