"""The list of runs in a folder: what it finds, and the index that makes it fast."""

import json
import os
import time

import pytest

from framework.errors import RunError
from framework.runs.overview import run_index
from framework.runs.overview.run_index import INDEX, MISSING, Settings, list_runs
from framework.runs.run_files import Labels, RunFiles
from run_folders import write_run, write_sweep


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(run_index, "FEWEST_CHANGES", 1)
    root = tmp_path / "runs"
    write_run(root / "default" / "a", lr=0.1)
    write_run(root / "default" / "größe 漢字", [None], optimizer="sgd", status="failed")
    write_run(root / "spam" / "b", [])
    write_sweep(root / "default" / "grid", (0.1, [0.5]), (0.2, [0.4, 0.6]))
    (root / "default" / "grid" / "best").mkdir()
    (root / "default" / "grid" / "best" / "config.yaml").symlink_to("../000_lr-0.1/config.yaml")
    (root / "loop").symlink_to(".")
    write_run(root / ".bin" / "default" / "removed")
    return root


def shown(listing):
    """Return all values of a list, so that two can be compared."""
    found = {}
    for run in listing.runs:
        series = {metric: repr(run.summary(metric)) for metric in run.series}
        facts = (run.status, run.step, run.started, run.seconds, run.processes, run.stacked)
        facts += (run.tags, run.note)
        found[run.name] = (facts, series, run.settings.complete(), run.directions, run.problems)
    return found, listing.sweeps


def test_runs_and_trials_are_found_and_links_hidden_folders_and_best_are_not(root):
    listing = list_runs(root)
    assert {run.name for run in listing.runs} == {
        "default/a",
        "default/größe 漢字",
        "spam/b",
        "default/grid/000_lr-0.1",
        "default/grid/001_lr-0.2",
    }
    assert list(listing.sweeps) == ["default/grid"]
    assert listing.sweeps["default/grid"].objectives == {"val/loss": "min"}


def test_the_index_gives_the_same_list_without_reading_the_runs(root):
    first = list_runs(root)
    assert first.read == 5
    second = list_runs(root)
    assert second.read == 0
    assert shown(second) == shown(first)


def settings_in(listing):
    """Return the settings of each run of a list as a text, in which NaN equals NaN."""
    found = {}
    for run in listing.runs:
        found[run.name] = json.dumps(run.settings.complete(), sort_keys=True)
    return found


def test_a_config_with_keys_and_values_that_json_lacks_is_in_the_index(root):
    config = root / "default" / "a" / "config.yaml"
    inner = "{2026-12-01: 1, null: 2, 3: .nan, true: 4, .inf: 5}"
    values = "- 2026-12-01\n- !!binary aGk=\n- !!set {d, a, c, b}\n- .nan\n- -.inf\n"
    text = f"days: [[{inner}]]\n2026-12-01: {inner}\nday: 2026-12-01\nrate: .nan\nmany:\n{values}"
    config.write_text(config.read_text() + text)
    (root / "default" / "b").mkdir()
    (root / "default" / "b" / "config.yaml").write_text(config.read_text())
    first = list_runs(root)
    assert first.read == 6
    expected = settings_in(first)
    settings = json.loads(expected["default/a"])
    assert settings["day"] == "2026-12-01"
    assert settings["many"][2] == ["a", "b", "c", "d"]
    second = list_runs(root)
    assert second.read == 0
    assert settings_in(second) == expected
    # a run that is read anew has the settings of the index
    os.utime(root / "default" / "a", (0, 0))
    third = list_runs(root)
    assert third.read == 1
    assert settings_in(third) == expected
    settings = {run.name: run.settings.complete() for run in third.runs}
    difference = Settings.difference(settings["default/a"], settings["default/b"])
    assert difference.changes == {}  # no column of `framework runs`, also for NaN


def test_a_changed_run_is_read_again(root):
    list_runs(root)
    with open(root / "default" / "a" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "val/loss": 0.01}\n')
    listing = list_runs(root)
    assert listing.read == 1
    [run] = [run for run in listing.runs if run.name == "default/a"]
    assert run.summary("val/loss").lowest == (0.01, 99)
    RunFiles(root / "spam" / "b").write_labels(Labels(["x"]))
    RunFiles(root / "default" / "grid").write_labels(Labels(["wide"]))
    listing = list_runs(root)
    assert listing.read == 1
    assert [run.tags for run in listing.runs if run.name == "spam/b"] == [["x"]]
    assert listing.sweeps["default/grid"].tags == ["wide"]


def test_removed_and_new_runs_are_noticed(root):
    list_runs(root)
    (root / "spam" / "b").rename(root / "spam" / "c")
    names = {run.name for run in list_runs(root).runs}
    assert "spam/c" in names
    assert "spam/b" not in names


def damages(index):
    content = json.loads(index)
    yield b""
    yield index[: len(index) // 2]
    yield os.urandom(1000)
    yield b"[" * 100_000
    yield b'{"schema": 3}'
    for key in content:
        yield json.dumps(content | {key: 5}).encode()
        yield json.dumps(content | {key: [[5]]}).encode()
    for place in range(8):
        rows = json.loads(json.dumps(content["runs"]))
        for row in rows:
            row[place] = 5
        yield json.dumps(content | {"runs": rows}).encode()


def test_a_damaged_index_is_rebuilt(root):
    expected = shown(list_runs(root))
    index = (root / INDEX).read_bytes()
    for number, damaged in enumerate(damages(index)):
        (root / INDEX).write_bytes(damaged)
        assert shown(list_runs(root)) == expected, number
    (root / INDEX).unlink()
    (root / INDEX).symlink_to(root / "default" / "a" / "config.yaml")
    assert shown(list_runs(root)) == expected


def test_a_bit_of_the_index_may_be_wrong_without_a_crash(root):
    list_runs(root)
    index = bytearray((root / INDEX).read_bytes())
    for position in range(0, len(index), max(1, len(index) // 150)):
        changed = bytearray(index)
        changed[position] ^= 0x15
        (root / INDEX).write_bytes(changed)
        assert len(list_runs(root).runs) == 5


def test_a_folder_that_cannot_be_written_is_listed_without_an_index(root, monkeypatch):
    def refuse(*args):
        raise RunError("read-only")

    monkeypatch.setattr(run_index, "write_file", refuse)
    assert len(list_runs(root).runs) == 5
    assert not (root / INDEX).exists()


def test_wrong_folders(root):
    for path in (root / "missing", root / "default" / "a"):
        with pytest.raises(RunError):
            list_runs(path)


def test_settings_are_stored_as_changes():
    base = {"optimizer": "adamw", "lr": 1, "betas": [0.9]}
    own = {"optimizer": "sgd", "lr": 1.0, "betas": [0.9]}
    settings = Settings.difference(own, base)
    assert settings.changes == {"optimizer": "sgd", "lr": 1.0}
    assert settings.complete() == own
    assert Settings.difference({}, base).get("lr") is MISSING


def test_an_index_makes_a_list_fast(tmp_path):
    root = tmp_path / "runs"
    for number in range(100):
        write_run(root / "default" / f"r{number}", seed=number)
    cold = time.process_time()
    list_runs(root)
    warm = time.process_time()
    assert list_runs(root).read == 0
    assert (time.process_time() - warm) * 4 < warm - cold  # 20 times as fast when this was written
