"""Run folders: each is made by one run, and can be read."""

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from framework.composition.spec import read_spec
from framework.errors import RunError
from framework.experiment.experiment import train
from framework.runs.folder import RunFolder, git_state, package_version, provenance, read_config


def test_a_folder_is_named_by_the_user_or_by_the_time(tmp_path):
    assert RunFolder(tmp_path, "mine", experiment="spam").path == tmp_path / "spam" / "mine"
    assert RunFolder(tmp_path).path.parent == tmp_path / "default"


def test_no_two_runs_share_a_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: RunFolder(tmp_path).path, range(24)))
    assert len(set(paths)) == 24
    first = RunFolder(tmp_path, "mine")
    with pytest.raises(RunError, match=r"mine is being written by process \d+"):
        RunFolder(tmp_path, "mine")
    first.write("config.yaml", {})
    with pytest.raises(RunError, match=r"mine exists already: choose another run\.name"):
        RunFolder(tmp_path, "mine")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "/etc", "a..b", ".hidden", "-m", "a b", "x" * 129, "ä"]
)
def test_a_name_cannot_lead_out_of_the_root(tmp_path, name):
    with pytest.raises(RunError, match=r"run\.name=.*: expected at most 128 letters"):
        RunFolder(tmp_path, name)
    with pytest.raises(RunError, match=r"^experiment=.*: expected at most 128 letters"):
        RunFolder(tmp_path, experiment=name)
    assert not list(tmp_path.iterdir())


def test_a_root_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/default.* cannot be created: .*run\.root=.*file"):
        RunFolder(tmp_path / "file", "mine")


def test_written_files_are_read_back(tmp_path):
    folder = RunFolder(tmp_path, "mine")
    tree = {"seed": 3, "model": {"name": "mlp", "width": [8, 4]}, "loss": None, "text": "yes: no"}
    folder.write("config.yaml", tree)
    folder.write("config.yaml", tree)
    folder.write("facts.json", {"path": tmp_path})
    assert read_config(folder.path) == tree
    assert list(read_config(folder.path)) == list(tree)  # in the order in which it was composed
    assert json.loads((folder.path / "facts.json").read_text()) == {"path": str(tmp_path)}
    assert sorted(path.name for path in folder.path.glob("[!.]*")) == ["config.yaml", "facts.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it has no config.yaml"),
        ("a: [", "is not valid YAML"),
        ("- a", "does not contain a config"),
        (b"\xff", "is not valid YAML"),
    ],
)
def test_a_folder_that_is_not_a_run_is_refused(tmp_path, content, message):
    with pytest.raises(RunError, match="there is no run folder"):
        read_config(tmp_path / "none")
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(
            content if isinstance(content, bytes) else content.encode()
        )
    with pytest.raises(RunError, match=message):
        read_config(tmp_path)


def test_a_config_cannot_create_objects(tmp_path):
    (tmp_path / "config.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(RunError, match="is not valid YAML"):
        read_config(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o000])
def test_all_files_of_a_run_follow_the_umask(tmp_path, mask):
    parts = {
        "data": {"name": "blobs", "samples": 100},
        "model": {"name": "mlp"},
        "task": {"name": "classification"},
    }
    parts |= {
        "optimizer": {"name": "sgd"},
        "trainer": {"max_epochs": 1},
        "callbacks": {"checkpoint": {}},
    }
    parts |= {
        "loggers": {"json_lines": {}, "tensorboard": {}},
        "run": {"root": str(tmp_path), "name": "r"},
    }
    before = os.umask(mask)
    try:
        result = train(read_spec(parts), "default", [], say=lambda line: None)
    finally:
        os.umask(before)
    found = {}
    for path in [result.folder, *result.folder.rglob("*")]:
        if not path.is_symlink():
            allowed = 0o777 if path.is_dir() else 0o666
            found[path.name] = (path.stat().st_mode & 0o777, allowed & ~mask)
    assert {
        "model.safetensors",
        "training.pt",
        "MANIFEST.json",
        "status.json",
        ".lock",
        "metrics.jsonl",
    } <= set(found)
    assert {name: modes for name, modes in found.items() if modes[0] != modes[1]} == {}


def test_temporary_files_of_killed_processes_are_removed_when_a_run_is_resumed(tmp_path):
    temporary = [
        "status.tmp",
        "config.yaml.tmp",
        "metrics.jsonl.new",
        f".status.json.{'0' * 16}.tmp",
    ]
    for name in [*temporary, "mine.tmp", "notes.new"]:
        (tmp_path / name).write_text("half")
    RunFolder.existing(tmp_path).lock.close()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "mine.tmp", "notes.new"}


def test_provenance_contains_the_uncommitted_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outside = provenance({"model/mlp": "models.py:3"})
    assert outside["parts"] == {"model/mlp": "models.py:3"}
    assert outside["git_commit"] is outside["git_diff"] is None
    assert outside["packages"]["torch"] == package_version("torch")
    assert package_version("no-such-package") is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, *arguments], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "part.py").write_text("one\n")
    git("add", ".")
    git("commit", "-qm", "first")
    (tmp_path / "part.py").write_text("two\n")
    git_state.cache_clear()  # another process
    inside = provenance({})
    (tmp_path / "part.py").write_text("three\n")
    assert (
        provenance({})["git_diff"] == inside["git_diff"]
    )  # what is loaded is still what was read first
    git_state.cache_clear()
    assert inside["git_commit"] == git("rev-parse", "HEAD")
    assert "-one\n+two" in inside["git_diff"]
    json.dumps(inside)
    yaml.safe_dump(inside)
