"""Series to forecast: windows, models, the callback predictions, and real data."""

from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import framework as fw
from framework.data.dataset import ForeignLoader
from framework.errors import BuildError, DataError, SettingError
from framework.experiment.trained.load import open_run
from framework_plugins.models.forecasting import draw_scatter
from runs import cut_off_at, require_data, run_training


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class TestForecasts:
    def write_series(self, tmp_path, rows=60, step=timedelta(hours=6), **more):
        times = [(datetime(2024, 1, 1) + step * row).isoformat() for row in range(rows)]
        lines = [f"{time},{100 + row},{row % 4}" for row, time in enumerate(times)]
        (tmp_path / "s.csv").write_text("\n".join(["when,load,wind", *lines]))
        return tmp_path / "s.csv"

    def build(self, path, **settings):
        defaults = {
            "target": "load",
            "lookback": 8,
            "horizon": 4,
            "val_fraction": 0.2,
            "test_fraction": 0.2,
        }
        return fw.datasets.build("series", path=path, **{**defaults, **settings})

    def test_windows_equal_those_of_a_loop_and_do_not_leak(self, tmp_path):
        data = self.build(self.write_series(tmp_path))
        rows = {"train": range(36), "val": range(36, 48), "test": range(48, 60)}
        for name, span in rows.items():
            inputs, targets = (
                data.scale.inverse_transform(tensor) - 100 for tensor in getattr(data, name)[:]
            )
            starts = [row for row in range(8, 57) if row in span and row + 3 in span]
            assert targets.round().tolist() == [[*range(row, row + 4)] for row in starts]
            assert inputs[:, :, 0].round().tolist() == [[*range(row - 8, row)] for row in starts]
        train = torch.arange(100.0, 136.0)
        assert data.scale.mean == pytest.approx(train.mean().item())
        assert data.scale.std == pytest.approx(train.std(correction=0).item())

    def test_the_calendar_and_other_columns_are_channels(self, tmp_path):
        path = self.write_series(tmp_path)
        data = self.build(path, features=["wind"], time="when", calendar=["day", "week"])
        x = data.train[0][0]
        assert data.in_shape == (8, 2 + 2 + 7)
        # 0, 6, 12 and 18 o'clock.
        assert x[:, 2:4].round().tolist() == [[0, 1], [1, 0], [0, -1], [-1, 0]] * 2
        assert x[:, 4:].argmax(1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # Monday, Tuesday
        wind = (torch.arange(36) % 4).float()
        expected = (wind - wind.mean()) / wind.std(correction=0)
        torch.testing.assert_close(x[:, 1], expected[:8])

    def test_a_forecast_starts_from_the_last_rows_of_a_file(self, tmp_path):
        path = self.write_series(tmp_path)
        data = self.build(path, time="when", calendar=["day"])
        last_window = data.test[len(data.test) - 1][0]
        read = type(data).read_inputs(path, data.facts())
        assert torch.equal(read[0, :4], last_window[4:])
        short = self.write_series(tmp_path, rows=5)
        with pytest.raises(DataError, match=r"s\.csv has 5 rows; the model needs the last 8"):
            type(data).read_inputs(short, data.facts())

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            (",107,", ",lots,", r"s\.csv, row 8, column 'load': 'lots' is not a number"),
            (",107,", ",,", "row 8: 'load' is empty; a series needs a number in every row"),
            (
                "2024-01-02T18",
                "2024-01-02T19",
                "row 8: expected the time 2024-01-02 18:00:00.* got 2024-01-02 19:00:00",
            ),
            ("2024-01-02T18:00:00", "soon", "row 8, column 'when': expected a time .*'soon'"),
        ],
    )
    def test_the_error_of_a_wrong_row_names_it(self, tmp_path, old, new, message):
        path = self.write_series(tmp_path)
        path.write_text(path.read_text().replace(old, new, 1))
        with pytest.raises(DataError, match=message):
            self.build(path, time="when")

    def test_fewer_rows_than_a_window_are_refused(self, tmp_path):
        with pytest.raises(
            DataError, match=r"the 12 training rows of 20 .* a window of 16 \+ 4 rows"
        ):
            self.build(self.write_series(tmp_path, rows=20), lookback=16)

    def test_untrained_nbeats_is_the_naive_forecast(self):
        x = torch.randn(3, 20, 2)
        by_season = fw.models.build("nbeats", (20, 2), (10,), season=7).eval()(x)
        expected = torch.stack([x[:, 20 - 7 + step % 7, 0] for step in range(10)], dim=1)
        torch.testing.assert_close(by_season, expected)
        by_last_value = fw.models.build("nbeats", (20, 2), (10,))(x)
        torch.testing.assert_close(by_last_value, x[:, -1:, 0].expand(3, 10))
        with pytest.raises(BuildError, match=r"season=21 .* 20"):
            fw.models.build("nbeats", (20, 2), (10,), season=21)

    def test_nbeats_is_that_of_the_paper(self):
        torch.manual_seed(0)
        model = fw.models.build("nbeats", (6, 3), (2,), depth=2, layers=2, width=5)
        x = torch.randn(4, 6, 3)
        for block in model.blocks:
            torch.nn.init.normal_(block.forecast.weight)
        past = x[:, :, 0] - x[:, -1:, 0]
        forecast = x[:, -1:, 0].expand(4, 2)
        for block in model.blocks:
            hidden = torch.cat([past, x[:, -1, 1:]], dim=1)
            for layer in block.body:
                hidden = F.relu(F.linear(hidden, layer.linear.weight, layer.linear.bias))
            past = past - block.backcast(hidden)
            forecast = forecast + block.forecast(hidden)
        torch.testing.assert_close(model(x), forecast)

    def test_nlinear_follows_a_shift_of_level(self):
        model = fw.models.build("linear_forecast", (6, 3), (2,))
        x = torch.randn(4, 6, 3)
        torch.testing.assert_close(model(x + 5), model(x) + 5)

    def test_mape(self):
        targets = torch.tensor([[2.0, 0.0], [4.0, -8.0]])
        outputs = torch.tensor([[1.0, 3.0], [5.0, -8.0]])
        metric = fw.metrics.build("mape")
        found = metric.compute(metric.sums(outputs, targets))
        assert found == pytest.approx(100 * (1 / 2 + 1 / 4 + 0) / 3)

    @pytest.mark.parametrize("data", ["seasonal", "electricity"])
    def test_nbeats_learns_a_daily_wave(self, data):
        if data == "electricity":
            require_data("electricity")
        small = [
            "model.season=0",
            "model.width=64",
            "model.depth=2",
            "trainer.max_epochs=4",
            "optimizer.lr=0.002",
        ]
        result = run_training(
            "experiment=electricity", f"data={data}", *small, "callbacks=[checkpoint]"
        )
        built = fw.datasets.build(data)
        past, future = built.test[:]
        error_of_mean = future.abs().mean().item() * built.scale.std
        # The untrained model forecasts the last value.
        error_of_last = (past[:, -1:, 0] - future).abs().mean().item() * built.scale.std
        assert result.metrics["test/mae"] < 0.35 * min(error_of_mean, error_of_last)

    def test_forecasts_of_a_run_are_in_the_unit_of_the_series(self, tmp_path):
        path = self.write_series(tmp_path, rows=200)
        settings = [
            "data=series",
            f"data.path={path}",
            "data.target=load",
            "data.lookback=8",
            "data.horizon=4",
        ]
        settings += [
            "task=regression",
            "model=linear_forecast",
            "metrics=[mae]",
            "optimizer.lr=0.01",
        ]
        result = run_training(*settings, "trainer.max_epochs=40", "callbacks=[checkpoint]")
        run = open_run(result.folder)
        forecast = [column.item() for column in run.predict(run.read_inputs(path)).values()]
        assert forecast == pytest.approx([300, 301, 302, 303], abs=1.5)  # it grows by 1 a row
        assert result.metrics["test/mae"] < 1.5

    def test_a_run_stopped_in_mid_epoch_resumes_exactly(self, monkeypatch):
        settings = [
            "experiment=electricity",
            "data=seasonal",
            "model.width=16",
            "model.depth=1",
            "trainer.max_epochs=2",
        ]
        settings += [
            "callbacks=[checkpoint,predictions]",
            "callbacks.checkpoint.every=5steps",
            "data.weeks=4",
        ]
        unbroken = run_training(*settings, "run.name=unbroken")
        with cut_off_at(18, monkeypatch):
            run_training(*settings, "run.name=cut")
        resumed = run_training(*settings, "run.name=cut", "resume=auto")
        weights = []
        for run in (unbroken, resumed):
            last = max((run.folder / "checkpoints").glob("step-*"))
            weights.append((last / "model.safetensors").read_bytes())
        assert weights[0] == weights[1]


