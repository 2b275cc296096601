"""What a person sees at the end of a run, and predictions as a file."""

import json
from pathlib import Path
from signal import SIGINT

import numpy as np
import pytest
import torch

from framework.cli.output import (
    check_output,
    metric_table,
    percent,
    print_result,
    print_values,
    write_predictions,
)
from framework.contracts.state import Stop
from framework.data.dataset import Loader, TensorSplit
from framework.errors import FrameworkError
from framework.experiment.experiment import data_advice
from framework.experiment.result import Result

METRICS = {
    "train/loss": 0.123456,
    "train/learning_rate": 1e-3,
    "val/loss": 0.25,
    "val/accuracy": 0.9,
    "test/loss": 0.5,
    "test/accuracy": 1.0,
}


def test_a_row_for_each_split_and_a_column_for_each_measure():
    assert list(metric_table(METRICS)) == [
        "             loss   accuracy",
        "train      0.1235           ",
        "val          0.25        0.9",
        "test          0.5          1",
    ]
    assert list(metric_table({"train/loss": 2.0})) == ["             loss", "train           2"]


def test_the_end_of_a_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/default/x/checkpoints").mkdir(parents=True)
    print_result(Result(Path("runs/default/x"), METRICS, seconds=3.21, steps=1200))
    said = capsys.readouterr().out
    assert said.endswith(
        "\n1,200 steps in 3.2 s\nrun      runs/default/x\n"
        "measure  framework eval runs/default/x\nwatch    framework board\n"
    )
    print_result(
        Result(Path("runs/default/y"), METRICS, stopped=Stop("signal", "SIGINT", SIGINT), signal=2)
    )
    assert capsys.readouterr().out.endswith(
        "run      runs/default/y\ngo on    framework resume runs/default/y\nwatch    framework board\n"
    )
    print_result(
        Result(Path("x"), METRICS, stopped=Stop("early_stop", "enough"), seconds=240, steps=1),
        "seed=3",
    )
    said = capsys.readouterr().out
    assert said.startswith("\nseed=3\n")
    assert said.endswith("\n1 step in 4.0 min, stopped: early_stop: enough\nrun      x\n")


def test_the_table_says_which_weights_were_measured():
    assert list(metric_table(METRICS, {"val": "last, step 1,080", "test": "best, step 900"})) == [
        "                              loss   accuracy",
        "train                       0.1235           ",
        "val (last, step 1,080)        0.25        0.9",
        "test (best, step 900)          0.5          1",
    ]


def test_steps_and_seconds_are_those_of_the_same_training(capsys):
    result = Result(Path("x"), METRICS, seconds=5.0, steps=1200, fit_seconds=3.2, fit_steps=1200)
    print_result(result)
    assert "\n1,200 steps in 3.2 s; 5.0 s with start-up and test\n" in capsys.readouterr().out
    result.fit_steps = 200
    print_result(result)
    said = "\n200 steps in 3.2 s (with those before: 1,200); 5.0 s with start-up and test\n"
    assert said in capsys.readouterr().out


TRAIN = "train model.depth=1 model.width=4 loader.batch_size=1000 optimizer.lr=0.1 loggers=[json_lines] run.name=first"


def test_the_table_of_a_run_agrees_with_its_checkpoints(command):
    _, out, _ = command(
        f"{TRAIN} trainer.max_epochs=4 callbacks.checkpoint.mode=max"
    )  # the first is the best
    rows = {line.split("  ")[0]: line.split()[-2] for line in out.splitlines()[:4] if "(" in line}
    best = Path("runs/default/first/checkpoints/best").resolve()
    assert best.name != "step-00000008"
    assert list(rows) == ["val (last, step 8)", f"test (best, step {int(best.name[5:])})"]
    measured = json.loads(command("eval runs/default/first --json")[1])
    assert f"{measured['test/loss']:.4g}" == rows[f"test (best, step {int(best.name[5:])})"]
    measured = json.loads(
        command("eval runs/default/first --checkpoint last --split val --json")[1]
    )
    assert f"{measured['val/loss']:.4g}" == rows["val (last, step 8)"]
    _, again, _ = command("resume runs/default/first")
    assert again.splitlines()[1:5] == out.splitlines()[:4], (
        "a run that is done already has the same table"
    )


def test_a_run_that_saves_nothing_says_so(command):
    _, out, _ = command(f"{TRAIN} trainer.max_steps=1 callbacks=[gradient_norm]")
    assert out.startswith(
        "no checkpoints are saved, so the run cannot be resumed or evaluated: +callbacks=checkpoint"
    )
    assert "test (last, step 1)" in out
    assert (
        "no checkpoints"
        not in command(f"{TRAIN} trainer.max_steps=1 callbacks=[checkpoint] run.name=b")[1]
    )


