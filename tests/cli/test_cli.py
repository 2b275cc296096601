"""The program as a person uses it: verbs, files in and out, exit statuses, signals."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from framework.cli.completion import VERBS as COMPLETED
from framework.cli.main import VERBS, main
from framework.registry.registry import Registry
from framework.runs.checkpoint import newest
from waiting import wait_for

FRAMEWORK = str(Path(sys.executable).with_name("framework"))
PLUGIN = """\
import os, signal, time
from framework import Callback, callbacks

@callbacks.register("faulty")
class Faulty(Callback):
    def on_step_end(self, trainer):
        1 / (trainer.state.step - 3)

@callbacks.register("signals")
class Signals(Callback):
    def __init__(self, number: int = 1):
        self.number = number

    def on_step_end(self, trainer):
        for _ in range(self.number if trainer.state.step == 3 else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
"""


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "faulty.py"
    file.write_text(PLUGIN)
    yield file
    for module in [name for name in sys.modules if name.startswith("framework_plugin_")]:
        del sys.modules[module]
    for registry in Registry.every.values():
        registry.forget_unloaded()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run on the digits."""
    root = tmp_path_factory.mktemp("runs")
    line = f"train run.root={root} run.name=first trainer.max_epochs=2 callbacks=[checkpoint] loggers=[json_lines]"
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(line))
    assert exit.value.code == 0
    return root / "default" / "first"


