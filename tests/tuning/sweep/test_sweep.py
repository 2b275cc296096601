"""A sweep from its command to its table: trials apart from each other, resumed, and shown in TensorBoard."""

import io
import json
import os
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
from framework.runtime.console import console
from framework.tuning.sweep.display import Lines, LiveTable, Output
from framework.tuning.sweep.folder import SweepFolder, Trial, run_name
from framework.tuning.sweep.table import (
    best_trial,
    ending,
    grouped,
    on_front,
    ranked,
    table,
    table_text,
)
from sweeps import rows, table_of

QUICK = "model.width=8 model.depth=1 trainer.max_steps=4 callbacks=[checkpoint] loggers=[json_lines] data=blobs"
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
    """Run a command beside the plugin."""
    (tmp_path / "fragile.py").write_text(PLUGIN)
    return command


def test_a_sweep_leaves_a_run_folder_for_each_trial_and_a_table(command):
    line = f"train {QUICK} -m optimizer.lr=1e-4,1e-1 'seed=range(3)' sweep.name=s sweep.metric=val/accuracy"
    status, out, err = command(line)
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
    assert header == [
        "lr",
        "seeds",
        "val/accuracy",
        "val/loss",
        "test/loss",
        "test/accuracy",
        "state",
    ]
    assert (first[:2], second[:2]) == (["0.1", "3"], ["0.0001", "3"]), "the larger accuracy first"
    best = max(ended[3:], key=lambda row: row["metrics"]["val/accuracy"])
    assert f"best     {sweep / best['folder']}  val/accuracy" in out
    assert read_config(resolve_run(sweep / "best")) == read_config(sweep / best["folder"])
    config = read_config(sweep / runs[0])
    assert (config["seed"], config["optimizer"]["lr"]) == (0, 1e-4)
    assert "sweep" not in config
    assert "epoch" not in out, "what trials print themselves is in their folders"
    status, out, _ = command(f"eval {sweep}/best --json")
    assert json.loads(out)["test/loss"] == pytest.approx(best["metrics"]["test/loss"])


def test_what_a_trial_prints_is_in_its_folder(command):
    line = QUICK.replace("[checkpoint]", "[progress]")
    status, out, err = command(f"train {line} -m seed=1,2 sweep.name=s")
    assert (status, err) == (0, "")
    assert [line.split("  ")[0] for line in out.splitlines()[:2]] == ["000 seed=1", "001 seed=2"]
    assert "step 4/4" in Path("runs/default/s/000_seed-1/output.txt").read_text()


def test_a_resumed_sweep_runs_what_is_missing(command):
    fragile = f"train --plugins fragile.py {QUICK} +callbacks=fragile callbacks.fragile.at=break"
    Path("break").touch()
    status, out, _ = command(f"{fragile} -m 'seed=range(3)'")
    assert status == 1
    (sweep,) = Path("runs/default").glob("2*")
    assert "failed   001_seed-1: ZeroDivisionError: division by zero (fragile.py:" in out
    assert "go on    the same command with" in out
    untouched = [
        (sweep / name / "metrics.jsonl").stat().st_mtime_ns for name in ("000_seed-0", "002_seed-2")
    ]
    os.remove("break")
    status, out, _ = command(f"{fragile} -m 'seed=range(3)' resume=auto")
    assert status == 0
    assert out.startswith(
        f"going on with {sweep}, of which 2 trials are done\n001 seed=1  val/loss"
    )
    assert [
        (sweep / name / "metrics.jsonl").stat().st_mtime_ns for name in ("000_seed-0", "002_seed-2")
    ] == untouched
    states = [(row["number"], row["state"]) for row in rows(sweep.name)]
    assert states[-2:] == [(1, "running"), (1, "done")]
    assert [trial.state for trial in SweepFolder(sweep).trials()] == ["done", "done", "done"]
    status, out, _ = command(f"{fragile} -m seed=5,1,2,0 sweep.name={sweep.name} resume=auto")
    assert [line[:10] for line in out.splitlines()[1:2]] == ["003 seed=5"], (
        "more seeds: the others keep their numbers"
    )
    assert table_of(out)[1][0][0] == "4"
    status, _, err = command(f"{fragile} -m optimizer.lr=1,2 sweep.name={sweep.name} resume=auto")
    assert (status, err.count("\n")) == (2, 1)
    assert "tries values of seed, not of optimizer.lr: choose another sweep.name" in err
    status, _, err = command(
        f"{fragile} -m 'seed=range(3)' sweep.name={sweep.name} resume=auto model.dropout=0.3"
    )
    assert (status, err.count("\n")) == (2, 1)
    assert (
        "was begun without model.dropout=0.3: leave that as it was, or choose another sweep.name"
        in err
    )
    status, _, err = command(f"{fragile} -m 'seed=range(3)' sweep.name={sweep.name}")
    assert "exists already: choose another sweep.name, or go on with it by resume=auto" in err


