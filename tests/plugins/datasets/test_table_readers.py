import csv
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

import framework as fw
from framework.errors import DataError
from framework_plugins.datasets.readers.columns import as_texts
from framework_plugins.datasets.readers.tables import read_table

PETS = """name,weight,colour,age,kind
Rex,30.5,brown,4,dog
Tom,4,black,,cat
Kim,5,white,2,cat
Bo,28,brown,9,dog
Mia,3.5,,1,cat
Ace,35,black,NA,dog
Lu,4.5,white,7,cat
Max,26,brown,3,dog
"""


@pytest.fixture
def pets(tmp_path):
    path = tmp_path / "pets.csv"
    path.write_text(PETS)
    return path


def load_all(path, target="kind", **settings):
    """Load the table with all rows in train, in the order of the file."""
    return fw.datasets.build(
        "table", path=path, target=target, val_fraction=0.0, test_fraction=0.0, **settings
    )


def check_refused(path, message, target="kind", **settings):
    with pytest.raises(DataError, match=message):
        load_all(path, target, **settings)


def test_columns_become_inputs(pets):
    data = load_all(pets, ignore=["name"], mark_missing=False)
    x, y = data.train.tensors
    weight = np.array([30.5, 4, 5, 28, 3.5, 35, 4.5, 26])
    age = np.array([4, np.nan, 2, 9, 1, np.nan, 7, 3])
    age_filled = np.nan_to_num(age, nan=np.nanmean(age))
    np.testing.assert_allclose(x[:, 0], (weight - weight.mean()) / weight.std(), rtol=1e-6)
    np.testing.assert_allclose(
        x[:, 4], (age_filled - np.nanmean(age)) / np.nanstd(age), rtol=1e-5, atol=1e-6
    )
    black_brown_white = [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert x[:5, 1:4].tolist() == black_brown_white
    assert data.in_shape == (5,)
    assert data.classes == ["cat", "dog"]
    assert y.tolist() == [1, 0, 0, 1, 0, 1, 0, 1]


def test_features_can_be_chosen_and_codes_be_texts(pets):
    data = load_all(pets, features=["age"], categorical=["age"], mark_missing=False)
    assert data.facts()["columns"] == [{"name": "age", "texts": ["1", "2", "3", "4", "7", "9"]}]
    raw = load_all(pets, features=["weight"], normalize=False)
    assert raw.train.tensors[0][:2].tolist() == [[30.5], [4.0]]


@pytest.mark.parametrize(
    ("cells", "settings", "kind", "classes"),
    [
        (["a", "b", "a"], {}, "class", ["a", "b"]),
        (["10", "2", "10"], {}, "class", ["2", "10"]),
        (["1", "2", "2b"], {"target_kind": "class"}, "class", ["1", "2", "2b"]),
        (["1.5", "2", "10"], {}, "value", []),
        (["1", "2", "3"], {"target_kind": "value"}, "value", []),
        ([str(i) for i in range(30)], {}, "value", []),
    ],
)
def test_the_kind_of_target_is_inferred_or_given(tmp_path, cells, settings, kind, classes):
    (tmp_path / "t.csv").write_text(
        "x,y\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells))
    )
    data = load_all(tmp_path / "t.csv", "y", **settings)
    assert (data.target, data.classes) == (kind, classes)
    if kind == "value":
        expected = torch.tensor([float(cell) for cell in cells], dtype=torch.float64)
        found = data.scale.inverse_transform(data.train.tensors[1][:, 0])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_means_and_texts_are_those_of_the_training_split(tmp_path):
    rows = [f"{i},{'rare' if i == 0 else 'common'},{i % 2}" for i in range(100)]
    path = tmp_path / "t.csv"
    for seed in range(100):  # until the one rare row is not in train
        path.write_text("\n".join(["number,text,y", *rows]))
        data = fw.datasets.build("table", path=path, target="y", split_seed=seed)
        if len(data.facts()["columns"][1]["texts"]) == 1:
            break
    assert data.facts()["columns"][1]["texts"] == ["common"]
    np.testing.assert_allclose(data.train.tensors[0][:, 0].mean(), 0, atol=1e-6)
    held_out = torch.cat([data.val.tensors[0], data.test.tensors[0]])
    assert (held_out[:, 1] == 0).sum() == 1  # the text that training never saw
    assert (len(data.train), len(data.val), len(data.test)) == (70, 15, 15)


def test_an_official_test_file_is_kept(pets, tmp_path):
    (tmp_path / "test.csv").write_text("kind,age,weight,colour\nbird,1,0.5,green\ncat,2,5,black\n")
    data = fw.datasets.build(
        "table", path=pets, target="kind", ignore=["name"], test_path=tmp_path / "test.csv"
    )
    assert data.classes == ["bird", "cat", "dog"]
    assert data.test.tensors[1].tolist() == [0, 1]
    width = data.test.tensors[0].shape[1]
    age = 2 if data.column_facts[-1].get("missing") else 1
    assert data.test.tensors[0][0, 1 : width - age].sum() == 0  # green, which training never saw
    assert len(data.train) + len(data.val) == 8


def test_rows_to_predict_need_only_the_feature_columns(pets, tmp_path):
    data = load_all(pets, ignore=["name"])
    facts = json.loads(json.dumps(data.facts()))
    assert torch.equal(type(data).read_inputs(pets, facts), data.train.tensors[0])
    file = tmp_path / "new.csv"
    file.write_text("other,age,colour,weight\nx,4,brown,30.5\ny,4,pink,30.5\n")
    read = type(data).read_inputs(file, facts)
    assert torch.equal(read[0], data.train.tensors[0][0])
    assert read[1, 1:4].tolist() == [0, 0, 0]
    file.write_text("age,color,weight\n1,2,3\n")
    with pytest.raises(DataError, match=r"has no column 'colour'; did you mean 'color'\?"):
        type(data).read_inputs(file, facts)
    file.write_text("age,colour,weight\n1,red,3\n2,red,heavy\n")
    with pytest.raises(
        DataError, match=r"new\.csv, row 2, column 'weight': 'heavy' is not a number; correct it$"
    ):
        type(data).read_inputs(file, facts)


def test_parquet_gzip_and_other_delimiters_read_the_same(pets, tmp_path):
    expected = load_all(pets, ignore=["name"]).train.tensors[0]
    with gzip.open(tmp_path / "pets.csv.gz", "wt") as file:
        file.write(PETS)
    (tmp_path / "semicolon.csv").write_text(
        "\ufeff" + PETS.replace(",", ";") + "\n", encoding="utf-8"
    )
    (tmp_path / "tabs.tsv").write_text(PETS.replace(",", "\t"))
    columns = [line.split(",") for line in PETS.splitlines()]
    table = {label: cells for label, *cells in zip(*columns, strict=True)}
    table["weight"] = [float(cell) for cell in table["weight"]]
    table["age"] = [None if cell in ("", "NA") else int(cell) for cell in table["age"]]
    table["colour"] = pyarrow.array([cell or None for cell in table["colour"]]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "pets.parquet")
    for name in ("pets.csv.gz", "semicolon.csv", "tabs.tsv", "pets.parquet"):
        assert torch.equal(load_all(tmp_path / name, ignore=["name"]).train.tensors[0], expected), (
            name
        )


def test_parquet_knows_its_types(tmp_path):
    table = {
        "flag": [True, False, True],
        "day": np.array(["2020-01-01"] * 3, "datetime64[D]"),
        "y": [1.0, 2.0, 3.0],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    assert load_all(tmp_path / "t.parquet", "y").target == "value"
    assert load_all(tmp_path / "t.parquet", "flag", ignore=["day"]).classes == ["False", "True"]
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:200])
    check_refused(tmp_path / "broken.parquet", "broken.parquet is not a readable Parquet file")


