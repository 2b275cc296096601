"""The history of a fit: curves, best and last values, bounded memory, and pandas."""

import math
import re
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


@pytest.fixture
def pyplot(monkeypatch):
    """Make matplotlib draw without a screen, and close the figures."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def fitted():
    found = History({"loss": "min", "accuracy": "max"})
    for step in (10, 20, 30):
        found.add(step, {"train/loss": 10.0 / step, "train/accuracy": step / 1000})
        found.add(step, {"val/loss": 30.0 / step**2, "val/accuracy": step / 100})
        found.add(step, {"train/learning_rate": 0.1, "mine": float(step)})
    return found


def test_a_plot_has_a_chart_for_each_quantity_with_a_curve_for_each_split(pyplot):
    loss, accuracy = fitted().plot()
    assert (loss.get_title(), accuracy.get_title()) == ("loss", "accuracy")
    train, val = loss.get_lines()
    assert train.get_xdata().tolist() == [10, 20, 30]
    assert train.get_ydata().tolist() == [1.0, 0.5, 10.0 / 30]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train", "val"]
    assert train.get_color() == accuracy.get_lines()[0].get_color() != val.get_color()
    assert loss.figure is accuracy.figure
    assert pyplot.get_fignums() == [loss.figure.number]  # pyplot.show() and notebooks show it


def test_an_axis_is_logarithmic_for_positive_values_over_a_factor_of_ten(pyplot):
    loss, accuracy, mine = fitted().plot("loss", "accuracy", "mine")
    assert loss.get_yscale() == "log"
    assert accuracy.get_yscale() == "linear"  # over a factor of 30, but high values are better
    assert mine.get_yscale() == "linear"  # over a factor of 3
    history = History({"loss": "min"})
    history.add(1, {"train/loss": 100.0})
    history.add(2, {"train/loss": 0.0})
    assert history.plot()[0].get_yscale() == "linear"


def test_values_are_plotted_by_quantity_or_tag(pyplot):
    rate, val, mine = fitted().plot("learning_rate", "val/loss", "mine")
    assert [len(axes.get_lines()) for axes in (rate, val, mine)] == [1, 1, 1]
    assert val.get_lines()[0].get_ydata().tolist() == [0.3, 0.075, 30.0 / 900]
    with pytest.raises(FrameworkError, match="did you mean 'loss'"):
        fitted().plot("los")
    with pytest.raises(FrameworkError, match="nothing was logged"):
        History().plot()
    assert pyplot.get_fignums() == [rate.figure.number]  # no empty figure after an error


def test_without_known_directions_everything_is_plotted(pyplot):
    history = History()
    for number in range(7):
        history.add(1, {f"value_{number}": 1.0})
    assert len(history.plot()) == 7


def test_a_name_and_values_of_a_stranger_can_be_plotted(pyplot, tmp_path):
    history = History()
    history.add(1, {r"$\frac{$": math.nan, "x\x1b[2J": math.inf})
    history.add(2, {r"$\frac{$": -math.inf, "x\x1b[2J": 1e308})
    history.plot()[0].figure.savefig(tmp_path / "plot.png")


def test_without_matplotlib_an_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FrameworkError, match=r"pip install 'framework\[notebook\]'"):
        fitted().plot()


def test_a_notebook_shows_last_and_best_values(monkeypatch):
    shown = curves()._repr_html_()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", shown)
    assert cells[:4] == ["val/loss", "nan", "0.25", "20"]
    assert cells[4].startswith("<svg")
    assert cells[5:9] == ["val/accuracy", "0.8", "0.9", "10"]
    assert cells[10:15] == ["weights", "3", "", "", ""]  # one value is no curve
    assert "Nothing was logged" in History()._repr_html_()
    monkeypatch.setattr(history, "MOST_ROWS", 2)
    shown = curves()._repr_html_()
    assert "weights" not in shown
    assert "1 more" in shown


def test_names_are_escaped_in_a_notebook():
    hostile = History()
    hostile.add(1, {"<img src=x onerror=alert(1)>": 1.0})
    assert "<img" not in hostile._repr_html_()
