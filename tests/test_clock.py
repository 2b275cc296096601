"""Where the time of a run goes."""

import json
import time

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, Trainer
from framework.clock import Clock, table

SPLIT = fw.TensorSplit(torch.randn(320, 6, generator=torch.Generator().manual_seed(1)), torch.arange(320) % 3)


class Slow(Callback):
    """Takes its time at each step."""

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
    trainer.fit(model, data, val=SPLIT, task=nn.CrossEntropyLoss(), optimizer=optimizer, batch_size=4)
    return trainer


def test_a_part_does_not_count_the_parts_within_it():
    clock = Clock()
    with clock.part("outer"):
        time.sleep(0.02)
        with clock.part("inner"):
            time.sleep(0.2)
    assert clock.seconds["inner"] >= 0.2
    assert 0.02 <= clock.seconds["outer"] < 0.15, "less than a part within it took, however busy the machine is"


def test_shares_add_up():
    clock = Clock()
    with clock.part("data"):
        time.sleep(0.02)
    time.sleep(0.02)
    shares = clock.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert 0.2 < shares["data"] < 0.8


def test_compiling_is_a_part_of_its_own_wherever_it_comes_in():
    clock = Clock()
    with clock.part("validation"):
        time.sleep(0.01)
        with clock.part("compiling"):
            time.sleep(0.05)
    with clock.part("compiling"):  # in a step, whose time no part has
        time.sleep(0.05)
    shares = clock.shares()
    assert list(shares) == ["steps", "compiling", "validation"]
    assert shares["compiling"] > 0.7
    assert sum(shares.values()) == pytest.approx(1)


def test_every_run_counts_its_waiting_for_data():
    shares = fit(SlowData()).clock.shares()
    assert shares["waiting for data"] > 0.5
    assert 0 < shares["validation"] < 0.5
    assert fit(SPLIT).clock.shares()["waiting for data"] < 0.3


def test_a_profile_names_the_slow_part_and_leaves_a_trace(tmp_path, capfd):
    trainer = fit(SPLIT, Slow(), profile=True, folder=tmp_path)
    shown = capfd.readouterr().err
    rows = [line.rsplit(maxsplit=2) for line in shown.splitlines() if line.endswith("%")]
    assert rows[0][0] == "callbacks"
    assert float(rows[0][1].replace(",", "")) > 2_000
    assert {"forward", "backward", "optimizer", "waiting for data", "copy"} <= {row[0] for row in rows}
    named = {event.get("name") for event in json.loads((tmp_path / "profile.pt.trace.json").read_text())["traceEvents"]}
    assert {"forward", "backward", "optimizer"} <= named
    assert trainer.state.step == 160


def test_a_run_that_ends_early_shows_what_there_was(tmp_path, capfd):
    with pytest.raises(ZeroDivisionError):
        fit(SPLIT, Fails(), profile=True)
    assert "of a step (mean of 15)" in capfd.readouterr().err


class Fails(Callback):
    def on_step_end(self, trainer):
        return 1 / (trainer.state.step - 21)


def test_profiling_changes_no_number():
    plain, profiled = fit(SPLIT), fit(SPLIT, profile=True)
    for a, b in zip(plain.model.parameters(), profiled.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_table_has_the_longest_part_first():
    lines = table({"data": 0.001, "forward": 0.003, "nothing": 0.0}, whole=0.004, steps=10).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["forward", "data", "in"]
    assert lines[1].split()[1:] == ["300", "75.0%"]
