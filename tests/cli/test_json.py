"""`--json`: one document on standard output for each command, with documented keys and types."""

import json
import math
import sys
from pathlib import Path
from types import NoneType

import numpy
import pytest

from framework.cli import tell
from framework.cli.json_output import SCHEMA, as_json, json_output, print_json
from framework.cli.main import COMMANDS, main
from framework.errors import ConfigError, Facts, Problem
from runs import run_training

Number = (int, float)
Text = (str, NoneType)
Known = (int, float, NoneType)
PROBLEM = {
    "message": str,
    "setting": Text,
    "value": object,
    "expected": Text,
    "source": Text,
    "suggestion": Text,
}
ERROR = PROBLEM | {"type": str, "exit_status": int, "problems": [PROBLEM]}
METRICS = {"val/loss": Number, "val/accuracy": Number, ...: Number}
RESULT = {
    "run": str,
    "metrics": METRICS,
    "weights": {...: str},
    "stopped": (dict, NoneType),
    "signal": (int, NoneType),
    "steps": int,
    "seconds": Number,
    "fit_steps": int,
    "fit_seconds": Number,
    "shares": {...: Number},
    "advice": Text,
}
TRIAL = {
    "number": int,
    "run": Text,
    "state": str,
    "settings": dict,
    "metrics": {...: Known},
    "steps": int,
    "seconds": Number,
    "error": Text,
}
SWEEP = {"sweep": str, "objectives": {"val/loss": str}, "best": Text, "trials": [TRIAL]}
BEST = {
    "path": str,
    "metric": str,
    "direction": str,
    "value": Number,
    "step": int,
    "compared": int,
}
ROW = {"name": str, "values": list}
DIFF = {"runs": [{"name": str, "path": str, "state": str, "events": list, "problems": list}]}
DIFF |= {part: [ROW] for part in ("settings", "code", "versions", "data", "metrics", "time")}
EXPLAINED = {"settings": [{"setting": str, "value": object, "places": list, "note": Text}]}
SPEED = {
    "seconds": Known,
    "steps": (int, NoneType),
    "sessions": (int, NoneType),
    "activities": list,
    "of_a_step": list,
    "samples_per_second": Known,
    "slowest_process": object,
    "advice": list,
    "notes": list,
}
EXTREMES = dict.fromkeys(("last", "lowest", "lowest_step", "highest", "highest_step"), Known)
WATCHED = {
    "path": str,
    "state": str,
    "reason": Text,
    "step": int,
    "total_steps": (int, NoneType),
    "samples_per_second": Known,
    "eta_seconds": Known,
    "checkpoint_step": (int, NoneType),
    "checkpoint_age": Known,
    "processes": (int, NoneType),
    "metrics": {"val/loss": EXTREMES, ...: EXTREMES},
    "warnings": [str],
}
SETTING = {"name": str, "type": str, "doc": str, "required": bool, "schema": dict, ...: object}
PART = {
    "kind": str,
    "key": str,
    "many": bool,
    "name": str,
    "aliases": [str],
    "summary": str,
    "doc": str,
    "settings": [SETTING],
    "source": str,
    "registered": str,
    "module": str,
    "package": Text,
    "version": Text,
}
SMALL = "model.width=8 loader.batch_size=400 trainer.max_epochs=1 callbacks=[checkpoint]"
LABELS = {"path": str, "tags": [str], "note": Text}
CHECK = {"passed": bool, "parts": [{"text": str, "seconds": Known}]}
RATES = {"rates": [Number], "losses": [Number], "suggestion": Number, "lowest": Number}
EVALUATED = {"run": str, "checkpoint": str, "split": str, "worst": [dict], "curves": dict}
EVALUATED |= {"files": [str]}
EXPORTED = {"folder": str, "files": {...: int}, "difference": Number, "samples": int}
EXPORTED |= {"split": str, "metrics": {...: Number}, "seconds": Number}
DOCUMENTS = [
    (f"train {SMALL} run.name=first", RESULT),
    ("rerun default/first run.name=second seed=1", RESULT | {"differences": [str]}),
    ("resume default/first trainer.max_epochs=2", RESULT),
    ("eval default/first", {"metrics": {"test/loss": Number, "test/accuracy": Number}}),
    ("eval default/first --worst 3 --curves", EVALUATED),
    ("landscape default/first --points 3", {"landscapes": [dict], "files": [str]}),
    ("predict default/first --input rows.npy --output p.csv", {"output": str, "rows": int}),
    ("export default/first --to safetensors", EXPORTED),
    ("best", BEST),
    ("runs", {"root": str, "runs": [dict]}),
    ("diff default/first default/second", DIFF),
    ("explain optimizer.lr", EXPLAINED),
    ("explain optimizer --run default/first", EXPLAINED),
    ("explain speed default/first", SPEED),
    ("watch", {"runs": [WATCHED]}),
    ("tell default/first checkpoint", {"run": str, "events": [dict]}),
    ("runs tag default/first good", LABELS),
    ("runs note default/first slow", LABELS),
    ("runs remove default/first", {"removed": [{"path": str, "bin": str}]}),
    ("runs --bin", {"root": str, "runs": [dict]}),
    ("runs restore default/first", {"restored": [str]}),
    ("runs empty --yes", {"deleted": int}),
    (f"train -m {SMALL} seed=1,2 sweep.name=both", SWEEP),
    ("watch default/both", {"runs": [WATCHED]}),
    (f"plan {SMALL}", {"parameters": int, "layers": list, ...: object}),
    (f"check {SMALL} strategy=single", CHECK),
    ("find lr model.width=8", RATES),
    ("list", {"parts": {"optimizer": [PART], ...: [PART]}}),
    ("list optimizer", {"parts": {"optimizer": [PART]}}),
    ("list experiment", {"experiments": [{"name": str, "summary": str, "folder": str}]}),
    ("show optimizer/sgd", PART | {"plots": list}),
    ("show relu gelu", {"parts": [PART | {"plots": list}]}),
    ("tour --list", {"lessons": [{"lesson": int, "title": str, "commands": [str]}]}),
    ("schema", {"experiment_schema": dict}),
    ("schema --output experiment.schema.json", {"output": str}),
]


