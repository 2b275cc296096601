"""A sweep from its command to its table, resumed sweeps, and sweeps in TensorBoard."""

import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import (
    api_pb2,
    backend_context,
    get_experiment,
    list_session_groups,
)

from framework.runs.folder import read_config, resolve_run
from framework.runs.sweep_files import Trial
from framework.runtime.display.console import console
from framework.tuning.sweep.display import LineDisplay, LiveTable, OutputCapture
from framework.tuning.sweep.folder import SweepFolder, run_name
from framework.tuning.sweep.sweep import joined_experiments, shared_settings
from framework.tuning.sweep.table import (
    best_trial,
    grouped,
    pareto_front,
    ranked,
    results_table,
    summary,
    table_text,
)
from sweeps import rows, table_of

QUICK = (
    "model.width=8 model.depth=1 trainer.max_steps=4 callbacks=[checkpoint] "
    "loggers=[json_lines] data=blobs"
)
PLUGIN = """\
import os
from framework import Callback, callbacks

@callbacks.register("fragile")
class Fragile(Callback):
    changes_training = False

    def __init__(self, at: str = "never"):
        self.at = at

    def on_step_end(self, trainer):
        if os.path.exists(self.at) and trainer.seed == 1 and trainer.state.step == 3:
            1 / 0
"""


@pytest.fixture
def command(command, tmp_path, forget_plugins):
    """Run a command in a folder with the plugin."""
    (tmp_path / "fragile.py").write_text(PLUGIN)
    return command


def test_a_sweep_leaves_a_run_for_each_trial_and_prints_a_table(command):
    swept = "-m optimizer.lr=1e-4,1e-1 'seed=range(3)' sweep.name=s sweep.metric=val/accuracy"
    status, out, err = command(f"train {QUICK} {swept}")
    assert (status, err) == (0, "")
    sweep = Path("runs/default/s")
    runs = sorted(path.name for path in sweep.glob("0*"))
    assert runs[:2] == ["000_lr-0.0001_seed-0", "001_lr-0.0001_seed-1"]
    assert len(runs) == 6
    ended = [row for row in rows() if row["state"] == "done"]
    assert [row["number"] for row in ended] == [0, 1, 2, 3, 4, 5]
    assert ended[4]["settings"] == {"optimizer.lr": 0.1, "seed": 1}
    assert ended[4]["steps"] == 4
    header, (first, second) = table_of(out)
    metrics = ["val/accuracy", "val/loss", "test/loss", "test/accuracy"]
    assert header == ["lr", "seeds", *metrics, "state"]
    assert (first[:2], second[:2]) == (["0.1", "3"], ["0.0001", "3"]), "the higher accuracy first"
    best = max(ended[3:], key=lambda row: row["metrics"]["val/accuracy"])
    assert f"best     {sweep / best['folder']}  val/accuracy" in out
    assert read_config(resolve_run(sweep / "best")) == read_config(sweep / best["folder"])
    config = read_config(sweep / runs[0])
    assert (config["seed"], config["optimizer"]["lr"]) == (0, 1e-4)
    assert "sweep" not in config
    assert "epoch" not in out, "output of trials is in their run folders"
    assert "{" not in out, "JSON is printed for --json only"
    status, out, _ = command(f"eval {sweep}/best --json")
    assert json.loads(out)["metrics"]["test/loss"] == pytest.approx(best["metrics"]["test/loss"])


def test_the_output_of_a_trial_is_in_its_run_folder(command):
    line = QUICK.replace("[checkpoint]", "[progress]")
    status, out, err = command(f"train {line} -m seed=1,2 sweep.name=s")
    assert (status, err) == (0, "")
    first, second = out.splitlines()[:2]
    assert first.startswith("000 seed=1  ")
    assert second.startswith("001 seed=2  ")
    assert "step 4/4" in Path("runs/default/s/000_seed-1/output.txt").read_text()


