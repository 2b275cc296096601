"""Short versions of what `scripts/fault_campaign` does for minutes; the one with random kills is in test_resume.py."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from framework import checkpoint

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.append(str(SCRIPTS))

import campaign_files  # noqa: E402
import campaign_full  # noqa: E402
import campaign_saves  # noqa: E402
from campaign_trace import Call, Fault, supported, traced  # noqa: E402

needs_tracing = pytest.mark.skipif(bool(supported()), reason=str(supported()))


def case(name):
    return next(each for each in campaign_saves.cases() if each.name == name)


# files


def test_damage_to_the_files_of_real_checkpoints_is_found_before_use(capsys):
    assert campaign_files.files(60, seed=0, control=False) == 0
    assert "0 undetected of 69 damages" in capsys.readouterr().out


def test_without_checksums_the_same_damage_goes_undetected(capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "verify", checkpoint.verify)  # which the control replaces
    assert campaign_files.files(20, seed=0, control=True) == 1
    assert "is taken for the newest good one" in capsys.readouterr().out


# saves


@needs_tracing
def test_a_process_is_stopped_at_the_very_call(tmp_path):
    def write():
        with (tmp_path / "a").open("wb", buffering=0) as file:
            file.write(b"12345")
            file.write(b"67890")

    calls = [Call("create"), Call("write", 5), Call("write", 5)]
    for fault, made, status, left in [
        (None, 3, 0, b"1234567890"),
        (Fault(0, "killed before"), 1, -9, None),
        (Fault(0, "killed after"), 1, -9, b""),
        (Fault(2, "killed within", 3), 3, -9, b"12345678"),
        (Fault(1, "no room"), 2, 1, b""),
    ]:
        (tmp_path / "a").unlink(missing_ok=True)
        assert traced(write, tmp_path, fault) == (calls[:made], status)
        assert ((tmp_path / "a").read_bytes() if (tmp_path / "a").exists() else None) == left


@needs_tracing
@pytest.mark.parametrize(
    ("name", "sort"),
    [
        ("same step again", "killed after"),
        ("rotation, best, background", "killed after"),
        ("rotation, best", "no room"),
        ("new step", "killed within"),
    ],
)
def test_a_fault_at_any_call_of_a_save_leaves_a_good_checkpoint_and_no_litter(name, sort):
    tally = campaign_saves.disturb(case(name), random.Random(0), [sort], every=2)
    assert tally.wrong == []
    assert tally.points[sort] >= 10
    assert set(tally.newest) <= {"old", "new"}


@needs_tracing
def test_a_disk_that_is_full_leaves_a_good_checkpoint_and_no_litter():
    tally = campaign_saves.fill_up(case("rotation, best"))
    if isinstance(tally, str):
        pytest.skip(tally)
    assert tally.wrong == []
    assert tally.newest["old"] >= 3
    assert tally.newest["new"] == 1


@needs_tracing
def test_a_checkpoint_that_gets_its_name_file_by_file_does_not_survive(monkeypatch):
    monkeypatch.setattr(checkpoint, "publish", campaign_saves.in_place)
    tally = campaign_saves.disturb(case("new step"), random.Random(0), ["killed after"], every=3)
    assert any("unreadable under a final name" in each for each in tally.wrong)


# starts


def test_of_two_simultaneous_starts_one_writes_and_the_other_is_refused():
    command = [sys.executable, SCRIPTS / "fault_campaign", "--double-starts", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one writer in 1 of 1 double first starts and 1 of 1 double resumes" in done.stdout


# a full disk


@pytest.mark.parametrize("control", [False, True])
def test_a_full_disk_under_the_metrics_is_told_and_the_run_goes_on_exactly(capsys, control):
    status = campaign_full.full_disk(1, seed=0, control=control, only="run, metrics.jsonl 1")
    out = capsys.readouterr().out
    if out.startswith("skipped"):
        pytest.skip(out)
    assert status == control
    assert control or "the disk was full at 1 points" in out
