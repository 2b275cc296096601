"""Tables with columns of numbers and categories: encoding, models that embed them, real data."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.preprocessing import QuantileTransformer
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework.composition.compose import CommandLine, run_composed as compose
from framework.data.dataset import Scale
from framework.errors import BuildError, DataError
from framework.experiment.experiment import Experiment, train
from framework.experiment.trained.load import open_run
from framework_plugins.datasets.readers.fetched import data_folder
from runs import cut_off_at

COLOURS = ["red", "green", "blue"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def houses(tmp_path):
    """Write a table whose price is the area times a factor for the colour, with empty areas."""
    draw = np.random.default_rng(0)
    rows = ["area,colour,noise,price"]
    for row in range(600):
        area = draw.uniform(20, 200)
        colour = draw.integers(3)
        price = 1000 * area * (1, 2, 4)[colour]
        cell = "" if row % 50 == 7 else round(area, 2)
        rows.append(f"{cell},{COLOURS[colour]},{draw.normal():.3f},{price:.2f}")
    path = tmp_path / "houses.csv"
    path.write_text("\n".join(rows))
    return path


def load_all(path, target, **settings):
    return fw.datasets.build(
        "table", path=path, target=target, val_fraction=0.0, test_fraction=0.0, **settings
    )


def write_table(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    return tmp_path / "t.csv"


def experiment(*overrides):
    specs = []
    compose(
        CommandLine([*overrides]),
        lambda job: specs.append((job.spec, job.experiment, job.overrides)),
    )
    return specs[0]


def houses_settings(path):
    return ["data=table", f"data.path={path}", "data.target=price", "data.categories=index"]


def run_training(*overrides):
    return train(
        *experiment("callbacks=[checkpoint]", "loggers=json_lines", *overrides),
        say=lambda line: None,
    )


class TestColumns:
    def test_categories_become_indices_and_the_model_gets_their_number(self, tmp_path):
        path = write_table(tmp_path, "size,shape,y\n1,round,0.5\n3,flat,1.5\n5,round,2.5\n")
        data = load_all(path, "y", categories="index")
        assert data.columns == [0, 3]  # a number; two texts, and the index 0 for others
        assert data.train.tensors[0][:, 1].tolist() == [2, 1, 2]
        (tmp_path / "new.csv").write_text("size,shape\n3,square\n3,flat\n")
        read = type(data).read_inputs(tmp_path / "new.csv", json.loads(json.dumps(data.facts())))
        assert read.tolist() == [[0, 0], [0, 1]]  # square is unknown; the mean of the sizes is 3

    @pytest.mark.parametrize("categories", ["one_hot", "index"])
    def test_empty_cells_have_an_input_and_a_category_of_their_own(self, tmp_path, categories):
        data = load_all(
            write_table(tmp_path, "size,shape,y\n1,round,0.5\n,flat,1.5\n5,,2.5\n"),
            "y",
            categories=categories,
        )
        size, missing, *shape = data.train.tensors[0].T.tolist()
        assert size == [-1, 0, 1]
        assert missing == [0, 1, 0]
        assert shape == (
            [[0, 1, 0], [1, 0, 0], [0, 0, 1]] if categories == "one_hot" else [[2, 1, 3]]
        )
        assert data.columns == (() if categories == "one_hot" else [0, 0, 4])

    def test_without_mark_missing_empty_cells_are_the_mean_or_no_category(self, tmp_path):
        text = "size,shape,y\n1,round,0.5\n,flat,1.5\n5,,2.5\n"
        data = load_all(write_table(tmp_path, text), "y", mark_missing=False)
        assert data.train.tensors[0].tolist() == [[-1, 0, 1], [0, 1, 0], [1, 0, 0]]

    def test_quantiles_are_those_of_scikit_learn(self, tmp_path):
        values = np.random.default_rng(0).lognormal(size=1000).round(1)  # many are equal
        text = "x,y\n" + "\n".join(f"{value},{row}" for row, value in enumerate(values))
        data = load_all(write_table(tmp_path, text), "y", quantile=True)
        reference = QuantileTransformer(
            n_quantiles=256, output_distribution="normal", subsample=None
        )
        expected = reference.fit_transform(values[:, None])
        np.testing.assert_allclose(data.train.tensors[0], expected, atol=1e-3)
        (tmp_path / "new.csv").write_text("x\n-5\n1e9\n")
        beyond = type(data).read_inputs(tmp_path / "new.csv", data.facts())
        np.testing.assert_allclose(beyond, reference.transform([[-5], [1e9]]), atol=1e-3)

    def test_the_error_of_a_text_in_a_column_of_numbers_names_file_and_row(self, tmp_path):
        path = write_table(tmp_path, "size,y\n1,0.5\n2,1.5\nlarge,2.5\n4,1\n")
        with pytest.raises(
            DataError, match=r"t\.csv, row 3, column 'size': 'large' is not a number"
        ):
            load_all(path, "y")

    def test_a_zip_file_is_read_like_the_file_in_it(self, houses, tmp_path):
        with zipfile.ZipFile(tmp_path / "houses.zip", "w") as archive:
            archive.write(houses, "houses.csv")
        packed = load_all(tmp_path / "houses.zip", "price")
        plain = load_all(houses, "price")
        assert torch.equal(packed.train.tensors[0], plain.train.tensors[0])
        (tmp_path / "bad.zip").write_bytes(b"PK no")
        with pytest.raises(DataError, match=r"bad\.zip cannot be read"):
            load_all(tmp_path / "bad.zip", "price")


class TestTargets:
    @pytest.mark.parametrize("scaling", ["standard", "log"])
    def test_targets_are_scaled_by_the_training_split(self, houses, scaling):
        data = fw.datasets.build("table", path=houses, target="price", scale_target=scaling)
        raw = fw.datasets.build("table", path=houses, target="price", scale_target="none")
        expected = raw.train.tensors[1].log() if scaling == "log" else raw.train.tensors[1]
        scaled = data.train.tensors[1]
        torch.testing.assert_close(
            scaled, (expected - expected.mean()) / expected.std(correction=0), atol=1e-5, rtol=0
        )
        prices = raw.test.tensors[1].double()
        torch.testing.assert_close(
            data.scale.inverse_transform(data.test.tensors[1]), prices, rtol=1e-5, atol=1e-3
        )
        assert raw.scale is None

    def test_a_target_without_logarithm_is_refused(self, tmp_path):
        path = write_table(tmp_path, "x,y\n1,0.5\n2,0\n3,2.5\n")
        with pytest.raises(
            DataError, match=r"the target of row 2 is \[0.0\], which has no logarithm"
        ):
            load_all(path, "y", target_kind="value", scale_target="log")

    def test_metrics_and_predictions_are_in_the_unit_of_the_target(self, houses, tmp_path):
        result = run_training(
            *houses_settings(houses),
            "data.scale_target=log",
            "task=regression",
            "model=tabular_resnet",
            "model.width=32",
            "model.depth=1",
            "model.dropout=0",
            "metrics=[mae,r2]",
            "trainer.max_epochs=20",
            "optimizer.lr=0.01",
        )
        data = fw.datasets.build("table", path=houses, target="price", scale_target="none")
        run = open_run(result.folder)
        (tmp_path / "test.csv").write_text(houses.read_text())
        predicted = run.predict(run.read_inputs(tmp_path / "test.csv"))["value"]
        rows = [line.split(",") for line in houses.read_text().splitlines()[1:]]
        prices = torch.tensor([float(row[3]) for row in rows])
        test = (prices[:, None] == data.test.tensors[1].flatten()).any(1)
        mae = (predicted[test] - prices[test]).abs().mean()
        assert mae.item() == pytest.approx(result.metrics["test/mae"], rel=1e-4)
        assert r2_score(prices[test], predicted[test]) == pytest.approx(
            result.metrics["test/r2"], abs=1e-4
        )
        assert result.metrics["test/r2"] > 0.8

    def test_a_scale_is_undone(self):
        amounts = torch.tensor([1.0, 10.0, 500.0], dtype=torch.float64)
        for scale in (Scale(), Scale(3.0, 2.0), Scale(1.0, 0.5, log=True)):
            torch.testing.assert_close(scale.inverse_transform(scale.transform(amounts)), amounts)


class TestModels:
    COLUMNS = (0, 3, 0, 5)

    def inputs(self, rows=6):
        torch.manual_seed(0)
        return torch.stack(
            [torch.randn(rows), torch.arange(rows) % 3, torch.randn(rows), torch.arange(rows) % 5],
            1,
        )

    def test_the_tokens_of_columns_are_those_of_the_paper(self):
        tokenizer = fw.blocks.build("feature_tokenizer", (4,), width=8, sizes=list(self.COLUMNS))
        x = self.inputs()
        tables = tokenizer.columns.table.weight.split([3, 5])
        found = tokenizer(x)
        for row in range(len(x)):  # T = b + x W for a number, b + e W for a category, numbers first
            for token, column in enumerate((0, 2)):
                expected = tokenizer.bias[token] + x[row, column] * tokenizer.weight[token]
                torch.testing.assert_close(found[row, token], expected)
            for token, column in enumerate((1, 3)):
                index = int(x[row, column])
                vector = tables[token][index] if index else torch.zeros(8)  # 0: unknown
                torch.testing.assert_close(
                    found[row, 2 + token], tokenizer.bias[2 + token] + vector
                )

    def test_the_residual_network_is_that_of_the_paper(self):
        model = fw.models.build(
            "tabular_resnet", (4,), (2,), self.COLUMNS, width=8, depth=2, embedding=3
        ).eval()
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
        x = self.inputs()
        (table,) = (
            tensor for name, tensor in model.state_dict().items() if name.endswith("table.weight")
        )
        first, second = table.split([3, 5])
        vectors = [
            torch.where(x[:, [column]] > 0, part[x[:, column].long()], 0)
            for column, part in ((1, first), (3, second))
        ]
        hidden = linears[0](torch.cat([x[:, [0, 2]], *vectors], dim=1))
        for block in range(2):
            inner = F.relu(linears[1 + 2 * block](norms[block](hidden)))
            hidden = hidden + linears[2 + 2 * block](inner)
        torch.testing.assert_close(model(x), linears[-1](F.relu(norms[-1](hidden))))

    @pytest.mark.parametrize("name", ["tabular_resnet", "ft_transformer"])
    def test_every_parameter_is_trained_except_those_of_unknown_categories(self, name):
        model = fw.models.build(name, (4,), (2,), self.COLUMNS, width=16, dropout=0.0)
        x = self.inputs(30)
        F.cross_entropy(model(x), torch.arange(30) % 2).backward()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("table.weight"):
                has_gradient = [bool(row.any()) for row in parameter.grad]
                assert has_gradient == [False, True, True, False, True, True, True, True]
            else:
                assert parameter.grad.any(), parameter_name

    def test_a_wrong_number_of_columns_is_refused(self):
        with pytest.raises(BuildError, match="sizes of 4 columns, got 2"):
            fw.models.build("ft_transformer", (4,), (2,), (0, 3))

    def test_a_model_that_does_not_embed_indices_is_refused(self, houses):
        with pytest.raises(
            BuildError,
            match=r"model=mlp would use .* choose a model that embeds them \(ft_transformer, ",
        ):
            Experiment(experiment(*houses_settings(houses), "task=regression", "metrics=mae")[0])


class TestMeasures:
    @pytest.mark.parametrize("classes", [2, 4])
    def test_auroc_is_that_of_scikit_learn(self, classes):
        torch.manual_seed(0)
        targets = torch.randint(classes, (3000,))
        logits = torch.randn(3000, classes) + F.one_hot(targets, classes)
        logits[:500] = logits[0].clone()  # ties
        metric = fw.metrics.build("auroc")
        shares = logits.softmax(1)
        areas = [roc_auc_score(targets == index, shares[:, index]) for index in range(classes)]
        assert metric.compute(metric.sums(logits, targets).double()) == pytest.approx(
            np.mean(areas), abs=5e-4
        )
        ignored = torch.cat([targets, -torch.ones(5, dtype=torch.int64)])
        more = metric.sums(torch.cat([logits, torch.randn(5, classes)]), ignored)
        assert torch.equal(more, metric.sums(logits, targets))

    def test_r2_of_logarithms(self):
        targets = torch.rand(50, 1) * 1000 + 1
        outputs = targets * (1 + 0.2 * torch.randn(50, 1)).abs()
        metric = fw.metrics.build("r2_log")
        found = metric.compute(metric.sums(outputs, targets).double())
        assert found == pytest.approx(r2_score(targets.log(), outputs.log()), abs=1e-5)


class TestRealData:
    """Small versions of the experiments, on a slice of the data where it was fetched."""

    @pytest.fixture
    def diamonds(self, tmp_path):
        try:
            file = data_folder("diamonds", "2 MB", "data=diabetes") / "diamonds.csv"
        except DataError as error:
            pytest.skip(str(error))
        lines = file.read_text().splitlines()
        return write_table(tmp_path, "\n".join([lines[0], *lines[1::20]]))

    @pytest.mark.parametrize("model", ["tabular_resnet", "ft_transformer"])
    def test_diamonds_are_priced(self, diamonds, model):
        result = run_training(
            "data=diamonds",
            f"data.path={diamonds}",
            "data.categories=index",
            "data.quantile=true",
            "task=regression",
            f"model={model}",
            "model.width=32",
            "model.depth=1",
            "model.dropout=0",
            "metrics=[mae,r2_log]",
            "trainer.max_epochs=8",
            "optimizer.lr=0.01",
            "loader.batch_size=64",
        )
        assert result.metrics["test/r2_log"] > 0.9  # the mean has 0
        assert result.metrics["test/mae"] < 1000  # dollars; the mean price has 3,000

    @pytest.fixture
    def flights(self, tmp_path):
        """Every 32nd flight, and the weather of all hours."""
        try:
            folder = data_folder("flights", "9 MB", "data=breast_cancer")
        except DataError as error:
            pytest.skip(str(error))
        with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
            header, *lines = archive.read(archive.namelist()[0]).decode().splitlines()
        with zipfile.ZipFile(tmp_path / "flights.csv.zip", "w") as archive:
            archive.writestr("flights.csv", "\n".join([header, *lines[::32]]))
        shutil.copy(folder / "weather.csv", tmp_path)
        return tmp_path

    def test_late_flights_are_predicted(self, flights):
        small = ["model.width=32", "model.depth=1", "trainer.max_epochs=2", "loader.batch_size=64"]
        result = run_training(
            "experiment=flights", f"data.path={flights}", *small, "callbacks=[checkpoint]"
        )
        assert result.metrics["test/auroc"] > 0.65  # of a model that knows nothing: 0.5

    def test_the_error_of_missing_data_has_the_command_to_fetch_it(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        for name, fallback in (("diamonds", "diabetes"), ("flights", "breast_cancer")):
            facts = rf"{name} is not in .*\(\d MB\).*fetch_data'? {name} \(data={fallback} needs"
            with pytest.raises(DataError, match=facts):
                fw.datasets.build(name)

    def test_flights_are_joined_with_the_weather(self, tmp_path):
        flights = (
            "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,"
            "carrier,flight,tailnum,origin,dest,air_time,distance,hour,minute,time_hour\n"
        )
        delays = [
            ("EWR", 1, 11),
            ("EWR", 2, 20),
            ("LGA", 1, "NA"),
            ("LGA", 2, 15),
            ("JFK", 1, 16),
            ("EWR", 2, 99),
        ]
        for origin, day, delay in delays:
            flights += (
                f"2013,1,{day},517,515,2,830,819,{delay},UA,1545,N1,{origin},IAH,227,1400,5,15,"
                f"2013-01-0{day}T10:00:00Z\n"
            )
        names = "temp,dewp,humid,wind_dir,wind_speed,wind_gust,precip,pressure,visib"
        weather = f"origin,year,month,day,hour,{names},time_hour\n"
        weather += f"EWR,2013,1,2,5,{','.join('123456789')},2013-01-02T10:00:00Z\n"
        weather += f"LGA,2013,1,2,5,{','.join('123456789')},2013-01-02T10:00:00Z\n"
        with zipfile.ZipFile(tmp_path / "flights.csv.zip", "w") as archive:
            archive.writestr("flights.csv", flights)
        (tmp_path / "weather.csv").write_text(weather)
        data = fw.datasets.build(
            "flights", path=tmp_path, categories="index", val_fraction=0.0, test_fraction=0.0
        )
        assert data.classes == ["late", "on time"]
        # The flight that did not arrive is left out.
        assert data.train.tensors[1].tolist() == [1, 0, 1, 0, 0]
        names = []
        for column in data.column_facts:
            names += [column["name"]] * (2 if column.get("missing") else 1)
        # Of a column with two inputs, the second one: whether the cell is empty.
        inputs = dict(zip(names, data.train.tensors[0].T.tolist(), strict=True))
        assert inputs["temp"] == [1, 0, 0, 1, 0]  # there is no weather for two flights
        # 1 January 2013 was a Tuesday, the second name in the alphabet.
        assert inputs["weekday"] == [1, 2, 2, 1, 2]


def last_weights(run):
    last = max((run.folder / "checkpoints").glob("step-*"))
    return (last / "model.safetensors").read_bytes()


def test_a_run_stopped_in_mid_epoch_resumes_exactly(houses, monkeypatch):
    settings = [
        *houses_settings(houses),
        "task=regression",
        "model=ft_transformer",
        "model.width=16",
        "model.depth=1",
        "metrics=[mae]",
        "trainer.max_epochs=2",
        "callbacks.checkpoint.every=5steps",
    ]
    unbroken = run_training(*settings, "run.name=unbroken")
    with cut_off_at(18, monkeypatch):
        run_training(*settings, "run.name=cut")
    resumed = run_training(*settings, "run.name=cut", "resume=auto")
    assert last_weights(unbroken) == last_weights(resumed)
