"""The comparison of runs, from complete, incomplete and damaged folders."""

import json
import math

import pytest

from framework.runs.overview.diff import compare, curves_of, same_content, short_names
from framework.runs.run_files import RunFiles

CONFIG = """\
model: {{name: mlp, width: 8}}
optimizer: {{name: {optimizer}, lr: {lr}}}
callbacks: {{progress: {{}}}}
trainer: {{max_epochs: 2}}
run: {{root: runs, name: {name}}}
"""


def make_run(root, name, lr=0.1, optimizer="sgd", settings=None, loss=1.0, **provenance):
    run = root / name
    run.mkdir()
    (run / "config.yaml").write_text(CONFIG.format(name=name, lr=lr, optimizer=optimizer))
    (run / "overrides.yaml").write_text(f"- optimizer.lr={lr}\n")
    if settings is not None:
        provenance["settings"] = settings
    (run / "provenance.json").write_text(json.dumps({"python": "3.11.7"} | provenance))
    facts = {"samples": {"train": 9}, "content": {"train": "sha256:00"}}
    (run / "facts.json").write_text(json.dumps(facts))
    status = {"status": "done", "step": 4, "total_steps": 4, "wall_seconds": 2.0}
    (run / "status.json").write_text(json.dumps(status))
    rows = [{"step": 2, "val/loss": loss / 2}, {"step": 4, "val/loss": loss}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunFiles(run)


def row(rows, name):
    [found] = [each for each in rows if each.name == name]
    return found


def test_settings_with_their_sources(tmp_path):
    places = [
        {"place": "conf/experiment/a.yaml:3", "value": 0.5, "by": ""},
        {"place": "command line", "value": 0.1, "by": "optimizer.lr=0.1"},
        {"place": "conf/experiment/b.yaml:1", "value": 3, "by": "", "other_part": "adam"},
    ]
    parts = {"optimizer/sgd": "sgd.py:7"}
    one = make_run(tmp_path, "one", settings={"optimizer.lr": places}, parts=parts)
    two = make_run(tmp_path, "two", lr=0.2, settings={}, parts=parts)
    diff = compare([one, two])
    [setting] = diff.settings
    assert setting.name == "optimizer.lr"
    assert [each.value for each in setting.values] == [0.1, 0.2]
    assert setting.values[0].source == "command line: optimizer.lr=0.1"
    assert setting.values[1].source == "default of optimizer/sgd (sgd.py:7)"


def test_a_run_of_an_older_version_has_the_sources_of_its_overrides(tmp_path):
    one = make_run(tmp_path, "one")
    two = make_run(tmp_path, "two", lr=0.2, optimizer="adam")
    diff = compare([one, two])
    assert row(diff.settings, "optimizer.lr").values[1].source == "command line: optimizer.lr=0.2"
    assert row(diff.settings, "optimizer").values[1].source == "not recorded"


def test_defaults_of_parts_that_only_some_runs_have_are_left_out(tmp_path):
    one = make_run(tmp_path, "one", settings={})
    two = make_run(tmp_path, "two", settings={})
    text = (two.path / "config.yaml").read_text()
    added = text.replace("{progress: {}}", "{progress: {}, ema: {decay: 0.9}}")
    (two.path / "config.yaml").write_text(added)
    diff = compare([one, two])
    assert not diff.settings
    assert diff.hidden == 2  # the part and its setting
    place = [{"place": "command line", "value": "ema", "by": "+callbacks=ema"}]
    provenance = {"settings": {"callbacks.ema": place}}
    (two.path / "provenance.json").write_text(json.dumps(provenance))
    diff = compare([RunFiles(one.path), RunFiles(two.path)])
    [setting] = diff.settings
    assert setting.name == "callbacks.ema"
    assert setting.values[0] is None


def test_code_versions_and_data(tmp_path):
    change = "diff --git a/m.py b/m.py\n--- a/m.py\n+++ b/m.py\n+x = 1\n-x = 2\n"
    one = make_run(tmp_path, "one", git_commit="abc", git_diff="", packages={"torch": "2.10"})
    two = make_run(tmp_path, "two", git_commit="abc", git_diff=change, packages={"torch": "2.13"})
    diff = compare([one, two])
    assert row(diff.code, "uncommitted changes").values == ["none", "2 lines in m.py"]
    assert row(diff.versions, "torch").values == ["2.10", "2.13"]
    assert not diff.data
    assert same_content(diff.runs) is True
    facts = {"samples": {"train": 8}, "content": {"train": "sha256:11"}}
    (two.path / "facts.json").write_text(json.dumps(facts))
    diff = compare([RunFiles(one.path), RunFiles(two.path)])
    assert row(diff.data, "samples of train").values == [9, 8]
    assert same_content(diff.runs) is False


def test_metrics_and_time(tmp_path):
    one = make_run(tmp_path, "one", loss=1.0)
    two = make_run(tmp_path, "two", loss=3.0)
    diff = compare([one, two])
    values = row(diff.metrics, "val/loss").values
    assert [each.last.value for each in values] == [1.0, 3.0]
    assert [(each.best.value, each.best.step) for each in values] == [(0.5, 2), (1.5, 2)]
    assert row(diff.time, "state").values == ["done", "done"]
    assert row(diff.time, "training_seconds").values == [2.0, 2.0]
    assert diff.as_dict()["metrics"][0]["values"][0]["best_step"] == 2


@pytest.mark.parametrize("file", ["config.yaml", "provenance.json", "facts.json", "status.json"])
@pytest.mark.parametrize("content", [None, "{", "[1]", '{"settings": 3, "parts": 1}'])
def test_missing_and_damaged_files_are_reported(tmp_path, file, content):
    one = make_run(tmp_path, "one")
    two = make_run(tmp_path, "two")
    if content is None:
        (two.path / file).unlink()
    else:
        (two.path / file).write_text(content)
    diff = compare([one, two])
    json.dumps(diff.as_dict())
    is_valid_mapping = content is not None and content.startswith('{"') and file != "status.json"
    assert bool(diff.problems[1]) is not is_valid_mapping
    assert not diff.problems[0]


def test_hostile_metrics_and_events(tmp_path):
    one = make_run(tmp_path, "one")
    two = make_run(tmp_path, "two")
    lines = ['{"step": 1, "val/loss": null}', '{"step": "x"}', "[" * 2000, '{"step": 2}', "\0"]
    (two.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (two.path / "events.jsonl").write_text('{"do": "set"}\n{"do": 3}\n{"a": 1}\n')
    diff = compare([one, two])
    assert len(diff.events[1]) == 3
    assert math.isnan(row(diff.metrics, "val/loss").values[1].last.value)
    secret = tmp_path / "secret"
    secret.write_text('{"step": 1, "val/loss": 42.0}\n')
    (two.path / "metrics.jsonl").unlink()
    (two.path / "metrics.jsonl").symlink_to(secret)
    diff = compare([one, RunFiles(two.path)])
    assert row(diff.metrics, "val/loss").values[1] is None
    assert any("metrics.jsonl" in problem for problem in diff.problems[1])


def test_the_curve_of_a_metric(tmp_path):
    one = make_run(tmp_path, "one")
    assert list(curves_of(one, ["val/loss"])["val/loss"]) == [(2, 0.5), (4, 1.0)]


def test_names_are_short_and_unique(tmp_path):
    assert short_names([tmp_path / "a" / "x", tmp_path / "a" / "y"]) == ["x", "y"]
    assert short_names([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]
    assert short_names([tmp_path / "x", tmp_path / "x"]) == ["x", "x"]