def test_unknown_columns_are_refused(pets, tmp_path):
    check_refused(pets, "has no column 'knd'; did you mean 'kind'?", "knd")
    check_refused(pets, "has no column 'wieght'; did you mean 'weight'?", features=["wieght"])
    check_refused(pets, "has no column 'nme'", ignore=["nme"])
    check_refused(
        pets, "'kind' is the target and cannot be a feature too", features=["kind", "age"]
    )
    check_refused(tmp_path / "none.csv", "no such file")
    check_refused(pets, "column 'name' has 8 different texts.*max_categories=7", max_categories=7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; the first line must name the columns"),
        ("x,kind\n", "has no rows"),
        ("1,2\n3,4\n", "must name the columns, got numbers: 1, 2"),
        ("x,x,kind\n1,2,a\n", "two columns are called 'x'"),
        ("x,kind\n1,a\n2,b,c\n", "line 3: 3 cells, but 2 columns"),
        (
            "x,kind\n1,a\n2,b\nthree,a\n4,b\n",
            r"row 3, column 'x': 'three' is not a number.*categorical=\[x\]",
        ),
        ("x,kind\n1,a\ninf,b\n3,a\n", "row 2, column 'x': 'inf' is not a number"),
        ("x,kind\n1,a\n2,\n", "row 2: the target 'kind' is empty"),
        (
            "x,kind\n1,1\n2,2\n3,x\n",
            "row 3, column 'kind': 'x' is not a number.*target_kind=class",
        ),
        ("x,kind\n1,a\n2,a\n", "column 'kind': every target is 'a'"),
        ("x,kind\n,a\n,b\n", "column 'x' is empty in the training split"),
        ('x,kind\n1,"a\n', r'not well-formed CSV: a quote \("\) is not closed'),
        ('x,kind\n1,a\n2,"b\n3,c\n', r'line 3: not well-formed CSV: a quote \("\) is not closed'),
        ('x,kind\n""1,a\n2,b\n', "line 2: not well-formed CSV: ',' expected after '\"'"),
        ('x,kind\n1,"a"b\n2,c\n', "not well-formed CSV: ',' expected after '\"'"),
        ('x,kind\n1,"a\nb"\n2\n', "line 4: 1 cells, but 2 columns"),
        ("x,kind\n1,a,\n2,b,\n", "line 2: 3 cells, but 2 columns"),
        ("x,kind\n3_400,a\n2,b\n3,a\n", "row 1, column 'x': '3_400' is not a number"),
    ],
)
def test_malformed_tables_are_refused(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    check_refused(tmp_path / "bad.csv", message)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("x,kind\n1,a\n2,b\n3,a\n", id="plain"),
        pytest.param("x,kind\n1,a\n2,b\n3,a", id="no last end of line"),
        pytest.param("\n".join(["x,kind", "", "1,a", "2,b", "", "3,a", "", ""]), id="empty lines"),
        pytest.param("x,kind\r\n1,a\r\n2,b\r\n3,a\r\n", id="CRLF"),
        pytest.param("x,kind\r1,a\r2,b\r3,a\r", id="CR"),
        pytest.param("\ufeffx,kind\n1,a\n2,b\n3,a\n", id="BOM"),
        pytest.param('"x","kind"\n"1","a"\n"2","b"\n"3","a"\n', id="quotes"),
        pytest.param("x;kind\n1;a\n2;b\n3;a\n", id="semicolon"),
        pytest.param("x\tkind\n1\ta\n2\tb\n3\ta\n", id="tab"),
        pytest.param("x|kind\n1|a\n2|b\n3|a\n", id="bar"),
        pytest.param("x, kind\n 1, a\n +2, b\n3.0 ,a\n", id="blanks"),
    ],
)
def test_variants_of_one_table_are_read_the_same(tmp_path, text):
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
    data = load_all(tmp_path / "t.csv", normalize=False)
    assert data.train.tensors[0].tolist() == [[1], [2], [3]]
    assert (data.train.tensors[1].tolist(), data.classes) == ([0, 1, 0], ["a", "b"])