@pytest.fixture
def broken_sweep(command):
    """Return the command and the folder of a sweep whose trial with seed 1 has failed."""
    line = f"train --plugins fragile.py {QUICK} +callbacks=fragile callbacks.fragile.at=break -m"
    Path("break").touch()
    status, out, _ = command(f"{line} 'seed=range(3)'")
    os.remove("break")
    assert status == 1
    assert "failed   001_seed-1: ZeroDivisionError: division by zero (fragile.py:" in out
    assert "resume   the same command with" in out
    (folder,) = Path("runs/default").glob("2*")
    return line, folder


def test_a_resumed_sweep_runs_only_failed_trials(broken_sweep, command):
    line, folder = broken_sweep
    done = [folder / "000_seed-0/metrics.jsonl", folder / "002_seed-2/metrics.jsonl"]
    written = [file.stat().st_mtime_ns for file in done]
    status, out, _ = command(f"{line} 'seed=range(3)' resume=auto")
    assert status == 0
    message = f"resuming {folder}, of which 2 trials are finished"
    assert out.startswith(f"{message}\n001 seed=1  val/loss")
    assert [file.stat().st_mtime_ns for file in done] == written
    states = [(row["number"], row["state"]) for row in rows(folder.name)]
    assert states[-2:] == [(1, "running"), (1, "done")]
    assert [trial.state for trial in SweepFolder(folder).trials()] == ["done", "done", "done"]


def test_a_resumed_sweep_with_more_seeds_keeps_the_numbers_of_its_trials(broken_sweep, command):
    line, folder = broken_sweep
    _, out, _ = command(f"{line} seed=5,1,2,0 sweep.name={folder.name} resume=auto")
    ran = [text[:10] for text in out.splitlines()[1:3]]
    assert ran == ["003 seed=5", "001 seed=1"]
    assert table_of(out)[1][0][0] == "4"


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        ("optimizer.lr=1,2 resume=auto", "is a sweep of seed, got optimizer.lr: choose another"),
        (
            "'seed=range(3)' resume=auto model.dropout=0.3",
            "was started without model.dropout=0.3: use the same settings, or choose another",
        ),
        ("'seed=range(3)'", "exists already: choose another sweep.name, or .* resume=auto"),
    ],
)
def test_another_sweep_of_the_same_name_is_refused(broken_sweep, command, swept, message):
    line, folder = broken_sweep
    status, _, err = command(f"{line} {swept} sweep.name={folder.name}")
    assert (status, err.count("\n")) == (2, 1)
    assert re.search(message, err)


def test_shared_settings_leave_out_swept_keys_with_slashes():
    command = ["model/activation=relu,gelu", "seed=1", "hydra/launcher=joblib"]
    request = {"command": command, "swept": ["model.activation"]}
    assert shared_settings(request) == {"seed=1"}


def test_tensorboard_compares_the_trials(command):
    line = QUICK.replace("json_lines", "tensorboard")
    command(f"train {line} -m optimizer.lr=1e-3,1e-1 optimizer=adamw,sgd sweep.name=s")
    folder = "runs/default/s"
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(folder)
    multiplexer.Reload()
    assert sorted(multiplexer.Runs()) == sorted(path.name for path in Path(folder).glob("0*"))
    provider = MultiplexerDataProvider(multiplexer, folder)
    backend = backend_context.Context(TBContext(data_provider=provider, logdir=folder))
    request_context = context.RequestContext()
    request = api_pb2.GetExperimentRequest(include_metrics=True)
    experiment = get_experiment.Handler(request_context, backend, "", request).run()
    differs = {each.name: each.type for each in experiment.hparam_infos if each.differs}
    assert differs["optimizer.lr"] == api_pb2.DATA_TYPE_FLOAT64
    assert differs["optimizer"] == api_pb2.DATA_TYPE_STRING
    metrics = {each.name.tag for each in experiment.metric_infos}
    assert {"val/loss", "val/accuracy"} <= metrics
    assert {"test/loss", "test/accuracy"} <= differs.keys(), "columns, not charts with one point"
    request = api_pb2.ListSessionGroupsRequest(
        slice_size=9, allowed_statuses=[api_pb2.STATUS_SUCCESS], include_metrics=True
    )
    handler = list_session_groups.Handler(request_context, backend, "", request)
    groups = handler.run().session_groups
    assert len(groups) == 4
    for group in groups:
        assert {value.name.tag for value in group.metric_values} == metrics, "no empty column"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"optimizer.lr": 1e-2, "seed": 2}, "003_lr-0.01_seed-2"),
        (
            {"model.activation": "elu", "activation": None},
            "003_model.activation-elu_activation-null",
        ),
        ({"model.blocks": ["flatten", {"name": "linear"}]}, "003_blocks-flatten-name-linear"),
        ({"optimizer.lr": 0.00123456}, "003_lr-0.00123"),
        ({"model.width": [64] * 100}, f"003_width-{'64-' * 12}64"),
        (
            {f"model.width_{name}": 100 for name in "abcd"},
            "003_width_a-100_width_b-100_width_c-100",
        ),
    ],
)
def test_a_run_folder_is_named_after_number_and_settings(settings, name):
    assert run_name(3, settings) == name
    assert len(name) <= 48


