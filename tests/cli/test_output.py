"""The output at the end of a run, and predictions in files."""

import json
import re
from pathlib import Path
from signal import SIGINT

import pytest
import torch

from framework.cli.output import (
    metric_table,
    percent,
    print_result,
    print_values,
)
from framework.contracts.state import Stop
from framework.data.dataset import Loader, TensorSplit
from framework.experiment.experiment import data_advice
from framework.experiment.result import Result
from framework.training.process_times import ProcessTimes

METRICS = {
    "train/loss": 0.123456,
    "train/learning_rate": 1e-3,
    "val/loss": 0.25,
    "val/accuracy": 0.9,
    "test/loss": 0.5,
    "test/accuracy": 1.0,
}


def test_the_table_has_a_row_for_each_split_and_a_column_for_each_metric():
    assert list(metric_table(METRICS)) == [
        "             loss   accuracy",
        "train      0.1235           ",
        "val          0.25        0.9",
        "test          0.5          1",
    ]
    assert list(metric_table({"train/loss": 2.0})) == ["             loss", "train           2"]
    assert list(metric_table({})) == []


def test_the_results_of_a_run_end_with_the_next_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/default/x/checkpoints").mkdir(parents=True)
    print_result(Result(Path("runs/default/x"), METRICS, seconds=3.21, steps=1200))
    printed = capsys.readouterr().out
    assert printed.endswith(
        "\n1,200 steps in 3.2 s\nrun      runs/default/x\n"
        "measure  framework eval runs/default/x\nwatch    framework board\n"
    )
    stop = Stop("signal", "SIGINT", SIGINT)
    print_result(Result(Path("runs/default/y"), METRICS, stopped=stop, signal=2))
    assert capsys.readouterr().out.endswith(
        "run      runs/default/y\nresume   framework resume runs/default/y\n"
        "watch    framework board\n"
    )
    stop = Stop("early_stop", "enough")
    print_result(Result(Path("x"), METRICS, stopped=stop, seconds=240, steps=1), "seed=3")
    printed = capsys.readouterr().out
    assert printed.startswith("\nseed=3\n")
    assert printed.endswith("\n1 step in 4.0 min, stopped: early_stop: enough\nrun      x\n")


def test_the_table_names_the_evaluated_weights():
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
    line = "\n200 steps in 3.2 s (in total: 1,200); 5.0 s with start-up and test\n"
    assert line in capsys.readouterr().out


TRAIN = (
    "train model.depth=1 model.width=4 loader.batch_size=1000 optimizer.lr=0.1 "
    "loggers=[json_lines] run.name=first"
)


def test_the_table_of_a_run_agrees_with_its_checkpoints(command):
    # with mode=max, the first checkpoint has the best loss
    _, out, _ = command(f"{TRAIN} trainer.max_epochs=4 callbacks.checkpoint.mode=max")
    rows = {line.split("  ")[0]: line.split()[-2] for line in out.splitlines()[:4] if "(" in line}
    best = Path("runs/default/first/checkpoints/best").resolve()
    assert best.name != "step-00000008"
    test_row = f"test (best, step {int(best.name[5:])})"
    assert list(rows) == ["val (last, step 8)", test_row]
    values = json.loads(command("eval runs/default/first --json")[1])["metrics"]
    assert f"{values['test/loss']:.4g}" == rows[test_row]
    _, printed, _ = command("eval runs/default/first --checkpoint last --split val --json")
    assert f"{json.loads(printed)['metrics']['val/loss']:.4g}" == rows["val (last, step 8)"]
    _, again, _ = command("resume runs/default/first")
    assert again.splitlines()[1:5] == out.splitlines()[:4], "a complete run has the same table"


def test_a_run_without_checkpoints_prints_a_note(command):
    _, out, _ = command(f"{TRAIN} trainer.max_steps=1 callbacks=[gradient_norm]")
    first_line = out.splitlines()[0]
    assert "no checkpoints" in first_line
    assert "+callbacks=checkpoint" in first_line
    assert "test (last, step 1)" in out
    _, out, _ = command(f"{TRAIN} trainer.max_steps=1 callbacks=[checkpoint] run.name=b")
    assert "no checkpoints" not in out


@pytest.mark.parametrize(
    ("shares", "seconds", "settings", "advised"),
    [
        ({"waiting for data": 0.7}, 10, {}, ["loader.workers=2", "loader.read=memory"]),
        ({"waiting for data": 0.7}, 10, {"workers": 2}, ["loader.read=memory"]),
        ({"waiting for data": 0.7}, 1, {}, []),
        ({"waiting for data": 0.2}, 10, {}, []),
        ({"steps": 1.0}, 10, {}, []),
    ],
)
def test_a_run_that_waits_for_data_prints_advice(shares, seconds, settings, advised, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    split = TensorSplit(torch.zeros(8, 1), torch.zeros(8))
    advice = data_advice(Loader(split, read="workers", **settings), shares, seconds)
    assert (advice is None) == (advised == [])
    assert re.findall(r"loader\.\w+=\w+", advice or "") == advised
    assert data_advice(Loader(split), shares, seconds) is None, "data in memory is not read ahead"


def test_an_evaluation_prints_its_values_and_the_checkpoint(capsys):
    print_values({"test/loss": 0.12345678, "test/accuracy": 1.0}, Path("c/best"))
    assert capsys.readouterr().out.splitlines() == [
        "test/loss      0.123457",
        "test/accuracy  1",
        "from           c/best",
    ]


def test_the_kind_of_steps_that_was_kept_is_printed(capsys):
    print_result(Result(Path("x"), METRICS, step_kind="eager"))
    assert "\ncompile  eager steps, which compile=auto has kept\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shares", "line"),
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
def test_the_shares_of_time_add_up_to_a_hundred(shares, line, capsys):
    print_result(Result(Path("x"), METRICS, shares=shares))
    assert f"\ntime     {line}\n" in capsys.readouterr().out


def test_random_shares_add_up_to_a_hundred():
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        parts = torch.rand(7, generator=generator, dtype=torch.float64) ** 4
        shares = dict(enumerate((parts / parts.sum()).tolist()))
        rounded = percent(shares)
        assert sum(rounded.values()) == 100
        for part, share in shares.items():
            assert abs(rounded[part] - 100 * share) < 1


def test_a_run_of_several_processes_names_the_slowest(capsys):
    times = ProcessTimes([10.0, 10.0], [5.0, 2.0], [0.0, 2.8])
    print_result(Result(Path("x"), METRICS, processes=times))
    printed = capsys.readouterr().out
    assert (
        "\nranks    2 processes, 20% communication, 15% waiting for each other; rank 1 is the "
        "slowest (23% over the mean, waiting for data)\nwaiting  rank 0 30%, rank 1 0%\n"
    ) in printed
    even = ProcessTimes([10.0] * 64, [2.0] * 64, [0.0] * 64)
    print_result(Result(Path("x"), METRICS, processes=even))
    printed = capsys.readouterr().out
    assert "\nranks    64 processes, 20% communication, 0% waiting for each other\n" in printed
    assert "\nwaiting" not in printed