def test_cells_of_several_lines_and_of_megabytes(tmp_path):
    cells = ["one\nline", "b" * 2**21, 'a "quoted" word', "one\nline"]
    with open(tmp_path / "t.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["the\ntext", "y"])
        for row, cell in enumerate(cells):
            writer.writerow([cell, row])
    data = load_all(tmp_path / "t.csv", "y", target_kind="value")
    assert data.column_facts == [{"name": "the\ntext", "texts": sorted(set(cells))}]


def test_thousands_of_columns(tmp_path):
    numbers = np.random.default_rng(0).normal(size=(20, 5000))
    np.savetxt(
        tmp_path / "t.csv",
        numbers,
        delimiter=",",
        header=",".join(f"c{n}" for n in range(5000)),
        comments="",
    )
    data = load_all(tmp_path / "t.csv", "c0", normalize=False)
    np.testing.assert_allclose(data.train.tensors[0], numbers[:, 1:], rtol=1e-6)


@pytest.mark.parametrize(
    ("cells", "classes"),
    [
        (["1", "2", "+1", "01"], ["1", "2"]),
        (["1", "2", "1.0", "01"], ["01", "1", "1.0", "2"]),
        (["007", "7a", "7", "007"], ["007", "7", "7a"]),
        (["9007199254740993", "9007199254740992"], ["9007199254740992", "9007199254740993"]),
        ([" a", "a", "b "], ["a", "b"]),
    ],
)
def test_the_names_of_classes_are_the_cells(tmp_path, cells, classes):
    (tmp_path / "t.csv").write_text(
        "x,y\n" + "".join(f"{row},{cell}\n" for row, cell in enumerate(cells))
    )
    assert load_all(tmp_path / "t.csv", "y", target_kind="class").classes == classes


def test_integers_that_float64_cannot_distinguish_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("x,y\n9007199254740992,1\n9007199254740993,2\n,3\n")
    check_refused(
        tmp_path / "t.csv", "float64 cannot distinguish 9007199254740992 and 9007199254740993", "y"
    )


def test_csv_is_read_as_by_the_csv_module(tmp_path):
    draw = np.random.default_rng(0)
    known = [
        "1",
        "-2.5",
        "1e3",
        "",
        "NA",
        "null",
        " 4 ",
        "+5",
        "a",
        "b c",
        "x,y",
        'q"r',
        "ä",
        "l1\nl2",
        "007",
        "nan",
    ]
    for number in range(40):
        rows = draw.choice(known, (draw.integers(1, 9), 3)).tolist()
        with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=",;\t|"[number % 4])
            writer.writerows([["one", "two", "three"], *rows])
        table = read_table(tmp_path / "t.csv")
        for place, label in enumerate(("one", "two", "three")):
            column = as_texts(table[label])
            for row, code in zip(rows, column.codes.tolist(), strict=True):
                text = row[place].strip()
                if text.lower() in ("", "na", "null", "nan"):
                    assert code == -1
                else:
                    assert column.known[code] == text