def trial(number, loss, state="done", **settings):
    metrics = {} if loss is None else {"val/loss": loss, "val/accuracy": 1 - loss / 10}
    return Trial(number, settings, f"{number:03}", state, metrics)


TRIALS = [
    trial(0, 3.0, lr=1, seed=0),
    trial(1, 1.0, lr=1, seed=1),
    trial(2, 2.2, lr=2, seed=0),
    trial(3, float("nan"), lr=3, seed=0),
    trial(4, None, "failed", lr=4, seed=0),
    trial(5, 0.1, "pruned", lr=5),
]


def test_trials_that_differ_in_seeds_are_grouped_and_the_best_group_is_first():
    found = ranked(grouped(TRIALS), {"val/loss": "min"})
    assert [group.settings["lr"] for group in found][:2] == [1, 2]
    assert (found[0].mean("val/loss"), found[0].error("val/loss")) == (2.0, pytest.approx(1.0))
    last = {group.settings["lr"] for group in found[2:]}
    assert last == {3, 4, 5}, "NaN, failed and pruned ones are last"
    assert ranked(grouped(TRIALS[:3]), {"val/loss": "max"})[0].settings == {"lr": 2}
    assert best_trial(TRIALS, {"val/loss": "min"}).number == 1
    assert best_trial(TRIALS[3:], {"val/loss": "min"}) is None


def test_the_pareto_front_of_two_objectives():
    points = [(1, 1), (2, 3), (1, 0), (3, 2)]
    trials = []
    for number, (a, b) in enumerate(points):
        trials.append(Trial(number, {"x": number}, state="done", metrics={"a": a, "b": b}))
    front = pareto_front(grouped(trials), {"a": "min", "b": "max"})
    assert [group.settings["x"] for group in front] == [0, 1]


