"""`--json`: one document on standard output for each command, with documented keys and types."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from types import NoneType

import numpy
import pytest

from framework.cli.json_output import as_json, json_output, print_json
from framework.cli.main import COMMANDS, main
from framework.errors import ConfigError, Facts, Problem
from run_folders import write_run

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
    "schema": int,
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
EXPLAINED = {"setting": str, "value": object, "places": list, "note": Text}
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
SETTING = {"name": str, "type": str, "doc": str, "required": bool, "schema": dict}
PART = {
    "kind": str,
    "key": str,
    "many": bool,
    "name": str,
    "aliases": [str],
    "summary": str,
    "doc": str,
    "source": str,
    "registered": str,
    "module": str,
    "package": Text,
    "version": Text,
}
SMALL = "model.width=8 loader.batch_size=400 trainer.max_epochs=1 callbacks=[checkpoint]"


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
    found, out, err = command(f"{line} --json")
    assert (found or 0) == status, err
    return json.loads(out, parse_constant=without_constants)


@pytest.fixture
def trained(command, one_thread):
    check_form(document(command, f"train {SMALL} run.name=first"), RESULT)
    return "runs/default/first"


def test_the_checker_of_forms_can_fail():
    for value, form in (({"a": 1}, {}), ({}, {"a": int}), (["a"], [int]), ({"b": "x"}, {...: int})):
        with pytest.raises(AssertionError):
            check_form(value, form)


def test_commands_on_a_run(command, trained):
    found = document(command, f"rerun {trained} run.name=second optimizer.lr=0.01")
    check_form(found, RESULT | {"differences": [str]})
    assert found["run"] == "runs/default/second"
    check_form(document(command, f"resume {trained} trainer.max_epochs=2"), RESULT)
    check_form(document(command, f"eval {trained}"), {"test/loss": Number, "test/accuracy": Number})
    check_form(document(command, "best"), BEST)
    found = document(command, f"diff {trained} runs/default/second")
    check_form(found, DIFF)
    assert "optimizer.lr" in [row["name"] for row in found["settings"]]
    check_form(document(command, "explain optimizer.lr"), [EXPLAINED])
    check_form(document(command, f"explain optimizer.lr --run {trained}"), [EXPLAINED])
    check_form(document(command, f"explain speed {trained}"), SPEED)
    check_form(document(command, "watch"), {"runs": [WATCHED]})
    found = document(command, "runs")
    assert (found["schema"], len(found["runs"])) == (1, 2)
    labels = {"path": str, "tags": [str], "note": Text}
    check_form(document(command, f"runs tag {trained} good"), labels)
    check_form(document(command, f"runs note {trained} slow"), labels)
    moved = {"removed": [{"path": str, "bin": str}]}
    check_form(document(command, f"runs remove {trained}"), moved)
    check_form(document(command, "runs restore default/first"), {"restored": [str]})
    check_form(document(command, "runs empty --yes"), {"deleted": int})
    numpy.save("rows.npy", numpy.zeros((3, 64), "float32"))
    found = document(command, f"predict {trained} --input rows.npy --output p.csv")
    assert found == {"output": "p.csv", "rows": 3}
    found = document(command, f"export {trained} --to safetensors")
    form = {"folder": str, "files": {...: int}, "difference": Number, "samples": int}
    check_form(found, form | {"split": str, "metrics": {...: Number}, "seconds": Number})


def test_a_sweep(command, one_thread):
    found = document(command, f"train -m {SMALL} seed=1,2 sweep.name=both")
    check_form(found, SWEEP)
    assert [trial["settings"] for trial in found["trials"]] == [{"seed": 1}, {"seed": 2}]
    assert found["best"] in [trial["run"] for trial in found["trials"]]
    check_form(document(command, "watch runs/default/both"), {"runs": [WATCHED]})
    [row] = document(command, "runs")["runs"]
    assert (row["kind"], row["states"]) == ("sweep", {"done": 2})


def test_a_sweep_with_failed_trials_has_results_and_an_error(command, one_thread):
    found = document(command, f"train -m {SMALL} init_from=null,missing.safetensors", status=2)
    check_form(found, SWEEP | {"error": ERROR})
    assert [trial["state"] for trial in found["trials"]] == ["done", "failed"]
    assert "missing.safetensors" in found["trials"][1]["error"]


def test_commands_before_a_run(command, one_thread):
    check_form(document(command, f"plan {SMALL}"), {"parameters": int, "layers": list, ...: object})
    numbers = {"rates": [Number], "losses": [Number], "suggestion": Number, "lowest": Number}
    check_form(document(command, "find lr model.width=8"), numbers)
    found = document(command, f"check {SMALL} strategy=single")
    check_form(found, {"passed": bool, "parts": [{"text": str, "seconds": Known}]})
    assert found["passed"]
    found = document(command, f"check {SMALL} optimizer.lr=1e-30 strategy=single", status=2)
    check_form(found, {"passed": bool, "parts": list, "error": ERROR})
    assert not found["passed"]


def test_commands_on_parts(command):
    kinds = document(command, "list")
    check_form(document(command, "list optimizer"), {"optimizer": [dict]})
    part = document(command, "show optimizer/sgd")
    assert part in kinds["optimizer"]
    for setting in part.pop("settings"):
        check_form({key: setting[key] for key in SETTING}, SETTING)
    check_form(part, PART)
    found = document(command, "schema --output experiment.schema.json")
    assert found == {"output": "experiment.schema.json"}
    assert json.loads(Path(found["output"]).read_text()) == document(command, "schema")


def test_tell(command, monkeypatch):
    from framework.cli import tell

    write_run(Path("runs/default/first"))
    row = {"do": "checkpoint", "step": 3, "checkpoint": "step-3"}
    monkeypatch.setattr(tell, "check_running", lambda run: None)
    monkeypatch.setattr(tell, "answers", lambda run, commands, seconds: [row])
    found = document(command, "tell runs/default/first checkpoint")
    assert found == {"run": "runs/default/first", "events": [row]}


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


def test_output_of_parts_and_child_processes_goes_to_stderr(tmp_path):
    """The descriptor of standard output is also redirected, which in-process tests cannot show."""
    Path(tmp_path, "noisy.py").write_text("import os\nprint('one')\nos.system('echo two')\n")
    words = [sys.executable, "-m", "framework", "list", "loss", "--json", "--plugins", "noisy.py"]
    ended = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "loss" in json.loads(ended.stdout)
    assert {"one", "two"} <= set(ended.stderr.split())


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
    assert (json.loads(out), err) == ({"passed": True}, "a note\n")


def test_a_closed_pipe_ends_the_command(tmp_path):
    script = f"{shlex.quote(sys.executable)} -m framework list --json | head -c 10"
    ended = subprocess.run(script, shell=True, cwd=tmp_path, capture_output=True, check=False)
    assert (len(ended.stdout), ended.stderr) == (10, b"")


def test_problems_keep_their_facts_in_an_error():
    problem = Problem("seed=x: \x1b wrong", Facts("seed", "x"))
    [found] = ConfigError([problem]).problems
    assert isinstance(found, Problem)
    assert (str(found), found.facts) == (r"seed=x: \x1b wrong", Facts("seed", "x"))


def test_every_command_with_results_has_the_option(capsys):
    without = {"trust", "data", "board", "completion"}
    for name in COMMANDS.keys() - without:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert "--json" in capsys.readouterr().out, name
