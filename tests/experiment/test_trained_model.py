"""`fw.load`: predictions for raw inputs equal those of `framework predict`; history and config."""

import json

import numpy
import pytest
import torch

import framework as fw
from framework.cli.main import main
from framework.errors import DataError
from runs import run_training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the runs of this module."""
    return tmp_path_factory.mktemp("runs")


def train(folder, name, *overrides):
    settings = (f"run.root={folder}", f"run.name={name}", "trainer.max_epochs=2")
    return fw.load(run_training(*settings, *overrides).folder)


@pytest.fixture(scope="module")
def digits(folder):
    return train(folder, "digits", "model.width=16")


@pytest.fixture(scope="module")
def table(folder):
    rows = ["color,size,price"]
    rows += [f"{'red' if n % 3 else 'blue'},{n / 7},{n + 5 * (n % 3)}" for n in range(60)]
    (folder / "rows.csv").write_text("\n".join(rows))
    settings = ("data=table", f"data.path={folder}/rows.csv", "data.target=price")
    return train(folder, "table", *settings, "task=regression", "metrics=[]")


@pytest.fixture(scope="module")
def texts(folder):
    rows = ["text,label"]
    rows += [f"{'good day' if n % 2 else 'bad night'} {n},{n % 2}" for n in range(60)]
    (folder / "texts.csv").write_text("\n".join(rows))
    settings = ("data=text_table", f"data.path={folder}/texts.csv", "data.label=label")
    return train(folder, "texts", *settings, "model=embedding_bag", "model.width=8")


def predicted(run, file, tmp_path, capsys):
    """Return the rows of `framework predict`."""
    output = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit):
        main(["predict", str(run.path), "--input", str(file), "--output", str(output)])
    capsys.readouterr()
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_a_loaded_run_has_its_model_config_and_history(digits):
    assert digits.config["model"]["width"] == 16
    assert isinstance(digits.model, torch.nn.Module)
    assert not digits.model.training
    assert digits.path.name == "digits"
    rows = [json.loads(line) for line in (digits.path / "metrics.jsonl").open()]
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    assert digits.history["val/loss"].values == losses
    best = max(row["val/accuracy"] for row in rows if "val/accuracy" in row)
    assert digits.history.best["val/accuracy"].value == best


def test_a_notebook_shows_the_settings_and_curves_of_a_run(digits):
    shown = digits._repr_html_()
    for text in ("digits", "mlp, width=16", "activation=relu", "best", "val/accuracy", "<svg"):
        assert text in shown


def test_a_notebook_escapes_the_texts_of_a_run(folder):
    run = train(folder, "evil", "model.width=16")
    run.config["model"] = {"name": "<script>", "<img>": {"name": "<img>"}, "x": {"y": "<img>"}}
    run.config["data"] = "<img>"
    run.classes = ["<img>"]
    shown = run._repr_html_()
    assert "<script" not in shown
    assert "<img" not in shown
    assert "&lt;script&gt;, &lt;img&gt;=&lt;img&gt;, x=..." in shown


def test_a_notebook_shows_a_run_with_extreme_values(folder):
    run = train(folder, "extreme", "model.width=16")
    last = run.history["val/loss"].steps[-1]
    with (run.path / "metrics.jsonl").open("a") as file:
        for step, value in ((2**70, "1"), (last + 1, "1e308"), (last + 2, "-1e999")):
            file.write(f'{{"step": {step}, "epoch": 1, "wall_seconds": 1, "val/loss": {value}}}\n')
    run = fw.load(run.path)
    assert run.history["val/loss"].steps[-2:] == [last + 1, last + 2]
    assert "-inf" in run._repr_html_()


def test_arrays_tensors_and_files_give_the_rows_of_predict(digits, tmp_path, capsys):
    pixels = numpy.arange(3 * 64).reshape(3, 64) % 17
    file = tmp_path / "pixels.npy"
    numpy.save(file, pixels)
    rows = predicted(digits, file, tmp_path, capsys)
    inputs = [pixels, torch.from_numpy(pixels), pixels.tolist(), file, str(file), [file]]
    for raw in inputs:
        columns = digits.predict(raw)
        assert columns["class"] == [str(row["class"]) for row in rows]
        probabilities = [row["probability"] for row in rows]
        assert columns["probability"].tolist() == pytest.approx(probabilities, abs=1e-5)
    assert len(digits.predict(pixels[0])["class"]) == 1  # one sample without the axis of samples
    assert len(digits.predict([file, file])["class"]) == 6


def test_rows_of_a_table_in_all_forms(table, tmp_path, capsys):
    file = tmp_path / "new.csv"
    file.write_text("size,color\n1.5,red\n,blue\n")
    expected = [row["value"] for row in predicted(table, file, tmp_path, capsys)]
    forms = [
        [{"size": 1.5, "color": "red"}, {"color": "blue"}],
        {"size": [1.5, None], "color": ["red", "blue"]},
        {"size": numpy.array([1.5, numpy.nan]), "color": ["red", "blue"], "other": [1, 2]},
    ]
    for rows in forms:
        assert table.predict(rows)["value"].tolist() == pytest.approx(expected, rel=1e-5)
    one = table.predict({"size": 1.5, "color": "red"})["value"].tolist()
    assert one == pytest.approx(expected[:1], rel=1e-5)


def test_a_data_frame(table):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"size": [1.5, None], "color": ["red", "blue"]})
    rows = [{"size": 1.5, "color": "red"}, {"color": "blue"}]
    assert table.predict(frame)["value"].tolist() == table.predict(rows)["value"].tolist()


def test_texts(texts, tmp_path, capsys):
    file = tmp_path / "new.txt"
    file.write_text("good day\nbad night\n")
    expected = [str(row["class"]) for row in predicted(texts, file, tmp_path, capsys)]
    assert texts.predict(["good day", "bad night"])["class"] == expected
    assert texts.predict("good day")["class"] == expected[:1]
    assert texts.predict(["good\nday"])["class"] == expected[:1]  # one text of two lines


def test_evaluate_takes_a_split_a_name_or_batches(digits):
    test = fw.datasets.build("digits").test
    expected = digits.evaluate()
    assert expected["test/accuracy"] == pytest.approx(digits.history.last["test/accuracy"])
    assert digits.evaluate(test) == expected
    assert digits.evaluate(fw.datasets.build("digits")) == expected
    assert "val/loss" in digits.evaluate("val")
    with pytest.raises(DataError, match="no tset split; did you mean 'test'"):
        digits.evaluate("tset")
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*test.tensors), 100)
    assert digits.evaluate(batches) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("inputs", ["a text", [{"a": 1}], object(), [[1, 2], [3]], [], 3.0])
def test_inputs_of_another_form_are_refused(digits, inputs):
    with pytest.raises(DataError) as raised:
        digits.predict(inputs)
    assert "/" not in str(raised.value)  # no name of a temporary file
    assert "inputs." not in str(raised.value)
    assert "expected" in str(raised.value) or "takes" in str(raised.value)


def test_columns_of_different_lengths_are_refused(table):
    with pytest.raises(DataError, match="one length"):
        table.predict({"size": [1.5], "color": ["red", "blue"]})
