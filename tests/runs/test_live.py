"""Runs are followed while they write, at a cost that does not grow with them."""

import json
import math
import os
import time

import pytest

from framework.errors import RunError
from framework.runs.overview import live
from framework.runs.overview.live import LiveMetrics, LiveRun


def line(step, **values):
    return json.dumps({"step": step, "epoch": 1, "wall_seconds": 1.0, **values}) + "\n"


def loss(step, value):
    return line(step, **{"train/loss": value})


def append(run, text):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(text)


def points(metrics):
    return list(metrics.curves["train/loss"])


def test_only_new_complete_lines_are_read(tmp_path):
    metrics = LiveMetrics(tmp_path)
    metrics.refresh()
    assert not metrics.exists
    append(tmp_path, loss(1, 3.0) + loss(2, 2.0)[:20])
    metrics.refresh()
    assert points(metrics) == [(1, 3.0)]
    append(tmp_path, loss(2, 2.0)[20:] + "broken\n[]\n" + loss(3, None))
    metrics.refresh()
    assert points(metrics)[:2] == [(1, 3.0), (2, 2.0)]
    assert math.isnan(metrics.curves["train/loss"].last.value)
    assert metrics.curves["train/loss"].min == (2, 2.0)


def test_a_resumed_run_replaces_its_later_lines(tmp_path):
    metrics = LiveMetrics(tmp_path)
    append(tmp_path, loss(1, 3.0) + loss(2, 2.0) + loss(3, 1.0))
    metrics.refresh()
    (tmp_path / "metrics.jsonl").write_text(loss(1, 3.0) + loss(2, 2.0))  # truncated
    metrics.refresh()
    assert points(metrics) == [(1, 3.0), (2, 2.0)]
    append(tmp_path, loss(1, 4.0) + loss(3, 5.0))  # it was truncated and grew between two reads
    metrics.refresh()
    assert points(metrics) == [(1, 4.0), (3, 5.0)]
    other = tmp_path / "other"
    other.write_text(loss(1, 9.0) * 5)
    other.replace(tmp_path / "metrics.jsonl")
    metrics.refresh()
    assert {value for _, value in points(metrics)} == {9.0}


def test_a_long_file_is_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "MOST_READ", 2**16)
    monkeypatch.setattr(live, "TAIL_BYTES", 2**14)
    monkeypatch.setattr(live, "PARTS", 8)
    monkeypatch.setattr(live, "PART_BYTES", 2**10)
    append(tmp_path, "".join(loss(step, float(step)) for step in range(1, 20_001)))
    metrics = LiveMetrics(tmp_path)
    parsed = []
    parse = live.parse_row
    monkeypatch.setattr(live, "parse_row", lambda row: parsed.append(row) or parse(row))
    metrics.refresh()
    assert metrics.sampled
    assert len(parsed) < 500
    steps = [step for step, _ in points(metrics)]
    assert (steps[0], steps[-1]) == (2, 20_000)  # the first part begins inside a line
    assert steps == sorted(steps)
    assert len({step // 2_500 for step in steps}) == 9  # from all parts of the file
    parsed.clear()
    append(tmp_path, loss(20_001, 0.5))
    metrics.refresh()
    assert len(parsed) == 1
    assert metrics.curves["train/loss"].last.value == 0.5


def test_a_curve_keeps_a_limited_number_of_evenly_spaced_points(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "MOST_POINTS", 8)
    metrics = LiveMetrics(tmp_path)
    append(tmp_path, "".join(loss(step, float(step)) for step in range(100)))
    metrics.refresh()
    assert [step for step, _ in points(metrics)] == [0, 16, 32, 48, 64, 80, 96, 99]


def test_a_step_that_no_run_reaches_is_skipped(tmp_path):
    metrics = LiveMetrics(tmp_path)
    append(tmp_path, loss(10**30, 1.0) + loss(2, 2.0))
    metrics.refresh()
    assert points(metrics) == [(2, 2.0)]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").write_text(loss(1, 1.0))
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="symbolic link"):
        LiveMetrics(run).refresh()
    followed = LiveRun(run, "run")
    followed.refresh()
    assert "symbolic link" in followed.problem


def write_status(run, **content):
    base = {"status": "running", "reason": None, "step": 40, "total_steps": 80, "processes": 2}
    base |= {"eta_seconds": 10.0, "samples_per_second": 5.0, "updated": time.time()}
    (run / "status.json").write_text(json.dumps(base | content))


def test_the_state_of_a_run_that_was_killed(tmp_path):
    write_status(tmp_path, warnings=["careful", 3], checkpoint_step=30, checkpoint_time=0)
    (tmp_path / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    append(tmp_path, line(40, **{"train/slowest_process": 1.0, "train/waiting": 0.25}))
    run = LiveRun(tmp_path, "run")
    run.refresh()
    assert run.state == "stale"
    assert (run.step, run.total_steps, run.processes) == (40, 80, 2)
    assert run.eta_seconds is None
    assert run.checkpoint[0] == 30
    assert run.process_text() == "2 processes, the slowest is rank 1, 25% waiting"
    first, *_, last = run.warnings()
    assert first.startswith("its process ended without")
    assert last == "careful"


def test_a_run_without_readable_files(tmp_path):
    (tmp_path / "status.json").write_text("{")
    run = LiveRun(tmp_path, "run")
    run.refresh()
    assert run.state == "unknown"
    assert run.problem.startswith("status.json")
    assert (run.step, run.total_steps, run.checkpoint, run.eta_seconds) == (0, 0, None, None)


def test_a_run_that_has_ended_is_read_once(tmp_path, monkeypatch):
    write_status(tmp_path, status="done")
    run = LiveRun(tmp_path, "run")
    run.refresh()
    monkeypatch.setattr(live, "RunFiles", None)  # an access would fail
    run.refresh()
    assert run.state == "done"