class TestPictures:
    class Album(fw.Logger):
        def __init__(self):
            self.pictures = []

        def images(self, tag, images, step):
            self.pictures.append((tag, images, step))

    def shown(self, targets, model):
        split = fw.TensorSplit(torch.linspace(-1, 1, len(targets))[:, None], targets)
        album = self.Album()
        trainer = fw.Trainer(
            max_steps=1, callbacks=[fw.callbacks.build("predictions")], loggers=[album]
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        trainer.fit(
            model,
            split,
            val=split,
            task=torch.nn.MSELoss(),
            optimizer=optimizer,
            batch_size=len(targets),
        )
        return album.pictures

    @pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
    def test_values_that_are_not_finite_are_left_out(self, wrong):
        targets = torch.linspace(-1, 1, 9)[:, None]
        outputs = targets.clone()
        outputs[2] = wrong
        known = torch.arange(9) != 2
        expected = draw_scatter(targets[known], targets[known])
        assert torch.equal(draw_scatter(outputs, targets), expected)
        assert torch.equal(draw_scatter(targets, outputs), expected)
        assert draw_scatter(targets * torch.nan, targets).isfinite().all()

    def test_one_value_is_drawn_against_the_true_one(self):
        model = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
        ((tag, (picture,), step),) = self.shown(torch.linspace(-1, 1, 500)[:, None], model)
        assert (tag, step, picture.shape) == ("predictions", 1, (3, 350 + 22, 350)), "with a legend"
        inside = picture[1, 45:300, 60:330] < 0.7  # between the axes; their lines are brighter
        rows, columns = inside.nonzero().T.float()
        slope = torch.corrcoef(torch.stack([-rows, columns]))[0, 1]
        assert slope > 0.99, "all samples are on the diagonal"

    def test_values_are_drawn_in_the_unit_of_the_data(self, monkeypatch):
        from framework_plugins.models import forecasting

        drawn = []
        draw_scatter = forecasting.draw_scatter

        def draw(outputs, targets):
            drawn.append((outputs, targets))
            return draw_scatter(outputs, targets)

        monkeypatch.setattr(forecasting, "draw_scatter", draw)
        settings = ["data=diabetes", "task=regression", "model={name: mlp, width: 4}"]
        run_training(*settings, "metrics=[mae]", "callbacks=[predictions]", "trainer.max_epochs=1")
        outputs, targets = drawn[-1]
        raw = fw.datasets.build("diabetes", val_fraction=0.15)
        torch.testing.assert_close(targets, raw.scale.inverse_transform(raw.val.tensors[1]))
        assert 100 < outputs.mean() < 200

    def test_several_values_are_drawn_as_curves(self):
        model = torch.nn.Linear(1, 30)
        ((_, pictures, _),) = self.shown(torch.randn(50, 30), model)
        assert pictures.shape == (4, 3, 120, 320)
        is_red = pictures[:, 0] > pictures[:, 1]
        is_black = pictures.amax(1) == 0
        assert is_red.any(1).all()  # each column of pixels has the predicted curve
        assert (is_red | is_black).any(1).all()

    def test_targets_that_cannot_be_drawn_are_refused(self):
        with pytest.raises(SettingError, match="the targets are classes"):
            self.shown(torch.arange(10) % 2, torch.nn.Linear(1, 2))
        callback = fw.callbacks.build("predictions")
        stream = ForeignLoader([])
        for val, message in (
            (None, "there is no validation split"),
            (stream, "the validation split is not in memory"),
        ):
            with pytest.raises(SettingError, match=message):
                callback.on_fit_start(SimpleNamespace(val_batches=val))


def test_the_error_of_missing_data_has_the_command_to_fetch_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = r"electricity is not in .* with: .*scripts/fetch_data'? electricity \(data="
    with pytest.raises(DataError, match=facts):
        fw.datasets.build("electricity")
