"""`RunFiles` reads any run folder: complete, running, killed, damaged or of a stranger."""

import json
import math
import os

import pytest

from framework.errors import RunError
from framework.runs.run_files import Labels, RunFiles, flattened, run_files
from run_folders import write_run, write_sweep


def test_a_complete_run(tmp_path):
    files = RunFiles(write_run(tmp_path / "a", [0.5, 0.2, 0.3], processes=2, lr=0.01))
    assert files.state == "done"
    assert (files.settings["optimizer"], files.settings["optimizer.lr"]) == ("adamw", 0.01)
    assert "run" not in files.settings  # run.name is a setting, not the name of a part
    assert files.monitor == "val/loss"
    assert files.best("val/loss") == (0.2, 20)
    assert files.best("val/accuracy") == (0.8, 20)
    assert files.last("val/loss") == (0.3, 30)
    assert files.overrides == ["seed=0"]
    assert (files.processes, files.seconds) == (2, 2.5)
    assert (files.sweep, files.trial) == (None, None)
    assert files.problems == []


def test_a_trial_knows_its_sweep(tmp_path):
    sweep = write_sweep(tmp_path / "grid", (0.1, [0.5]), (0.2, [0.4]))
    files = RunFiles(sweep / "001_lr-0.2")
    assert (files.sweep, files.trial) == (sweep, 1)


def test_settings_have_dotted_keys():
    tree = {"optimizer": {"name": "sgd", "lr": 1}, "callbacks": {"ema": {"decay": 0.9}, "x": {}}}
    assert flattened(tree) == {
        "optimizer": "sgd",
        "optimizer.lr": 1,
        "callbacks.ema": {},
        "callbacks.ema.decay": 0.9,
        "callbacks.x": {},
    }


def test_a_torn_last_line_and_lines_without_a_step_are_skipped(tmp_path):
    run = write_run(tmp_path / "a", [0.5, None])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"val/loss": 0.1}\n{"step": 30, "val/loss": true, "note/x": "text"}\n')
        file.write('{"step": 40, "val/lo')
    files = RunFiles(run)
    assert math.isnan(files.last("val/loss").value)
    assert files.best("val/loss") == (0.5, 10)
    assert [row.step for row in files.rows()] == [10, 20, 30]
    assert set(files.series) == {"val/loss", "val/accuracy"}


DAMAGE = {
    "config.yaml": b"a: *x\n",
    "status.json": b'{"status": 5',
    "provenance.json": b"[1]",
    "metrics.jsonl": os.urandom(5000) + b"\n",
    "overrides.yaml": b"a: 1",
    "labels.json": b'{"tags": [5]}',
}


def read_all(files):
    """Read everything, and return the problems."""
    read = (files.settings, files.overrides, files.provenance, files.state, files.series)
    assert read is not None
    assert files.labels == Labels()
    return files.problems


@pytest.mark.parametrize("file", DAMAGE)
def test_a_damaged_file_is_a_problem_that_names_it(file, tmp_path):
    run = write_run(tmp_path / "a")
    (run / file).write_bytes(DAMAGE[file])
    problems = read_all(RunFiles(run))
    assert len(problems) == 1
    assert problems[0].startswith(file)


@pytest.mark.parametrize("status", ["done", "running"])
def test_skipped_lines_are_problems_unless_the_run_was_killed_while_it_wrote(status, tmp_path):
    run = write_run(tmp_path / "a", [0.5], status=status)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('[1]\nno JSON\n{"val/loss": 1}\n{"step": 20, "val/lo')
    files = RunFiles(run)
    problems = read_all(files)
    assert files.last("val/loss") == (0.5, 10)
    expected = ["metrics.jsonl: skipped 3 damaged lines"]
    if status == "done":
        expected.append("metrics.jsonl: the last line is incomplete")
    assert problems == expected


@pytest.mark.parametrize("kind", ["link", "folder", "fifo", "huge", "missing"])
def test_files_that_are_not_plain_are_problems(kind, tmp_path):
    run = write_run(tmp_path / "a")
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"status": "done", "step": 7, "val/loss": 0.0}) + "\n")
    for file in ("config.yaml", "status.json", "provenance.json", "metrics.jsonl"):
        (run / file).unlink()
        if kind == "link":
            (run / file).symlink_to(secret)
        elif kind == "folder":
            (run / file).mkdir()
        elif kind == "fifo":
            os.mkfifo(run / file)
        elif kind == "huge":
            with open(run / file, "wb") as opened:
                opened.truncate(5 * 2**30)
    files = RunFiles(run)
    problems = read_all(files)
    assert files.state == "unknown"
    assert (files.settings, files.series) == ({}, {})
    expected = 3 if kind == "missing" else 4  # a run may have no metrics
    assert len(problems) == expected


def test_the_number_of_metrics_is_limited(tmp_path):
    run = write_run(tmp_path / "a")
    values = {f"weights/{number}": 1.0 for number in range(3000)}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1} | values) + "\n")
    files = RunFiles(run)
    assert len(files.series) == 2000
    assert len(files.problems) == 1


def test_labels_are_stored_in_the_run(tmp_path):
    run = write_run(tmp_path / "größe 漢字")
    RunFiles(run).write_labels(Labels(["baseline"], "größer"))
    assert RunFiles(run).labels == Labels(["baseline"], "größer")


def test_the_folder_that_a_user_names_is_checked(tmp_path):
    run = write_run(tmp_path / "a")
    assert run_files(run).path == run
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunError, match="run"):
            run_files(path)
