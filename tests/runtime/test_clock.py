"""The time of a run by activity."""

import json
import time

import pytest
import torch
from torch import nn

import framework as fw
import framework.runtime.clock
from framework import Callback, Trainer
from framework.runtime.clock import Clock, times_table

SPLIT = fw.TensorSplit(
    torch.randn(320, 6, generator=torch.Generator().manual_seed(1)), torch.arange(320) % 3
)


class Slow(Callback):
    """Waits in each step."""

    def on_step_start(self, trainer):
        time.sleep(0.002)


class SlowData(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        time.sleep(0.001)
        return SPLIT[index]


def fit(data, *callbacks, **settings):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    trainer = Trainer(max_epochs=2, callbacks=callbacks, device="cpu", **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.fit(
        model, data, val=SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=4
    )
    return trainer


@pytest.fixture
def passes(monkeypatch):
    """Return a function that lets seconds pass; the real time does not count."""
    now = 100.0

    def advance(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(framework.runtime.clock, "perf_counter", lambda: now)
    return advance


def test_an_activity_does_not_count_the_activities_inside_it(passes):
    clock = Clock()
    with clock.part("outer"):
        passes(0.5)
        with clock.part("inner"):
            passes(2.0)
    assert clock.seconds == {"outer": 0.5, "inner": 2.0}


def test_shares_add_up_to_1(passes):
    clock = Clock()
    with clock.part("data"):
        passes(1.0)
    passes(3.0)
    assert clock.shares() == pytest.approx({"steps": 0.75, "data": 0.25})


def test_compiling_is_counted_separately_in_steps_and_other_activities(passes):
    clock = Clock()
    with clock.part("validation"):
        passes(1.0)
        with clock.part("compiling"):
            passes(4.0)
    with clock.part("compiling"):  # in a step, which is not an activity
        passes(5.0)
    assert clock.shares() == pytest.approx({"steps": 0.0, "compiling": 0.9, "validation": 0.1})


def test_every_run_counts_the_time_waiting_for_data():
    shares = fit(SlowData()).clock.shares()
    assert shares["waiting for data"] > 0.5
    assert 0 < shares["validation"] < 0.5
    assert fit(SPLIT).clock.shares()["waiting for data"] < 0.3


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.10
def test_a_profile_lists_the_slowest_activity_first_and_writes_a_trace(tmp_path, capfd):
    trainer = fit(SPLIT, Slow(), profile=True, folder=tmp_path)
    shown = capfd.readouterr().err
    rows = [line.rsplit(maxsplit=2) for line in shown.splitlines() if line.endswith("%")]
    assert rows[0][0] == "callbacks"
    assert float(rows[0][1].replace(",", "")) > 2_000
    listed = {row[0] for row in rows}
    assert {"forward", "backward", "optimizer", "waiting for data", "copy"} <= listed
    trace = json.loads((tmp_path / "profile.pt.trace.json").read_text())
    traced = {event.get("name") for event in trace["traceEvents"]}
    assert {"forward", "backward", "optimizer"} <= traced
    assert trainer.state.step == 160


def test_a_run_that_ends_early_prints_its_profile(tmp_path, capfd):
    with pytest.raises(ZeroDivisionError):
        fit(SPLIT, Fails(), profile=True)
    assert "of a step (mean of 15)" in capfd.readouterr().err


class Fails(Callback):
    def on_step_end(self, trainer):
        return 1 / (trainer.state.step - 21)


def test_profiling_changes_no_weight():
    plain = fit(SPLIT)
    profiled = fit(SPLIT, profile=True)
    for a, b in zip(plain.model.parameters(), profiled.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_table_has_the_longest_activity_first():
    seconds = {"data": 0.001, "forward": 0.003, "nothing": 0.0}
    lines = times_table(seconds, total=0.004, steps=10).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["forward", "data", "in"]
    assert lines[1].split()[1:] == ["300", "75.0%"]
