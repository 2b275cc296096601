"""early_stop and timer, each in a fit of a tiny regression."""

import math
import re

import pytest

from framework import Callback
from framework.errors import FrameworkError, SettingError
from regressions import Script, build, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*it replaces the value that the trainer itself logs"
)


class Wait(Callback):
    """Advances the clock of a test by a second per step."""

    def __init__(self, clock):
        self.clock = clock

    def on_gradients(self, trainer):
        self.clock[0] += 1.0


@pytest.mark.parametrize(
    ("values", "settings", "stops_after"),
    [
        ([5, 4, 4, 4, 3, 3], {"patience": 2}, 4),
        ([5, 4, 4, 3, 3, 2], {"patience": 2}, None),
        ([5, 4.9, 4.8, 4.7, 4.6, 4.5], {"patience": 3, "min_delta": 0.5}, 4),
        ([math.nan, 5, math.nan, math.nan, 4, 4], {"patience": 2}, 4),
        ([math.nan] * 6, {"patience": 3}, 3),
        ([-math.inf, 5, 4, 3, 2, 1], {"patience": 2}, None),
        ([1, 2, 3, 3, 3, 9], {"patience": 2, "mode": "max"}, 5),
    ],
)
def test_early_stop_waits_for_its_patience(values, settings, stops_after):
    trainer, _ = fit(Script("val/loss", values), build("early_stop", **settings), epochs=6)
    assert trainer.state.epoch == (stops_after or 6)
    if stops_after:
        assert str(trainer.state.stop).startswith("early_stop: val/loss")
    else:
        assert trainer.state.stop is None


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([5, 4, 4, 4], r"val/loss .* 2 checks in a row .*best value 4 at step 6"),
        ([math.nan] * 4, r"val/loss .* 2 checks in a row .*never been finite"),
    ],
)
def test_early_stop_states_its_reason(values, reason):
    trainer, _ = fit(Script("val/loss", values), build("early_stop", patience=2))
    assert trainer.state.stop.by == "early_stop"
    assert re.match(reason, trainer.state.stop.reason)


def test_early_stop_without_validation_monitors_the_training_loss():
    with pytest.raises(SettingError, match="monitor=val/loss: there is no validation split"):
        fit(build("early_stop"), val=None)
    trainer, _ = fit(
        build("early_stop", monitor="train/loss", patience=1, min_delta=0.01), val=None, lr=0.0
    )
    assert trainer.state.epoch == 2


def test_early_stop_continues_its_count_after_a_resume():
    script = Script("val/loss", [5, 4, 4, 4, 4, 4])
    first, _ = fit(script, build("early_stop", patience=3), epochs=3)
    early_stop = build("early_stop", patience=3)
    resumed, _ = fit(script, early_stop, epochs=6, resume=first.state_dict())
    assert resumed.state.epoch == 5


def test_the_timer_logs_each_epoch_and_stops_at_its_limit(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    trainer, record = fit(build("timer", limit="7s"), Wait(clock))
    assert (trainer.state.step, str(trainer.state.stop)) == (8, "timer: the limit of 7s is reached")
    assert record.of("train/seconds_per_epoch") == {3: 3.0, 6: 3.0}
    trainer, _ = fit(
        build("timer", limit="0.2min"), Wait(clock), epochs=9, resume=trainer.state_dict()
    )
    assert trainer.state.step == 13  # 12 seconds, of which the first part took 8


@pytest.mark.parametrize("limit", ["3epochs", "soon"])
def test_a_time_limit_must_be_a_duration(limit):
    with pytest.raises(FrameworkError, match="a duration like 90s"):
        build("timer", limit=limit)
