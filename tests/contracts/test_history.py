"""The history of a fit: curves, best and last values, bounded memory, and pandas."""

import math
import sys

import pytest
import torch

import framework as fw
from framework.contracts import history
from framework.contracts.history import History, Point
from framework.errors import FrameworkError


def curves():
    found = History({"loss": "min", "accuracy": "max"})
    found.add(10, {"val/loss": 0.5, "val/accuracy": 0.9})
    found.add(20, {"val/loss": 0.25, "val/accuracy": 0.8, "weights": 3.0})
    found.add(30, {"val/loss": math.nan})
    return found


def test_curves_have_steps_and_values_and_the_best_one():
    found = curves()
    assert list(found) == ["val/loss", "val/accuracy", "weights"]
    assert found["val/accuracy"].steps == [10, 20]
    assert found["val/accuracy"].values == [0.9, 0.8]
    assert found.best == {"val/loss": Point(20, 0.25), "val/accuracy": Point(10, 0.9)}
    assert found["weights"].best is None  # the direction is not known
    assert (found["weights"].min, found["weights"].max) == (Point(20, 3.0), Point(20, 3.0))
    assert found.last["val/accuracy"] == 0.8
    assert math.isnan(found["val/loss"].last.value)
    assert list(found["weights"]) == [Point(20, 3.0)]
    with pytest.raises(KeyError, match="did you mean 'val/loss'"):
        found["val/los"]


def test_a_long_curve_is_thinned_out_and_its_extremes_stay_exact(monkeypatch):
    monkeypatch.setattr(history, "MOST_POINTS", 8)
    monkeypatch.setattr(history, "MOST_TAGS", 2)
    found = History({"loss": "min"})
    for step in range(100):
        value = -1.0 if step == 41 else float(step)
        found.add(step, {"train/loss": value, "a": 0.0, "b": 0.0})
    curve = found["train/loss"]
    assert len(curve) <= 8
    assert curve.steps == [0, 16, 32, 48, 64, 80, 96, 99], "evenly spaced, and the last one"
    assert (curve.best, curve.last) == (Point(41, -1.0), Point(99, 99.0))
    assert list(found) == ["train/loss", "a"]


def test_a_table_of_pandas_has_a_row_for_each_step():
    pytest.importorskip("pandas")
    table = curves().to_pandas()
    assert table.index.tolist() == [10, 20, 30]
    assert table["val/accuracy"].tolist()[:2] == [0.9, 0.8]
    assert math.isnan(table["weights"][10])


def test_without_pandas_an_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(FrameworkError, match="pip install pandas"):
        curves().to_pandas()


def test_fit_returns_the_history_of_all_logged_values():
    class Log(fw.Callback):
        def on_step_end(self, trainer):
            trainer.log({"mine": trainer.state.step})

    inputs = torch.randn(40, 3)
    split = fw.TensorSplit(inputs, inputs.sum(dim=1, keepdim=True))
    model = torch.nn.Linear(3, 1)
    trainer = fw.Trainer(max_epochs=3, callbacks=[Log()], log_every="2steps", device="cpu")
    arguments = {
        "data": split,
        "val": split,
        "task": torch.nn.MSELoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "batch_size": 10,
    }
    state = trainer.fit(model, **arguments)
    assert state.history["mine"].values == list(range(1, 13))
    assert state.history["train/loss"].steps == [2, 4, 6, 8, 10, 12]
    assert state.history["val/loss"].steps == [4, 8, 12]
    assert state.history["val/loss"].last.value == state.metrics["val/loss"]
    assert state.history.best["val/loss"] == state.history["val/loss"].min
    assert len(trainer.fit(model, **arguments).history["mine"]) == 12  # a new fit, a new history
