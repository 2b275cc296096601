"""Counters, cadences, and going on from a saved state as if nothing had happened."""

import copy
import signal

import pytest

import framework as fw
from fits import OPTIMIZERS, VAL, At, fit, same
from framework import Callback
from framework.contracts.state import Cadence, State, Stop
from framework.errors import SettingError


@pytest.mark.parametrize(
    ("every", "due"),
    [
        ("1steps", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("3 steps", [3, 6]),
        ("1epoch", [4, 8]),
        (" 2epochs ", [8]),
        ("1h", []),
    ],
)
def test_a_cadence_over_two_epochs_of_four_steps(every, due):
    cadence, state, found = Cadence(every), State(), []
    for step in range(1, 9):
        state.step, state.epoch = step, step // 4
        if cadence.due(state, epoch_end=step % 4 == 0):
            found.append(step)
    assert found == due


def test_a_cadence_in_minutes_goes_by_the_clock(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    cadence, due = Cadence("2min"), []
    for clock[0] in (100.0, 219.0, 220.0, 339.0, 345.0, 464.0, 465.0):
        due += [clock[0]] * cadence.due(State())
    assert due == [220.0, 345.0, 465.0]


@pytest.mark.parametrize(
    "every", ["", "10", "steps", "-1steps", "0steps", "1.5steps", "1day", "1steps 2"]
)
def test_what_is_no_cadence(every):
    with pytest.raises(SettingError, match=r"^pause: expected a .*steps.*, got"):
        Cadence(every, "pause")


# resume


class Warm(fw.Schedule):
    """A schedule with a memory."""

    def __init__(self):
        self.seen = 0

    def __call__(self, step):
        return 1 / (1 + self.seen)

    def observe(self, metrics):
        self.seen += "val/loss" in metrics

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.parametrize("at", [5, 7, 10, 15], ids=lambda at: f"after {at}")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_the_uninterrupted_one(at, optimizer):
    settings = {
        "val": VAL,
        "log_every": "4steps",
        "metrics": [fw.metrics.build("accuracy")],
        "optimizer": optimizer,
    }
    kept = {}
    keep = At(at, lambda trainer: kept.update(copy.deepcopy(trainer.state_dict())))
    whole, record = fit(callbacks=[keep], schedule=Warm(), **settings)
    resumed, rest = fit(schedule=Warm(), resume=kept, **settings)
    assert same(whole.model, resumed.model)

    def lines(record):
        return [
            (step, {k: v for k, v in values.items() if "second" not in k})
            for step, values in record.lines
        ]

    assert lines(rest) == [
        line for line in lines(record) if line[0] > at
    ]  # also the sums since the last log point
    assert rest.opened == [(at, ["loss", "accuracy"])]
    assert resumed.state.metrics.keys() == whole.state.metrics.keys()
    assert resumed.state.wall_seconds > kept["wall_seconds"]


def test_callbacks_of_one_class_have_a_state_each():
    class Count(Callback):
        def __init__(self, by):
            self.by, self.total = by, 0

        def on_step_end(self, trainer):
            self.total += self.by

        def state_dict(self):
            return {"total": self.total}

        def load_state_dict(self, state):
            self.total = state["total"]

    saved = fit(callbacks=[Count(1), Count(10)])[0].state_dict()
    assert saved["callbacks"] == {"0:Count": {"total": 15}, "1:Count": {"total": 150}}
    one, two = Count(1), Count(10)
    fit(callbacks=[Callback(), one, two], resume=saved)  # one more of another class shifts none
    assert (one.total, two.total) == (15, 150)


# why a run stops


def test_a_text_is_the_reason_of_a_stop_by_a_callback():
    state = State()
    state.stop = "enough"
    assert state.stop == Stop(by="callback", reason="enough")
    assert str(state.stop) == "enough"
    assert f"{state.stop:>8}" == "  enough"
    state.stop = None
    assert state.stop is None


def test_a_run_may_be_stopped_by_true():
    """Only the reason is less telling."""

    def stop(trainer):
        trainer.state.stop = True

    trainer, _ = fit(callbacks=[At(2, stop)])
    assert (trainer.state.step, str(trainer.state.stop)) == (2, "True")


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (Stop("early_stop", "val/loss did not improve"), "early_stop: val/loss did not improve"),
        (Stop("signal", "SIGTERM", signal.SIGTERM), "SIGTERM"),
    ],
)
def test_the_text_of_a_stop_names_who_stops_the_run(stop, text):
    assert str(stop) == text