def last_line(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_training_says_how_it_ended_and_what_to_do_next(command):
    status, out, err = command("train trainer.max_steps=3 run.name=first loggers=[json_lines]")
    assert status == 0
    assert "3 steps in " in out
    assert "measure  framework eval runs/default/first" in out
    assert f"{last_line(Path('runs/default/first'))['test/accuracy']:.4g}" in out
    assert "step 3/3" in err, "progress goes beside the result"


def test_eval_gives_the_test_values_of_the_run(command, run):
    status, out, _ = command(f"eval {run} --json")
    assert status == 0
    logged = {key: value for key, value in last_line(run).items() if key.startswith("test/")}
    assert json.loads(out) == pytest.approx(logged, abs=1e-6)
    status, out, _ = command(f"eval {run} --split val --checkpoint last")
    assert [line.split()[0] for line in out.splitlines()] == ["val/loss", "val/accuracy", "from"]


def test_predict_from_a_file_to_a_file(command, run, tmp_path):
    digits = load_digits()
    np.savez(tmp_path / "x.npz", inputs=digits.data[:50].astype("float32"))
    status, out, _ = command(f"predict {run} --input x.npz --output y.csv")
    assert (status, out) == (0, "50 predictions in y.csv\n")
    rows = [line.split(",") for line in (tmp_path / "y.csv").read_text().splitlines()]
    assert rows[0][:2] == ["class", "index"]
    named = np.array([row[0] for row in rows[1:]], int)
    assert (named == digits.target[:50]).mean() > 0.7
    assert command(f"predict {run} --input x.npz --output y.jsonl")[0] == 0
    assert [json.loads(line)["class"] for line in (tmp_path / "y.jsonl").open()] == [
        row[0] for row in rows[1:]
    ]
    assert command(f"predict {run} --input x.npz --output y.npz")[0] == 0
    with np.load(tmp_path / "y.npz") as archive:
        assert archive["index"].tolist() == named.tolist()
    assert command(f"predict {run} --input x.npz --output -")[1] == (tmp_path / "y.csv").read_text()


def test_plan_list_and_show_for_programs(command):
    assert json.loads(command("plan --json")[1])["parameters"] > 1000
    listed = json.loads(command("list --json")[1])
    assert listed.keys() == Registry.every.keys()
    assert {
        part["name"] for part in json.loads(command("list optimizer --json")[1])["optimizer"]
    } >= {"sgd", "adamw"}
    shown = json.loads(command("show optimizer/adamw --json")[1])
    assert shown["settings"][0]["name"] == "lr"


@pytest.mark.parametrize(
    "line", ["", "--help", "help", "--version", "list", "list data", "show gelu", "completion zsh"]
)
def test_what_only_tells(command, line):
    status, out, err = command(line)
    assert (status, err) == (0, "")
    assert out.strip()


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_terminal(command, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = command(f"{verb} --help")
    assert status == 0
    assert out.startswith(f"usage: framework {verb} ")
    assert max(map(len, out.splitlines())) < 80
    assert verb in command("--help")[1]


def test_every_verb_is_completed(command, tmp_path, monkeypatch):
    assert set(COMPLETED) == set(VERBS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "spam.yaml").write_text("seed: 1\n")
    assert "experiment=spam" in command("complete -- train experiment=")[1].split()
    assert command("complete -- train optimizer=sg")[1] == "optimizer=sgd\n"
    assert command("complete -- train loader.batch_s")[1] == "loader.batch_size=\n"
    assert command("complete -- train callbacks.ear")[1] == "\n"
    assert command("complete -- train --plugins nowhere.py optimizer=s") == (0, "\n", ""), (
        "TAB never complains"
    )


def test_a_fault_in_a_plugin_names_its_line(command, plugin, tmp_path):
    line = f"train --plugins {plugin} callbacks=[faulty] run.name=x"
    status, _out, err = command(line)
    assert status == 1
    assert err.splitlines() == [
        f"framework: ZeroDivisionError: division by zero ({plugin.name}:7 in on_step_end); --traceback shows the calls",
    ]
    assert json.loads((tmp_path / "runs/default/x/status.json").read_text())["status"] == "failed"
    status, _, err = command(f"--traceback {line.replace('=x', '=y')}")
    assert status == 1
    assert "Traceback (most recent call last)" in err
    assert f'File "{plugin}", line 7, in on_step_end' in err


def test_a_sweep_goes_on_after_a_job_that_fails(command):
    quick = "trainer.max_steps=1 callbacks=[] loggers=[] sweep.name=s"
    status, out, err = command(f"train {quick} -m loss=mse,cross_entropy,focal")
    assert (status, err) == (2, "framework: 1 of 3 trials failed\n")
    lines = [
        line.partition("  ")[::2]
        for line in out.splitlines()
        if line[:2] == "00" and "loss=" in line
    ]
    assert [label for label, _ in lines] == [
        "000 loss=mse",
        "001 loss=cross_entropy",
        "002 loss=focal",
    ]
    assert "failed" in lines[0][1]
    assert "MSELoss cannot take classes" in lines[0][1]
    assert len(list(Path("runs/default/s").glob("*/config.yaml"))) == 3, (
        "two that ended well, and the best once more"
    )
    assert os.listdir() == ["runs"], "Hydra leaves nothing of its own"


def test_sigterm_ends_a_run_in_good_order(tmp_path):
    """The step ends, a checkpoint is written, everything is closed."""
    line = "train run.name=a trainer.max_epochs=100000 callbacks=[checkpoint] loggers=[tensorboard,json_lines]"
    run = tmp_path / "runs/default/a"
    process = subprocess.Popen(
        [FRAMEWORK, *line.split()], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(
            lambda: (
                (run / "metrics.jsonl").exists()
                and (run / "metrics.jsonl").read_text().count("\n") > 3
            )
        )
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (143, "")
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("stopped", "SIGTERM")
    checkpoint, skipped = newest(run / "checkpoints")
    assert checkpoint.name == f"step-{status['step']:08d}"
    assert skipped == []
    assert (
        EventAccumulator(str(run)).Reload().Scalars("train/loss")[-1].step == last_line(run)["step"]
    )


@pytest.mark.parametrize(("number", "ended"), [(1, "stopped"), (2, "failed")])
def test_sigint_in_a_sweep_ends_the_sweep(command, plugin, number, ended):
    """The first lets the step end; a second does not wait even for that. No other job is begun."""
    callbacks = f"callbacks=[signals] callbacks.signals.number={number}"
    status, _, err = command(f"train --plugins {plugin} {callbacks} loggers=[] -m seed=1,2,3")
    assert (status, err) == (130, "")
    (run,) = Path("runs/default").glob("2*/0*")
    found = json.loads((run / "status.json").read_text())
    assert (found["status"], found["step"]) == (ended, 3)


def test_a_reader_that_goes_away(tmp_path):
    line = f"{shlex.quote(FRAMEWORK)} --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("141\n", "")
