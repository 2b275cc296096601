"""Where the time of a run went, and the advice."""

import json

import pytest

from framework.runs.overview.speed import explain_speed
from framework.runs.run_files import RunFiles
from framework.runs.run_time import RunTime, read_time

CONFIG = """\
loader: {workers: 0, read: auto, batch_size: 32, eval_batch_size: 256}
trainer: {compile: 'off', cuda_graph: 'off', validate_every: 1epoch, profile: false}
"""


def run_with(tmp_path, time, rows=(), config=CONFIG):
    (tmp_path / "config.yaml").write_text(config)
    status = {"status": "done", "step": 100}
    if time is not None:
        status["time"] = time if isinstance(time, dict) else time.as_dict()
    (tmp_path / "status.json").write_text(json.dumps(status))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunFiles(tmp_path)


def advice(run):
    return " ".join(explain_speed(run).advice)


def test_the_shares_add_up(tmp_path):
    time = RunTime(start=2.0, training=10.0, test=1.0, parts={"validation": 3.0}, steps=100)
    speed = explain_speed(run_with(tmp_path, time))
    assert [each.name for each in speed.activities][:2] == ["steps", "validation"]
    assert sum(each.share for each in speed.activities) == pytest.approx(1)
    assert sum(each.seconds for each in speed.activities) == pytest.approx(13)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"waiting for data": 4.0}, "loader.workers=N"),
        ({"validation": 4.0}, "trainer.validate_every"),
        ({"checkpoint": 4.0}, "callbacks.checkpoint.every"),
        ({"logging": 4.0}, "trainer.log_every"),
        ({"compiling": 4.0}, "trainer.compile"),
        ({"validation": 0.5}, None),
        ({}, None),
    ],
)
def test_advice_on_an_activity_with_a_notable_share(tmp_path, parts, expected):
    time = RunTime(start=1.0, training=10.0, parts=parts, steps=100)
    first = [line for line in explain_speed(run_with(tmp_path, time)).advice if "%" in line]
    assert bool(first) is (expected is not None)
    assert expected is None or expected in first[0]


def test_advice_on_steps_and_start(tmp_path):
    tiny = RunTime(training=10.0, steps=10_000, device="cpu")
    assert "loader.batch_size (now 32)" in advice(run_with(tmp_path, tiny))
    assert "trainer.compile=auto measures" in advice(run_with(tmp_path, tiny))
    on_gpu = RunTime(training=10.0, steps=10_000, device="cuda")
    assert "trainer.cuda_graph=auto" in advice(run_with(tmp_path, on_gpu))
    short = RunTime(start=10.0, training=1.0, steps=10)
    assert "start" in advice(run_with(tmp_path, short))


def test_the_slowest_process(tmp_path):
    values = {"train/communication": 0.05, "train/waiting": 0.4}
    ranks = enumerate([1, 1, 0])
    rows = [{"step": step, **values, "train/slowest_process": rank} for step, rank in ranks]
    speed = explain_speed(run_with(tmp_path, RunTime(training=5.0, steps=3), rows))
    assert speed.slowest == 1
    assert any("rank 1 is the slowest in 67% of the logs" in line for line in speed.advice)


@pytest.mark.parametrize(
    "time",
    [
        None,
        {},
        {"training": "x", "parts": [1], "steps": None},
        {"training": 1e400, "steps": -3, "parts": {"validation": -1, "logging": True}},
        {"training": 5, "steps": 10**400, "parts": {str(i): 1 for i in range(1000)}},
        {"training": 5, "steps": 3, "of_a_step": {"forward": 1e-3}},
    ],
)
def test_missing_and_damaged_times(tmp_path, time):
    speed = explain_speed(run_with(tmp_path, time))
    json.dumps(speed.as_dict(), allow_nan=False)
    assert len(speed.activities) < 60


def test_times_of_sessions_add_up():
    first = RunTime(start=1.0, training=4.0, parts={"validation": 1.0}, steps=10, sessions=1)
    second = RunTime(start=1.5, training=2.0, parts={"logging": 0.5}, steps=5, sessions=1)
    both = read_time({"time": first.added(second).as_dict()})
    assert (both.start, both.training, both.steps, both.sessions) == (2.5, 6.0, 15, 2)
    assert both.parts == {"validation": 1.0, "logging": 0.5}
    assert both.in_steps == 4.5