def test_the_lines_below_the_table(tmp_path):
    lines = list(summary(SweepFolder(tmp_path / "s"), TRIALS, {"val/loss": "min"}))
    assert lines[0] == "failed   004: "
    assert lines[1].startswith("trials   6: 4 done, 1 failed, 1 pruned; 0 steps")
    assert lines[2] == f"best     {tmp_path}/s/001  val/loss 1"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_live_table_shows_running_trials_and_their_last_line(tmp_path, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    live = LiveTable({"val/loss": "min"}, TRIALS[:2], planned=3)
    live.trial_started(TRIALS[2])
    live.next_refresh = 0.0
    with OutputCapture(tmp_path / "missing", live).capturing():
        print("step 7/9\nstep 8/9\nincomplete line", end="")
    live.trial_ended(TRIALS[2])
    live.close()
    drawn = stream.getvalue()
    assert "002 lr=2 seed=0  step 8/9" in drawn
    assert "3 of 3 trials" in drawn
    assert "incomplete line" not in drawn


def test_without_a_terminal_each_trial_gives_a_line(capsys):
    display = LineDisplay({"val/loss": "min"})
    for each in (TRIALS[0], *failures("no", "no", "odd")):
        display.trial_ended(each)
    assert capsys.readouterr().out.splitlines() == [
        "000 lr=1 seed=0  val/loss 3  0.0 s",
        "001 a=null  failed  1.5 s: no",
        "002 a=null  failed  1.5 s: the same error as trial 001",
        "003 a=null  failed  1.5 s: odd",
    ]


def failures(*errors):
    trials = []
    for number, error in enumerate(errors, 1):
        trial = Trial(number, {"a": None}, f"{number:03}", "failed", seconds=1.5, error=error)
        trials.append(trial)
    return trials


def test_the_summary_names_each_error_once_and_explains_the_values(tmp_path):
    done = replace(TRIALS[0], metrics={"val/loss": 3.0, "test/loss": 2.0})
    trials = [done, *failures("no", "no", "odd")]
    lines = list(summary(SweepFolder(tmp_path / "a b"), trials, {"val/loss": "min"}))
    assert lines[:2] == ["failed   2 trials, 001 first: no", "failed   003: odd"]
    assert lines[2].startswith(
        "values   val/... after the last step; test/... of the best checkpoint"
    )
    assert lines[-1] == f"watch    framework board --root '{tmp_path}/a b'"


def test_the_table_is_narrow_for_long_values():
    widths = [list(range(100)), list(range(101))]
    trials = [Trial(number, {"width": width}, state="done") for number, width in enumerate(widths)]
    written = io.StringIO()
    console(written).print(results_table(trials, {"val/loss": "min"}))
    assert max(map(len, written.getvalue().splitlines())) < 80
    assert "[0, 1, 2, 3, 4," in written.getvalue()


def test_a_long_value_is_shortened_in_the_table():
    assert table_text(list(range(100))) == "[0, 1, 2, 3, 4, 5, 6, 7,..., 97, 98, 99]"
    assert table_text(None) == "null"
    assert table_text(0.1) == "0.1"
    assert table_text("sgd") == "sgd"


def test_a_sweep_over_experiments_has_a_folder_of_its_own(command, tmp_path):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "base.yaml").write_text("# The base.\nmodel: {name: mlp, width: 8}\n")
    (folder / "wide.yaml").write_text("model: {name: mlp, width: 16}\n")
    line = "-m experiment=base,wide trainer.max_steps=1 loggers=[json_lines] sweep.name=s"
    status, _, err = command(f"train {line}")
    assert status == 0, err
    found = sorted(path.name for path in Path("runs/base+wide/s").glob("0*"))
    assert found == ["000_experiment-base", "001_experiment-wide"]
    status, out, _ = command(f"train {line} resume=auto")
    assert status == 0
    assert "of which 2 trials are finished" in out
    listed = json.loads(command("list experiment --json")[1])["experiments"]
    summaries = {each["name"]: each["summary"] for each in listed}
    assert summaries["base"] == "The base."
    assert summaries["wide"] == ""
    assert "base" in command("list experiments")[1]


def test_the_folder_of_many_experiments_has_a_short_name():
    assert joined_experiments("experiment=base,wide") == "base+wide"
    names = ",".join(f"experiment_{number}" for number in range(20))
    assert joined_experiments(f"experiment={names}") == "experiment_0+19_more"


def test_a_resumed_sweep_keeps_the_folders_of_its_trials(command):
    """An older version gave the folders longer names; a trial that was stopped continues there."""
    line = f"train {QUICK} -m optimizer.lr=0.00123456,0.01 sweep.name=s"
    assert command(line)[0] == 0
    folder = Path("runs/default/s")
    before = "000_lr-0.00123456"
    (folder / "000_lr-0.00123").rename(folder / before)
    lines = (folder / "sweep.jsonl").read_text().replace("000_lr-0.00123", before).splitlines()
    for index, line_of_trial in enumerate(lines):
        if before in line_of_trial:
            lines[index] = line_of_trial.replace('"state": "done"', '"state": "stopped"')
    assert any('"stopped"' in each for each in lines)
    (folder / "sweep.jsonl").write_text("\n".join([*lines, ""]))
    status, _, err = command(f"{line} resume=auto")
    assert status == 0, err
    names = sorted(path.name for path in folder.glob("0*"))
    assert names == [before, "001_lr-0.01"]