@pytest.mark.parametrize(
    ("shares", "seconds", "settings", "said"),
    [
        (
            {"waiting for data": 0.7},
            10,
            {},
            "70% of the time waited for data: loader.workers=2 reads ahead; loader.read",
        ),
        (
            {"waiting for data": 0.7},
            10,
            {"workers": 2},
            "70% of the time waited for data: loader.read=memory",
        ),
        ({"waiting for data": 0.7}, 1, {}, None),
        ({"waiting for data": 0.2}, 10, {}, None),
        ({"steps": 1.0}, 10, {}, None),
    ],
)
def test_advice_on_slow_data(shares, seconds, settings, said, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    split = TensorSplit(torch.zeros(8, 1), torch.zeros(8))
    advice = data_advice(Loader(split, read="workers", **settings), shares, seconds)
    assert advice is said if said is None else advice.startswith(said)
    assert data_advice(Loader(split), shares, seconds) is None, (
        "what is in memory cannot be read ahead"
    )


def test_the_values_of_an_evaluation(capsys):
    print_values({"test/loss": 0.12345678, "test/accuracy": 1.0}, Path("c/best"))
    assert capsys.readouterr().out.splitlines() == [
        "test/loss      0.123457",
        "test/accuracy  1",
        "from           c/best",
    ]


COLUMNS = {"class": torch.tensor([1, 0]), "probability": torch.tensor([[0.25, 0.75], [0.5, 0.5]])}
CLASSES = ["cat", "dog, big"]


def test_predictions_as_csv(tmp_path, capsys):
    assert write_predictions(COLUMNS, CLASSES, str(tmp_path / "y.csv")) == 2
    text = 'class,index,probability:cat,"probability:dog, big"\n"dog, big",1,0.25,0.75\ncat,0,0.5,0.5\n'
    assert (tmp_path / "y.csv").read_text() == text
    write_predictions(COLUMNS, CLASSES, "-")
    assert capsys.readouterr().out == text


def test_predictions_as_json_lines(tmp_path):
    write_predictions(COLUMNS, CLASSES, str(tmp_path / "y.jsonl"))
    first, _ = map(json.loads, (tmp_path / "y.jsonl").read_text().splitlines())
    assert first == {
        "class": "dog, big",
        "index": 1,
        "probability:cat": 0.25,
        "probability:dog, big": 0.75,
    }


def test_predictions_of_any_type(tmp_path):
    columns = {
        "z": torch.tensor([1 + 2j]),
        "yes": torch.tensor([True]),
        "id": torch.tensor([2**53 + 1]),
    }
    for suffix in ("csv", "jsonl", "npz"):
        assert write_predictions(columns, [], str(tmp_path / f"y.{suffix}")) == 1
    assert (tmp_path / "y.csv").read_text() == f"z,yes,id\n(1+2j),True,{2**53 + 1}\n"
    row = json.loads((tmp_path / "y.jsonl").read_text())
    assert row == {"z": "(1+2j)", "yes": True, "id": 2**53 + 1}


def test_predictions_as_an_archive(tmp_path):
    write_predictions(COLUMNS, CLASSES, str(tmp_path / "y.npz"))
    with np.load(tmp_path / "y.npz", allow_pickle=False) as archive:
        assert archive["class"].tolist() == ["dog, big", "cat"]
        assert archive["probability:cat"].tolist() == [0.25, 0.5]


def test_columns_without_classes(tmp_path):
    columns = {"output": torch.tensor([[1.0, 2.0, 3.0]]), "class": [4]}
    write_predictions(columns, [], str(tmp_path / "y.csv"))
    assert (tmp_path / "y.csv").read_text() == "output:0,output:1,output:2,class\n1.0,2.0,3.0,4\n"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            "y.txt",
            "--output y.txt: the suffix should be .csv, .jsonl or .npz, or - for the terminal",
        ),
        ("y", "--output y: the suffix"),
        ("no/y.csv", "--output no/y.csv: no folder no"),
        ("folder.csv", "--output folder.csv: is a folder"),
    ],
)
def test_an_output_that_cannot_be(tmp_path, monkeypatch, output, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(FrameworkError, match="--output") as error:
        check_output(output)
    assert said in str(error.value)


def test_an_output_that_cannot_be_written():
    with pytest.raises(FrameworkError, match=r"--output /dev/full.csv|--output /proc/y.csv"):
        write_predictions(COLUMNS, CLASSES, "/proc/y.csv")


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        (
            {"steps": 0.914, "validation": 0.081, "logging": 0.005},
            "91% steps, 8% validation, 1% logging",
        ),
        ({"steps": 0.914, "validation": 0.082, "logging": 0.004}, "92% steps, 8% validation"),
        (
            {"steps": 0.335, "compiling": 0.335, "logging": 0.33},
            "34% steps, 33% compiling, 33% logging",
        ),
        ({"steps": 0.29, "waiting for data": 0.71}, "29% steps, 71% waiting for data"),
        ({"steps": 1.0}, "100% steps"),
    ],
)
def test_where_the_time_went_adds_up_to_a_hundred(shares, said, capsys):
    print_result(Result(Path("x"), METRICS, shares=shares))
    assert f"\ntime     {said}\n" in capsys.readouterr().out


def test_shares_of_any_run_add_up_to_a_hundred():
    for seed in range(200):
        parts = (
            torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 4
        )
        shares = dict(enumerate((parts / parts.sum()).tolist()))
        rounded = percent(shares)
        assert sum(rounded.values()) == 100
        assert all(abs(rounded[part] - 100 * share) < 1 for part, share in shares.items())