def test_tensorboard_compares_the_trials(command):
    line = QUICK.replace("json_lines", "tensorboard")
    command(f"train {line} -m optimizer.lr=1e-3,1e-1 optimizer=adamw,sgd sweep.name=s")
    folder = "runs/default/s"
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(folder)
    multiplexer.Reload()
    assert sorted(multiplexer.Runs()) == sorted(path.name for path in Path(folder).glob("0*"))
    provider = MultiplexerDataProvider(multiplexer, folder)
    page, asking = (
        backend_context.Context(TBContext(data_provider=provider, logdir=folder)),
        context.RequestContext(),
    )
    experiment = get_experiment.Handler(
        asking, page, "", api_pb2.GetExperimentRequest(include_metrics=True)
    ).run()
    differs = {each.name: each.type for each in experiment.hparam_infos if each.differs}
    assert differs["optimizer.lr"] == api_pb2.DATA_TYPE_FLOAT64
    assert differs["optimizer"] == api_pb2.DATA_TYPE_STRING
    metrics = {each.name.tag for each in experiment.metric_infos}
    assert {"val/loss", "val/accuracy", "test/loss", "test/accuracy"} <= metrics
    request = api_pb2.ListSessionGroupsRequest(
        slice_size=9, allowed_statuses=[api_pb2.STATUS_SUCCESS]
    )
    request.include_metrics = True
    groups = list_session_groups.Handler(asking, page, "", request).run().session_groups
    assert len(groups) == 4
    assert all({value.name.tag for value in group.metric_values} == metrics for group in groups), (
        "no empty column"
    )


def test_the_name_of_a_trials_folder():
    assert run_name(3, {"optimizer.lr": 1e-2, "seed": 2}) == "003_lr-0.01_seed-2"
    assert (
        run_name(0, {"model.activation": "elu", "activation": None})
        == "000_model.activation-elu_activation-null"
    )
    assert (
        run_name(1, {"model.blocks": ["flatten", {"name": "linear"}]})
        == "001_blocks-flatten-name-linear"
    )
    assert len(run_name(12, {"model.width": [64] * 100})) <= 80


def trial(number, loss, state="done", **settings):
    metrics = {} if loss is None else {"val/loss": loss, "val/accuracy": 1 - loss / 10}
    return Trial(number, settings, f"{number:03}", state, metrics)


TRIALS = [trial(0, 3.0, lr=1, seed=0), trial(1, 1.0, lr=1, seed=1), trial(2, 2.2, lr=2, seed=0)]
TRIALS += [
    trial(3, float("nan"), lr=3, seed=0),
    trial(4, None, "failed", lr=4, seed=0),
    trial(5, 0.1, "pruned", lr=5),
]