PAIRS = 7
MEASURE = """
import resource, sys, time
import torch, pyarrow.csv
import framework as fw
from framework_plugins.datasets import tables
torch.set_num_threads(1)
pyarrow.set_cpu_count(1)
kind, path = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
if kind == "arrow":
    table = pyarrow.csv.read_csv(path)
    columns = [torch.from_numpy(cells.to_numpy().copy()).double() for cells in table.columns]
    inputs = [((column - column.mean()) / column.std()).float() for column in columns]
    inputs = torch.stack(inputs, dim=1)
else:
    data = fw.datasets.build("table", path=path, target="x9")
seconds = time.process_time() - start
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_million_rows_are_read_about_as_fast_as_by_arrow(tmp_path):
    """Compare with pyarrow.csv and a standardisation of its columns."""
    numbers = np.random.default_rng(0).normal(size=(10**6, 10)).round(4)
    path = tmp_path / "t.csv"
    pyarrow.csv.write_csv(
        pyarrow.table({f"x{place}": numbers[:, place] for place in range(10)}), path
    )
    figures = {"arrow": [], "table": []}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(PAIRS):
        for kind, own in figures.items():
            command = [sys.executable, "-c", MEASURE, kind, str(path)]
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            own.append([float(figure) for figure in done.stdout.split()])
    arrow = np.median(figures["arrow"], axis=0)
    table = np.median(figures["table"], axis=0)
    for name, (seconds, kibibytes) in (("arrow", arrow), ("table", table)):
        print(f"{name} {seconds:.2f} s, {kibibytes / 1024:.0f} MiB")
    assert table[0] < 1.5 * arrow[0]
    assert table[1] < 4 * arrow[1]


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "bad.csv").write_bytes("x,kind\n1,Bär\n".encode("latin-1"))
    check_refused(tmp_path / "bad.csv", r"bad\.csv is not UTF-8 text \(byte 10\)")
    (tmp_path / "bad.csv").write_bytes("xä,kind\n1,a\n".encode("latin-1"))
    check_refused(tmp_path / "bad.csv", r"bad\.csv is not UTF-8 text \(byte 1\)")
    (tmp_path / "bad.csv.gz").write_bytes(gzip.compress(PETS.encode())[:60])
    check_refused(tmp_path / "bad.csv.gz", "cannot be read")
