"""The state of a run: from its status, its lock, and the time of its last write."""

import os
import time

import pytest

from framework.runs.run_files import RunFiles
from framework.runs.run_state import FRESH_SECONDS
from framework.system.locks import WriterLock
from run_folders import ended_process, lock_file, write_run


@pytest.mark.parametrize("status", ["running", "paused", "testing"])
def test_a_run_has_the_state_of_its_status_while_its_process_holds_the_lock(status, tmp_path):
    run = write_run(tmp_path / "a", status=status)
    lock = WriterLock(run)
    assert RunFiles(run).state == status
    lock.close()
    assert RunFiles(run).state == "stale"


def test_a_killed_run_is_stale_and_a_stopped_one_stopped(tmp_path):
    run = write_run(tmp_path / "a", status="running")
    lock_file(run, ended_process())
    assert RunFiles(run).state == "stale"
    run = write_run(tmp_path / "b", status="stopped")
    assert RunFiles(run).state == "stopped"
    lock = WriterLock(run)
    assert RunFiles(run).state == "testing"
    lock.close()
    assert RunFiles(write_run(tmp_path / "c", status="failed")).state == "failed"


def test_a_run_of_another_machine_is_running_only_if_its_status_is_fresh(tmp_path):
    run = write_run(tmp_path / "a", status="running")
    lock_file(run, os.getpid(), "another-machine")
    assert RunFiles(run).state == "running"
    old = time.time() - FRESH_SECONDS - 60
    for file in ("status.json", "metrics.jsonl"):
        os.utime(run / file, (old, old))
    assert RunFiles(run).state == "stale"


def test_without_locks_the_process_in_the_file_decides(tmp_path, monkeypatch):
    monkeypatch.setenv("FRAMEWORK_LOCKS", "off")
    run = write_run(tmp_path / "a", status="running")
    lock_file(run, os.getpid())
    assert RunFiles(run).state == "running"
    lock_file(run, ended_process())
    assert RunFiles(run).state == "stale"
