"""Counters, cadences, reasons to stop, and exact resume from a saved state."""

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
    cadence = Cadence(every)
    state = State()
    found = []
    for step in range(1, 9):
        state.step = step
        state.epoch = step // 4
        if cadence.due(state, epoch_end=step % 4 == 0):
            found.append(step)
    assert found == due


def test_a_cadence_in_minutes_follows_the_clock(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    cadence = Cadence("2min")
    due = []
    for step, clock[0] in enumerate((100.0, 219.0, 220.0, 339.0, 345.0, 464.0, 465.0)):
        is_due = cadence.due(State(step=step))
        if is_due:
            due.append(clock[0])
        clock[0] += 100
        assert cadence.due(State(step=step)) == is_due, "the same until the next step"
    assert due == [220.0, 345.0, 465.0]


@pytest.mark.parametrize(
    "every", ["", "10", "steps", "-1steps", "0steps", "1.5steps", "1day", "1steps 2"]
)
def test_an_invalid_cadence_is_an_error(every):
    with pytest.raises(SettingError, match=r"^pause=.*: expected a .*steps"):
        Cadence(every, "pause")


# resume


class Warm(fw.Schedule):
    """A schedule with state."""

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
def test_a_resumed_run_equals_the_uninterrupted_one(at, optimizer):
    settings = {
        "val": VAL,
        "log_every": "4steps",
        "metrics": [fw.metrics.build("accuracy")],
        "optimizer": optimizer,
    }
    saved = {}
    save = At(at, lambda trainer: saved.update(copy.deepcopy(trainer.state_dict())))
    whole, record = fit(callbacks=[save], schedule=Warm(), **settings)
    resumed, rest = fit(schedule=Warm(), resume=saved, **settings)
    assert same(whole.model, resumed.model)

    def lines(record):
        found = []
        for step, values in record.lines:
            found.append((step, {k: v for k, v in values.items() if "second" not in k}))
        return found

    # Equal values mean that the sums since the last log were saved too.
    assert lines(rest) == [line for line in lines(record) if line[0] > at]
    assert rest.opened == [(at, ["loss", "accuracy"])]
    assert resumed.state.metrics.keys() == whole.state.metrics.keys()
    assert resumed.state.wall_seconds > saved["wall_seconds"]


def test_each_callback_of_a_class_has_its_own_state():
    class Count(Callback):
        def __init__(self, by):
            self.by = by
            self.total = 0

        def on_step_end(self, trainer):
            self.total += self.by

        def state_dict(self):
            return {"total": self.total}

        def load_state_dict(self, state):
            self.total = state["total"]

    saved = fit(callbacks=[Count(1), Count(10)])[0].state_dict()
    assert saved["callbacks"] == {"0:Count": {"total": 15}, "1:Count": {"total": 150}}
    one = Count(1)
    two = Count(10)
    fit(callbacks=[Callback(), one, two], resume=saved)  # another class does not change the keys
    assert (one.total, two.total) == (15, 150)


# reasons to stop


def test_a_text_is_the_reason_of_a_stop_by_a_callback():
    state = State()
    state.stop = "enough"
    assert state.stop == Stop(by="callback", reason="enough")
    assert str(state.stop) == "enough"
    assert f"{state.stop:>8}" == "  enough"
    state.stop = None
    assert state.stop is None


def test_a_run_may_be_stopped_by_true():
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
def test_the_text_of_a_stop_names_the_callback_or_the_signal(stop, text):
    assert str(stop) == text


def test_a_notebook_shows_counters_history_and_the_reason_of_an_early_end():
    state = State(step=1500, epoch=3, total_steps=2000)
    state.history.add(1500, {"val/loss": 0.5})
    assert "epoch 3, step 1,500 of 2,000" in state._repr_html_()
    assert "val/loss" in state._repr_html_()
    assert "Ended early" not in state._repr_html_()
    state.stop = "<b>enough</b>"
    assert "Ended early: &lt;b&gt;enough&lt;/b&gt;" in state._repr_html_()