def check_form(value, form, path="$"):
    """Assert that a document has exactly the keys of a form, and their types.

    A form is a type, several types, [form of the items], or {key: form}; `...` is any other key.
    """
    if isinstance(form, list):
        assert isinstance(value, list), path
        for number, item in enumerate(value):
            check_form(item, form[0], f"{path}[{number}]")
    elif isinstance(form, dict):
        assert isinstance(value, dict), path
        named = form.keys() - {...}
        assert named <= value.keys(), path
        if ... not in form:
            assert value.keys() == named, path
        for key, item in value.items():
            check_form(item, form.get(key, form.get(...)), f"{path}.{key}")
    else:
        assert isinstance(value, form), f"{path}: {value!r}"


def without_constants(text):
    raise AssertionError(f"{text} is not JSON")


def document(command, line, status=0):
    """Return the document of a command without `schema`, which is the first key of each."""
    found, out, err = command(f"{line} --json")
    assert (found or 0) == status, err
    content = json.loads(out, parse_constant=without_constants)
    assert next(iter(content.items())) == ("schema", SCHEMA)
    del content["schema"]
    return content


def test_the_checker_of_forms_can_fail():
    for value, form in (({"a": 1}, {}), ({}, {"a": int}), (["a"], [int]), ({"b": "x"}, {...: int})):
        with pytest.raises(AssertionError):
            check_form(value, form)


def test_the_document_of_each_command(command, one_thread, monkeypatch):
    """In order: a command may need the run of an earlier one."""
    monkeypatch.setattr(tell, "check_running", lambda run: None)
    row = {"do": "checkpoint", "step": 3, "checkpoint": "step-3"}
    monkeypatch.setattr(tell, "answers", lambda run, commands, seconds: [row])
    numpy.save("rows.npy", numpy.zeros((3, 64), "float32"))
    for line, form in DOCUMENTS:
        check_form(document(command, line), form, line)
    commands = {line.split()[0] for line, _ in DOCUMENTS}
    assert commands == COMMANDS.keys() - {"trust", "data", "board", "completion"}


def test_the_differences_of_runs(command, one_thread):
    for name in ("first", "second optimizer.lr=0.01"):
        run_training(*f"{SMALL} run.name={name}".split())
    found = document(command, "diff default/first default/second")
    assert [row["name"] for row in found["settings"]] == ["optimizer.lr"]
    assert len(document(command, "runs")["runs"]) == 2


def test_a_sweep_with_failed_trials_has_results_and_an_error(command, one_thread):
    found = document(command, f"train -m {SMALL} init_from=null,missing.safetensors", status=2)
    check_form(found, SWEEP | {"error": ERROR})
    assert [trial["state"] for trial in found["trials"]] == ["done", "failed"]
    assert found["trials"][0]["settings"] == {"init_from": None}
    assert found["best"] == found["trials"][0]["run"]
    assert "missing.safetensors" in found["trials"][1]["error"]
    [row] = document(command, "runs")["runs"]
    assert (row["kind"], row["states"]) == ("sweep", {"done": 1})


def test_a_failed_check_has_parts_and_an_error(command, one_thread):
    found = document(command, f"check {SMALL} optimizer.lr=1e-30 strategy=single", status=2)
    check_form(found, CHECK | {"error": ERROR})
    assert not found["passed"]


def test_a_part_is_the_same_in_lists(command):
    parts = document(command, "list")["parts"]
    assert document(command, "list optimizer")["parts"] == {"optimizer": parts["optimizer"]}
    assert document(command, "show optimizer/sgd --no-plot") in parts["optimizer"]


