"""The program as a user runs it: commands, files, exit statuses, signals."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from framework import FrameworkError, discover
from framework.cli.main import COMMANDS, main
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
    """Return the folder of a short run on the digits."""
    root = tmp_path_factory.mktemp("runs")
    parts = "callbacks=[checkpoint] loggers=[json_lines]"
    line = f"train run.root={root} run.name=first trainer.max_epochs=2 {parts}"
    with pytest.raises(SystemExit) as raised:
        main(shlex.split(line))
    assert raised.value.code == 0
    return root / "default" / "first"


def last_line(run):
    """Return the last logged values of a run."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_training_prints_the_results_and_the_next_commands(command):
    status, out, err = command("train trainer.max_steps=3 run.name=first loggers=[json_lines]")
    assert status == 0
    assert "3 steps in " in out
    assert "measure  framework eval runs/default/first" in out
    assert f"{last_line(Path('runs/default/first'))['test/accuracy']:.4g}" in out
    assert "step 3/3" in err, "progress goes to stderr"


def test_eval_prints_the_test_metrics_of_the_run(command, run):
    status, out, _ = command(f"eval {run} --json")
    assert status == 0
    logged = {key: value for key, value in last_line(run).items() if key.startswith("test/")}
    assert json.loads(out)["metrics"] == pytest.approx(logged, abs=1e-6)
    status, out, _ = command(f"eval {run} --split val --checkpoint last")
    assert [line.split()[0] for line in out.splitlines()] == ["val/loss", "val/accuracy", "from"]


def test_predict_reads_a_file_and_writes_a_file(command, run, tmp_path):
    digits = load_digits()
    np.savez(tmp_path / "x.npz", inputs=digits.data[:50].astype("float32"))
    status, out, _ = command(f"predict {run} --input x.npz --output y.csv")
    assert (status, out) == (0, "50 predictions in y.csv\n")
    rows = [line.split(",") for line in (tmp_path / "y.csv").read_text().splitlines()]
    assert rows[0][:3] == ["row", "class", "class_index"]
    assert [row[0] for row in rows[1:]] == [str(row) for row in range(1, 51)]
    named = np.array([row[1] for row in rows[1:]], int)
    assert (named == digits.target[:50]).mean() > 0.7
    assert command(f"predict {run} --input x.npz --output y.jsonl")[0] == 0
    classes = [json.loads(line)["class"] for line in (tmp_path / "y.jsonl").open()]
    assert classes == [row[1] for row in rows[1:]]
    assert command(f"predict {run} --input x.npz --output y.npz")[0] == 0
    with np.load(tmp_path / "y.npz") as archive:
        assert archive["class_index"].tolist() == named.tolist()
    assert command(f"predict {run} --input x.npz --output -")[1] == (tmp_path / "y.csv").read_text()


def test_plan_list_and_show_print_json(command):
    assert json.loads(command("plan --json")[1])["parameters"] > 1000
    listed = json.loads(command("list --json")[1])["parts"]
    assert listed.keys() == Registry.every.keys()
    optimizers = json.loads(command("list optimizer --json")[1])["parts"]["optimizer"]
    assert {part["name"] for part in optimizers} >= {"sgd", "adamw"}
    shown = json.loads(command("show optimizer/adamw --json")[1])
    assert shown["settings"][0]["name"] == "lr"


@pytest.mark.parametrize(
    "line", ["", "--help", "help", "--version", "list", "list data", "show gelu", "completion zsh"]
)
def test_commands_that_only_print_end_with_status_0(command, line):
    status, out, err = command(line)
    assert (status, err) == (0, "")
    assert out.strip()


def test_help_with_a_command_prints_the_help_of_the_command(command):
    assert command("help eval")[1] == command("eval --help")[1]


def test_the_help_names_the_option_for_the_version(command):
    assert "framework --version" in command("--help")[1]


