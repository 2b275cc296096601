"""Removed runs move to a bin, and back; a running run stays."""

import os

import pytest

from framework.errors import RunError
from framework.runs.overview.run_index import list_runs
from framework.runs.run_bin import (
    BIN,
    empty_bin,
    find_run_folder,
    remove_runs,
    removed_runs,
    restore_run,
)
from framework.system.locks import WriterLock
from run_folders import write_run, write_sweep


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "runs"
    write_run(root / "default" / "a")
    write_sweep(root / "default" / "grid", (0.1, [0.5]), (0.2, [0.4]))
    return root


def names(root):
    return {run.name for run in list_runs(root).runs}


def test_runs_and_sweeps_are_removed_and_restored(root):
    before = names(root)
    moved = remove_runs(root, [root / "default" / "a", root / "default" / "grid"])
    assert [path.is_dir() for path in moved] == [True, True]
    assert names(root) == set()
    assert set(removed_runs(root)) == {"default/a", "default/grid"}
    assert restore_run(root, "default/a") == root / "default" / "a"
    assert restore_run(root, "default/grid/") == root / "default" / "grid"
    assert names(root) == before
    assert list((root / BIN).iterdir()) == []


def test_of_two_removed_runs_of_one_name_the_newer_one_is_restored(root):
    run = root / "default" / "a"
    for number in range(2):
        (run / "number").write_text(str(number))
        remove_runs(root, [run])
        write_run(run)
    with pytest.raises(RunError, match="exists"):
        restore_run(root, "default/a")
    run.rename(root / "default" / "b")
    assert (restore_run(root, "default/a") / "number").read_text() == "1"


def test_the_bin_is_emptied(root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (root / "default" / "a" / "link").symlink_to(outside)
    remove_runs(root, [root / "default" / "a"])
    assert empty_bin(root) == 1
    assert not (root / BIN).exists()
    assert (outside / "kept").exists()
    assert empty_bin(root) == 0


def test_a_running_run_is_not_removed_and_neither_are_the_others_of_the_command(root):
    run = write_run(root / "default" / "live", status="running")
    lock = WriterLock(run)
    with pytest.raises(RunError, match=r"live is running"):
        remove_runs(root, [root / "default" / "a", run])
    assert names(root) >= {"default/a", "default/live"}
    lock.close()
    remove_runs(root, [run])


def test_a_sweep_is_not_removed_while_it_or_a_trial_runs(root):
    sweep = root / "default" / "grid"
    lock = WriterLock(sweep, "sweep.lock")
    with pytest.raises(RunError, match="is running"):
        remove_runs(root, [sweep])
    lock.close()
    trial = write_run(sweep / "002_lr-1", status="running")
    lock = WriterLock(trial)
    with pytest.raises(RunError, match="is running"):
        remove_runs(root, [sweep])
    lock.close()
    remove_runs(root, [sweep])


def test_the_best_run_of_a_sweep_stays(root):
    sweep = root / "default" / "grid"
    (sweep / "best").mkdir()
    (sweep / "best" / "config.yaml").symlink_to("../001_lr-0.2/config.yaml")
    with pytest.raises(RunError, match="best run of its sweep"):
        remove_runs(root, [sweep / "001_lr-0.2"])
    remove_runs(root, [sweep / "000_lr-0.1"])


def test_only_runs_in_the_root_are_removed_and_only_into_a_real_folder(root, tmp_path):
    other = write_run(tmp_path / "other")
    with pytest.raises(RunError, match="--root"):
        remove_runs(root, [other])
    os.symlink(tmp_path, root / BIN)
    with pytest.raises(RunError, match="symbolic link"):
        remove_runs(root, [root / "default" / "a"])
    assert empty_bin(root) == 0
    assert other.is_dir()


def test_a_run_is_found_by_its_path_and_by_its_name(root, monkeypatch):
    assert find_run_folder(root, str(root / "default" / "a")) == root / "default" / "a"
    assert find_run_folder(root, "default/a") == root / "default" / "a"
    assert find_run_folder(root, "default/grid") == root / "default" / "grid"
    for name in ("default", "default/x"):
        with pytest.raises(RunError):
            find_run_folder(root, name)
    with pytest.raises(RunError, match=r"default/aa.*default/a"):
        remove_runs(root, [root / "default" / "a"])
        restore_run(root, "default/aa")