def test_the_schema_of_experiment_files_is_the_same_without_the_option(command):
    schema = document(command, "schema")["experiment_schema"]
    command("schema --output experiment.schema.json")
    assert json.loads(Path("experiment.schema.json").read_text()) == schema
    assert json.loads(command("schema")[1]) == schema


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "train optimizer.lr=-1",
            {"setting": "optimizer.lr", "value": -1, "expected": "float in (0, inf)"}
            | {"source": "command line", "suggestion": None},
        ),
        (
            "plan model=mpl",
            {"setting": "model", "value": "mpl", "expected": "name of a model"}
            | {"source": "command line", "suggestion": "mlp"},
        ),
        ("check sed=1", {"setting": "sed", "value": 1, "suggestion": "seed"}),
        (
            "find lr trainer.max_epoch=1",
            {"setting": "trainer.max_epoch", "suggestion": "max_epochs"},
        ),
        ("train loader=3", {"setting": "loader", "value": 3}),
        ("train data=csv", {"setting": "data.path", "expected": "path"}),
        ("train seed", {"value": "seed", "expected": "KEY=VALUE"}),
        ("train experiment=spiral", {"setting": "experiment", "suggestion": "spirals"}),
        ("train --repeat x", {"setting": "--repeat", "value": "x", "expected": "an integer"}),
        ("eval run --splt val", {"setting": "--splt", "suggestion": "--split"}),
        ("eval run --split vall", {"setting": "--split", "value": "vall", "suggestion": "val"}),
        ("show adam --steps 1", {"setting": "--steps", "value": 1}),
        ("runs --limit -1", {"setting": "--limit", "expected": "at least 0"}),
        ("show optimizer/sdg", {"value": "sdg", "suggestion": "sgd"}),
        ("trian", {"value": "trian", "suggestion": "train"}),
        ("eval runs/default/missing", {"type": "RunError", "setting": None}),
        ("board", {"setting": "--json"}),
        ("train --cfg job", {"type": "FrameworkError"}),
    ],
)
def test_an_error_is_the_document(command, line, expected):
    found = document(command, line, status=2)
    check_form(found, {"error": ERROR})
    error = found["error"]
    assert {key: error[key] for key in expected} == expected
    assert {key: error[key] for key in PROBLEM} == error["problems"][0]


def test_the_place_in_a_file_is_the_source(command):
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/mine.yaml").write_text("seed: 1\noptimizer: {lr: fast}\n")
    error = document(command, "train experiment=mine", status=2)["error"]
    assert (error["setting"], error["value"]) == ("optimizer.lr", "fast")
    assert error["source"] == "conf/experiment/mine.yaml:2"


def test_all_problems_are_listed(command):
    problems = document(command, "train optimizer.lr=a seed=b", status=2)["error"]["problems"]
    assert sorted(problem["setting"] for problem in problems) == ["optimizer.lr", "seed"]


def test_an_error_is_also_printed_on_stderr(command):
    err = command("trian --json")[2]
    assert "did you mean 'train'?" in err
    assert command("trian")[1:] == ("", err)


def test_output_of_parts_and_child_processes_goes_to_stderr(tmp_path, monkeypatch, capfd):
    Path(tmp_path, "noisy.py").write_text("import os\nprint('one')\nos.system('echo two')\n")
    monkeypatch.chdir(tmp_path)
    with open(1, "w", closefd=False) as stdout, open(2, "w", closefd=False) as stderr:
        monkeypatch.setattr(sys, "stdout", stdout)  # with descriptors 1 and 2, as in a shell
        monkeypatch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit):
            main(["list", "loss", "--json", "--plugins", "noisy.py"])
    out, err = capfd.readouterr()
    assert "loss" in json.loads(out)["parts"]
    assert {"one", "two"} <= set(err.split())


def test_a_signal_before_a_result_is_an_error(command, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    about = COMMANDS["list"]
    monkeypatch.setitem(COMMANDS, "list", type(about)(interrupted, about.summary))
    error = document(command, "list", status=130)["error"]
    assert (error["type"], error["exit_status"]) == ("Interrupted", 130)


def test_help_is_text(command):
    status, out, _ = command("train --json --help")
    assert (status or 0, "usage:" in out) == (0, True)


def test_numbers_that_json_does_not_have_are_null():
    content = {"a": math.nan, "b": [math.inf, 1.5], "c": (-math.inf,), "d": Path("x/y"), "e": 2}
    found = json.loads(as_json(content), parse_constant=without_constants)
    assert found == {"a": None, "b": [None, 1.5], "c": [None], "d": "x/y", "e": 2}


def test_only_the_last_document_is_printed(capsys):
    with json_output(True) as output:
        print("a note")
        print_json({"passed": False})
        print_json({"passed": True})
        output.write(0)
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == ({"schema": SCHEMA, "passed": True}, "a note\n")


def test_problems_keep_their_facts_in_an_error():
    problem = Problem("seed=x: \x1b wrong", Facts("seed", "x"))
    [found] = ConfigError([problem]).problems
    assert isinstance(found, Problem)
    assert (str(found), found.facts) == (r"seed=x: \x1b wrong", Facts("seed", "x"))