def test_the_first_column_of_the_kinds_has_their_config_keys(command):
    lines = command("list")[1].splitlines()
    first = [line.split()[0] for line in lines]
    assert first[0] == "key"
    assert {"callbacks", "metrics", "optimizer"} <= set(first)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal(command, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = command(f"{name} --help")
    assert status == 0
    assert out.startswith(f"usage: framework {name} ")
    assert max(map(len, out.splitlines())) < 80
    overview = command("--help")[1].splitlines()
    assert max(map(len, overview)) < 80
    assert any(line.startswith(f"  {name} ") for line in overview)


def subclasses_of(cls):
    """Return the class and all classes that extend it."""
    found = [cls]
    for extension in found:  # the list grows during the loop
        found += extension.__subclasses__()
    return found


def test_help_names_the_exit_status_of_each_error(command):
    discover()
    statuses = {1} | {error.exit_status for error in subclasses_of(FrameworkError)}
    assert len(statuses) > 2, "some errors have a status of their own"
    text = " ".join(command("--help")[1].partition("Exit status:")[2].split())
    for status in statuses:
        assert re.search(rf"\b{status} (for|if)\b", text), f"no exit status {status}: {text}"


def test_commands_and_overrides_are_completed(command, tmp_path, monkeypatch):
    assert set(command("complete -- ")[1].split()) == set(COMMANDS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "spam.yaml").write_text("seed: 1\n")
    assert "experiment=spam" in command("complete -- train experiment=")[1].split()
    assert command("complete -- train optimizer=sg")[1] == "optimizer=sgd\n"
    assert command("complete -- train loader.batch_s")[1] == "loader.batch_size=\n"
    assert command("complete -- train callbacks.ear")[1] == "\n"
    unknown_plugin = command("complete -- train --plugins nowhere.py optimizer=s")
    assert unknown_plugin == (0, "\n", ""), "TAB prints no error"


@pytest.mark.parametrize("line", ["find lr", "find --json lr optimizer=sgd", "find lr --json a=1"])
def test_the_target_of_find_may_follow_options(line, monkeypatch):
    found = []
    monkeypatch.setattr("framework.composition.compose.run_composed", lambda *a: found.append(a))
    with pytest.raises(SystemExit) as raised:
        main(shlex.split(line))
    assert raised.value.code == 0
    ((command_line, _),) = found
    assert command_line.overrides == [word for word in line.split() if "=" in word]


def test_an_error_in_a_plugin_is_printed_with_its_line(command, plugin, tmp_path):
    line = f"train --plugins {plugin} callbacks=[faulty] run.name=x"
    status, _out, err = command(line)
    assert status == 1
    (message,) = err.splitlines()
    place = f"({plugin.name}:7 in on_step_end)"
    assert message.startswith(f"framework: ZeroDivisionError: division by zero {place}; ")
    assert "--traceback" in message
    assert json.loads((tmp_path / "runs/default/x/status.json").read_text())["status"] == "failed"
    status, _, err = command(f"--traceback {line.replace('=x', '=y')}")
    assert status == 1
    assert "Traceback (most recent call last)" in err
    assert f'File "{plugin}", line 7, in on_step_end' in err


def test_a_sweep_continues_after_a_job_that_fails(command):
    quick = "trainer.max_steps=1 callbacks=[] loggers=[] sweep.name=s"
    status, out, err = command(f"train {quick} -m loss=mse,cross_entropy,focal")
    assert (status, err) == (2, "framework: 1 of 3 trials failed\n")
    lines = [line for line in out.splitlines() if line[:2] == "00" and "loss=" in line]
    labels = [line.partition("  ")[0] for line in lines]
    assert labels == ["000 loss=mse", "001 loss=cross_entropy", "002 loss=focal"]
    assert "failed" in lines[0]
    assert "MSELoss cannot take classes" in lines[0]
    configs = list(Path("runs/default/s").glob("*/config.yaml"))
    assert len(configs) == 3, "two complete runs, and the link to the best"
    assert os.listdir() == ["runs"], "Hydra leaves nothing of its own"


def test_sigterm_stops_a_run_after_the_step_with_a_checkpoint(tmp_path):
    parts = "callbacks=[checkpoint] loggers=[tensorboard,json_lines]"
    command = [FRAMEWORK, *f"train run.name=a trainer.max_epochs=100000 {parts}".split()]
    run = tmp_path / "runs/default/a"
    metrics = run / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
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
    logged = EventAccumulator(str(run)).Reload().Scalars("train/loss")
    assert logged[-1].step == last_line(run)["step"]


@pytest.mark.parametrize(("number", "ended"), [(1, "stopped"), (2, "failed")])
def test_sigint_ends_a_sweep(command, plugin, number, ended):
    """The first signal stops the job after the step, a second one at once; no other job starts."""
    callbacks = f"callbacks=[signals] callbacks.signals.number={number}"
    status, _, err = command(f"train --plugins {plugin} {callbacks} loggers=[] -m seed=1,2,3")
    assert (status, err) == (130, "")
    (run,) = Path("runs/default").glob("2*/0*")
    found = json.loads((run / "status.json").read_text())
    assert (found["status"], found["step"]) == (ended, 3)


def test_a_closed_output_pipe_ends_the_command_with_status_141(tmp_path):
    line = f"{shlex.quote(FRAMEWORK)} --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("141\n", "")
