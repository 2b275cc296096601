"""Time series: sequences of unequal length, windows to forecast from, models, real data."""

from datetime import datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import framework as fw
from framework.composition.compose import CommandLine, run_composed as compose
from framework.data.dataset import ForeignLoader
from framework.errors import BuildError, DataError, SettingError
from framework.experiment.experiment import Experiment, train
from framework.experiment.load import open_run
from framework_plugins.datasets.readers.arrays import data_folder

TS = """# a comment
@problemName Small
@classLabel true a b
@data
1,2,3:10,20,30:a
4:40:b
5,6:50,60:a
7,8:70,80:b
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def trained(*overrides):
    jobs = []
    compose(CommandLine(["loggers=json_lines", *overrides]), jobs.append)
    return train(jobs[0].spec, jobs[0].experiment, jobs[0].overrides, say=lambda line: None)


def fetched(name):
    try:
        return data_folder(name, "", "")
    except DataError as error:
        pytest.skip(str(error))


class TestSequences:
    @pytest.fixture
    def small(self, tmp_path):
        (tmp_path / "small.ts").write_text(TS)
        return tmp_path / "small.ts"

    def whole(self, path, **settings):
        return fw.datasets.build(
            "ts_files", path=path, val_fraction=0.0, test_fraction=0.0, **settings
        )

    def test_they_are_padded_and_carry_their_mask(self, small):
        inputs, targets = self.whole(small, normalize=False).train.tensors
        assert inputs[0].tolist() == [[1, 2, 3], [10, 20, 30], [1, 1, 1]]
        assert inputs[1].tolist() == [[4, 0, 0], [40, 0, 0], [1, 0, 0]]
        assert targets.tolist() == [0, 1, 0, 1]

    def test_channels_are_standardised_by_real_frames_alone(self, small):
        data = self.whole(small)
        inputs = data.train.tensors[0]
        real = inputs[:, 0][inputs[:, -1] == 1]
        frames = np.arange(1, 9)
        np.testing.assert_allclose(real, (frames - frames.mean()) / frames.std(), rtol=1e-5)
        assert (inputs[:, :-1] * (1 - inputs[:, -1:])).abs().max() == 0
        assert torch.equal(type(data).read_inputs(small, data.facts()), inputs)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (
                TS.replace("40", "forty"),
                r"bad\.ts, line 6: a frame should be a number, not 'forty'",
            ),
            (TS.replace("40", "?"), r"line 6: .*'\?'"),
            (TS.replace("40", "nan"), "line 6: a frame should be a number, not 'nan'"),
            (TS.replace("4:40:b", "4:40,41:b"), r"line 6: its channels have \[1, 2\] frames"),
            (TS.replace("4:40:b", "4:b"), "line 6: 1 channels, but 2 in the first case"),
            (TS.replace("@data", ""), "it has no line @data"),
            (TS.partition("1,2,3")[0], "has no cases"),
        ],
    )
    def test_files_that_cannot_be_read(self, tmp_path, text, said):
        (tmp_path / "bad.ts").write_text(text)
        with pytest.raises(DataError, match=said):
            self.whole(tmp_path / "bad.ts")

    def test_a_sequence_longer_than_the_model_is_refused(self, small):
        with pytest.raises(DataError, match=r"small\.ts, case 1: 3 frames; the model takes 2"):
            self.whole(small, length=2)

    def test_what_a_model_says_does_not_depend_on_the_padding(self):
        fetched("vowels")
        model = fw.models.build(
            "sequence_cnn", (13, 29), (9,), channels=[8, 8], stride=1, pool="attention"
        ).eval()
        x = fw.datasets.build("vowels").test[:4][0]
        longest = int(x[:, -1].sum(1).max())
        torch.testing.assert_close(
            model(x[:, :, :longest]), model(F.pad(x, (0, 5))), atol=1e-5, rtol=1e-5
        )

    def test_speakers_are_told_apart(self):
        fetched("vowels")
        settings = [
            "trainer.max_epochs=5",
            "model.channels=[32]",
            "optimizer.lr=0.01",
            "callbacks=[checkpoint]",
        ]
        assert (
            trained("experiment=vowels", *settings).metrics["test/accuracy"] > 0.8
        )  # the commonest speaker: 0.24


class TestForecasts:
    def written(self, tmp_path, rows=60, step=timedelta(hours=6), **more):
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

    def test_windows_are_those_of_a_loop_and_do_not_leak(self, tmp_path):
        data = self.build(self.written(tmp_path))
        rows = {"train": range(36), "val": range(36, 48), "test": range(48, 60)}
        for name, span in rows.items():
            inputs, targets = (data.scale.back(tensor) - 100 for tensor in getattr(data, name)[:])
            starts = [row for row in range(8, 57) if row in span and row + 3 in span]
            assert targets.round().tolist() == [[*range(row, row + 4)] for row in starts]
            assert inputs[:, :, 0].round().tolist() == [[*range(row - 8, row)] for row in starts]
        train = torch.arange(100.0, 136.0)
        assert data.scale.mean == pytest.approx(train.mean().item())
        assert data.scale.std == pytest.approx(train.std(correction=0).item())

    def test_the_calendar_and_other_columns_are_channels(self, tmp_path):
        path = self.written(tmp_path)
        data = self.build(path, features=["wind"], time="when", calendar=["day", "week"])
        x = data.train[0][0]
        assert data.in_shape == (8, 2 + 2 + 7)
        assert (
            x[:, 2:4].round().tolist() == [[0, 1], [1, 0], [0, -1], [-1, 0]] * 2
        )  # 0, 6, 12 and 18 o'clock
        assert x[:, 4:].argmax(1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # Monday, Tuesday
        wind = torch.arange(36) % 4
        torch.testing.assert_close(
            x[:, 1], ((wind - wind.float().mean()) / wind.float().std(correction=0))[:8]
        )

    def test_a_file_to_forecast_from_gives_its_last_rows(self, tmp_path):
        path = self.written(tmp_path)
        data = self.build(path, time="when", calendar=["day"])
        assert torch.equal(
            type(data).read_inputs(path, data.facts())[:, :4],
            data.test[len(data.test) - 1][0][None, 4:],
        )
        short = self.written(tmp_path, rows=5)
        with pytest.raises(DataError, match=r"s\.csv has 5 rows; the model looks back on 8"):
            type(data).read_inputs(short, data.facts())

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            (",107,", ",lots,", r"s\.csv, row 8, column 'load': 'lots' is no number"),
            (",107,", ",,", "row 8: 'load' is empty; a series needs a number in every row"),
            (
                "2024-01-02T18",
                "2024-01-02T19",
                "row 8: 2024-01-02 19:00:00 should be 2024-01-02 18:00:00",
            ),
            ("2024-01-02T18:00:00", "soon", "row 8, column 'when': 'soon' is no time"),
        ],
    )
    def test_rows_that_are_wrong_are_named(self, tmp_path, old, new, said):
        path = self.written(tmp_path)
        path.write_text(path.read_text().replace(old, new, 1))
        with pytest.raises(DataError, match=said):
            self.build(path, time="when")

    def test_too_few_rows_for_a_window(self, tmp_path):
        with pytest.raises(
            DataError, match="the training span of 12 of 20 rows has no window of 16 \\+ 4 rows"
        ):
            self.build(self.written(tmp_path, rows=20), lookback=16)

    def test_before_training_nbeats_is_the_naive_forecast(self):
        x = torch.randn(3, 20, 2)
        by_season = fw.models.build("nbeats", (20, 2), (10,), season=7).eval()(x)
        expected = torch.stack([x[:, 20 - 7 + step % 7, 0] for step in range(10)], dim=1)
        torch.testing.assert_close(by_season, expected)
        torch.testing.assert_close(
            fw.models.build("nbeats", (20, 2), (10,))(x), x[:, -1:, 0].expand(3, 10)
        )
        with pytest.raises(BuildError, match=r"season=21 .* 20"):
            fw.models.build("nbeats", (20, 2), (10,), season=21)

    def test_nbeats_is_that_of_the_paper(self):
        torch.manual_seed(0)
        model, x = (
            fw.models.build("nbeats", (6, 3), (2,), depth=2, layers=2, width=5),
            torch.randn(4, 6, 3),
        )
        for block in model.blocks:
            torch.nn.init.normal_(block.forecast.weight)
        past, forecast = x[:, :, 0] - x[:, -1:, 0], x[:, -1:, 0].expand(4, 2)
        for block in model.blocks:
            hidden = torch.cat([past, x[:, -1, 1:]], dim=1)
            for layer in block.body:
                hidden = F.relu(F.linear(hidden, layer.linear.weight, layer.linear.bias))
            past = past - block.backcast(hidden)
            forecast = forecast + block.forecast(hidden)
        torch.testing.assert_close(model(x), forecast)

    def test_nlinear_follows_a_shift_of_level(self):
        model, x = fw.models.build("linear_forecast", (6, 3), (2,)), torch.randn(4, 6, 3)
        torch.testing.assert_close(model(x + 5), model(x) + 5)

    def test_mape(self):
        targets, outputs = (
            torch.tensor([[2.0, 0.0], [4.0, -8.0]]),
            torch.tensor([[1.0, 3.0], [5.0, -8.0]]),
        )
        metric = fw.metrics.build("mape")
        assert metric.compute(metric.sums(outputs, targets)) == pytest.approx(
            100 * (1 / 2 + 1 / 4 + 0) / 3
        )

    @pytest.mark.parametrize("data", ["seasonal", "electricity"])
    def test_it_learns_a_day_that_it_does_not_start_from(self, data):
        if data == "electricity":
            fetched("electricity")
        small = [
            "model.season=0",
            "model.width=64",
            "model.depth=2",
            "trainer.max_epochs=4",
            "optimizer.lr=0.002",
        ]
        result = trained("experiment=electricity", f"data={data}", *small, "callbacks=[checkpoint]")
        built = fw.datasets.build(data)
        past, future = built.test[:]
        mean, last = (
            float((each - future).abs().mean()) * built.scale.std for each in (0, past[:, -1:, 0])
        )
        assert result.metrics["test/mae"] < 0.35 * min(
            mean, last
        )  # the last value is where it starts from

    def test_forecasts_of_a_run_are_in_the_unit_of_the_series(self, tmp_path):
        path = self.written(tmp_path, rows=200)
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
        result = trained(*settings, "trainer.max_epochs=40", "callbacks=[checkpoint]")
        run = open_run(result.folder)
        forecast = [column.item() for column in run.predict(run.read_inputs(path)).values()]
        assert forecast == pytest.approx(
            [300, 301, 302, 303], abs=1.5
        )  # the series goes on by 1 a row
        assert result.metrics["test/mae"] < 1.5

    def test_a_run_cut_off_in_mid_epoch_goes_on_bit_for_bit(self, monkeypatch):
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
        unbroken = trained(*settings, "run.name=unbroken")
        made = Experiment.trainer

        class Stop(fw.Callback):
            def on_step_end(self, trainer):
                if trainer.state.step == 18:
                    raise KeyboardInterrupt

        def with_stop(self):
            trainer = made(self)
            trainer.callbacks.append(Stop())
            return trainer

        with monkeypatch.context() as patched:
            patched.setattr(Experiment, "trainer", with_stop)
            with pytest.raises(KeyboardInterrupt):
                trained(*settings, "run.name=cut")
        resumed = trained(*settings, "run.name=cut", "resume=auto")
        one, other = (
            (
                sorted((run.folder / "checkpoints").glob("step-*"))[-1] / "model.safetensors"
            ).read_bytes()
            for run in (unbroken, resumed)
        )
        assert one == other


class TestPictures:
    class Album(fw.Logger):
        def __init__(self):
            self.pictures = []

        def images(self, tag, images, step):
            self.pictures.append((tag, images, step))

    def shown(self, targets, model):
        split, album = (
            fw.TensorSplit(torch.linspace(-1, 1, len(targets))[:, None], targets),
            self.Album(),
        )
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

    def test_one_value_is_drawn_against_the_true_one(self):
        model = torch.nn.Linear(1, 1)
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
        ((tag, (picture,), step),) = self.shown(torch.linspace(-1, 1, 500)[:, None], model)
        assert (tag, step, picture.shape) == ("predictions", 1, (3, 160, 160))
        dark = picture[0] < 0.9  # where samples are
        equal = torch.eye(160, dtype=torch.bool).flip(1)
        assert (
            dark[equal].float().mean() > 0.95
        )  # all on the diagonal, from the lower left to the upper right
        assert not dark[~equal].any()

    def test_several_values_are_drawn_as_curves(self):
        model = torch.nn.Linear(1, 30)
        ((_, pictures, _),) = self.shown(torch.randn(50, 30), model)
        assert pictures.shape == (4, 3, 120, 320)
        red, black = pictures[:, 0] > pictures[:, 1], pictures.amax(1) == 0
        assert red.any(1).all()  # each column of pixels has the predicted curve
        assert (red | black).any(1).all()

    def test_it_says_when_there_is_nothing_to_draw(self):
        with pytest.raises(SettingError, match="the targets are classes"):
            self.shown(torch.arange(10) % 2, torch.nn.Linear(1, 2))
        callback = fw.callbacks.build("predictions")
        stream = ForeignLoader([])
        for val, said in (
            (None, "there is no validation split"),
            (stream, "the validation split is not in memory"),
        ):
            with pytest.raises(SettingError, match=said):
                callback.on_fit_start(SimpleNamespace(val_batches=val))


def test_data_that_is_not_there_is_told_how_to_fetch(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("vowels", "electricity"):
        with pytest.raises(
            DataError, match=rf"{name} is not in .* with: .*scripts/fetch_data'? {name} \(data="
        ):
            fw.datasets.build(name)