def test_seeds_are_put_together_and_the_best_comes_first():
    found = ranked(grouped(TRIALS), {"val/loss": "min"})
    assert [group.settings["lr"] for group in found][:2] == [1, 2]
    assert (found[0].mean("val/loss"), found[0].error("val/loss")) == (2.0, pytest.approx(1.0))
    assert {group.settings["lr"] for group in found[2:]} == {3, 4, 5}, (
        "NaN, failed and pruned ones come last"
    )
    assert ranked(grouped(TRIALS[:3]), {"val/loss": "max"})[0].settings == {"lr": 2}
    assert best_trial(TRIALS, {"val/loss": "min"}).number == 1
    assert best_trial(TRIALS[3:], {"val/loss": "min"}) is None


def test_the_front_of_several_objectives():
    groups = grouped([trial(n, None, x=n) for n in range(4)])
    for group, (a, b) in zip(groups, [(1, 1), (2, 3), (1, 0), (3, 2)], strict=True):
        group.trials[0].metrics, group.trials[0].state = {"a": a, "b": b}, "done"
    assert [group.settings["x"] for group in on_front(groups, {"a": "min", "b": "max"})] == [0, 1]


def test_the_lines_below_the_table(tmp_path):
    lines = list(ending(SweepFolder(tmp_path / "s"), TRIALS, {"val/loss": "min"}))
    assert lines[0] == "failed   004: "
    assert lines[1].startswith("trials   6: 4 done, 1 failed, 1 pruned; 0 steps")
    assert lines[2] == f"best     {tmp_path}/s/001  val/loss 1"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_live_table_and_a_trials_output(tmp_path, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    live = LiveTable({"val/loss": "min"}, TRIALS[:2], planned=3)
    live.begins(TRIALS[2])
    live.next_drawing = 0.0
    with Output(tmp_path / "none yet", live).capturing():
        print("step 7/9\nstep 8/9\nhalf a line", end="")
    live.ends(TRIALS[2])
    live.close()
    drawn = stream.getvalue()
    assert "002 lr=2 seed=0  step 8/9" in drawn
    assert "3 of 3 trials" in drawn
    assert "half a line" not in drawn


def test_a_line_for_each_trial_where_nobody_looks(capsys):
    lines = Lines({"val/loss": "min"})
    for each in (TRIALS[0], *failures("no", "no", "odd")):
        lines.ends(each)
    assert capsys.readouterr().out.splitlines() == [
        "000 lr=1 seed=0  val/loss 3  0.0 s",
        "001 a=null  failed  1.5 s: no",
        "002 a=null  failed  1.5 s: the same error as trial 001",
        "003 a=null  failed  1.5 s: odd",
    ]


def failures(*errors):
    common = {"settings": {"a": None}, "state": "failed", "seconds": 1.5}
    return [
        Trial(number, folder=f"{number:03}", error=error, **common)
        for number, error in enumerate(errors, 1)
    ]


def test_the_end_names_each_error_once_and_what_the_values_are_of(tmp_path):
    done = replace(TRIALS[0], metrics={"val/loss": 3.0, "test/loss": 2.0})
    lines = list(
        ending(
            SweepFolder(tmp_path / "a b"), [done, *failures("no", "no", "odd")], {"val/loss": "min"}
        )
    )
    assert lines[:2] == ["failed   2 trials, 001 first: no", "failed   003: odd"]
    assert lines[2].startswith(
        "values   val/... after the last step; test/... of the best checkpoint"
    )
    assert lines[-1] == f"watch    framework board --root '{tmp_path}/a b'"


def test_a_long_value_does_not_make_the_table_wide():
    trials = [
        Trial(number, {"width": list(range(100 + number))}, state="done") for number in range(2)
    ]
    written = io.StringIO()
    console(written).print(table(trials, {"val/loss": "min"}))
    assert max(map(len, written.getvalue().splitlines())) < 80
    assert "[0, 1, 2, 3, 4," in written.getvalue()


def test_a_long_value_does_not_widen_the_table():
    assert table_text(list(range(100))) == "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11..."
    assert (table_text(None), table_text(0.1), table_text("sgd")) == ("null", "0.1", "sgd")
