"""An offset or another unit of inputs and targets changes results by rounding only."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score, roc_auc_score
from torch import Tensor
from torch.nn import functional as F

import framework as fw
from framework.composition.compose import CommandLine, run_composed as compose
from framework.errors import DataError, RunError
from framework.experiment.experiment import train
from framework.experiment.result import Result
from framework.experiment.trained.load import open_run
from framework_plugins.auroc import as_keys


def value(metric: fw.Metric, outputs: Tensor, targets: Tensor, size: int = 97) -> float:
    """Return the metric over batches, as the framework adds them up."""
    batches = zip(outputs.split(size), targets.split(size), strict=True)
    sums = [metric.sums(*batch).double() for batch in batches]
    return metric.compute(torch.stack(sums).sum(0))


class TestR2:
    @pytest.mark.parametrize(
        ("mean", "std"),
        [
            (0, 1),
            (1e6, 0.5),
            (2_451_545, 0.9),
            (1.7e9, 1000),
            (1.7e9, 0.5),
            (-1e12, 1),
            (0, 1e-12),
            (1e-6, 1e-12),
        ],
    )
    def test_it_equals_that_of_scikit_learn_for_targets_far_from_0(self, mean, std):
        targets = mean + std * torch.randn(1000, 1, dtype=torch.float64)
        outputs = targets + 0.1 * std * torch.randn(1000, 1, dtype=torch.float64)
        found = value(fw.metrics.build("r2"), outputs, targets)
        assert found == pytest.approx(r2_score(targets, outputs), abs=1e-9)
        assert found == pytest.approx(0.99, abs=0.003)

    @pytest.mark.parametrize(("mean", "std"), [(1e4, 0.003), (1e5, 0.03), (1e6, 0.3)])
    def test_independent_noise_does_not_predict_float32_targets(self, mean, std):
        targets, outputs = mean + std * torch.randn(2, 500, 1)
        expected = r2_score(targets.double(), outputs.double())
        assert value(fw.metrics.build("r2"), outputs, targets) == pytest.approx(expected, abs=1e-9)
        assert expected < -0.5

    @pytest.mark.parametrize("constant", [0.0, 0.1, 1e3, 1.7e9 + 1 / 3])
    def test_constant_targets_give_1_if_predicted_exactly_and_else_0(self, constant):
        targets = torch.full((500, 1), constant, dtype=torch.float64)
        assert value(fw.metrics.build("r2"), targets, targets) == 1
        assert value(fw.metrics.build("r2"), targets + 1e-6, targets) == 0

    def test_of_several_values_it_is_the_mean(self):
        normal = torch.randn(300, 3, dtype=torch.float64)
        noise = torch.randn(300, 3, dtype=torch.float64)
        targets = normal * torch.tensor([1e-9, 1, 1e6]) + torch.tensor([5, 1e7, 0])
        outputs = targets + noise * torch.tensor([1e-9, 0.1, 3e5])
        expected = r2_score(targets, outputs)
        assert value(fw.metrics.build("r2"), outputs, targets) == pytest.approx(expected, abs=1e-6)

    def test_nan_gives_nan(self):
        targets = torch.randn(10, 1)
        outputs = targets.clone()
        outputs[3] = math.inf
        assert value(fw.metrics.build("r2"), outputs, targets) == -math.inf
        outputs[3] = math.nan
        assert math.isnan(value(fw.metrics.build("r2"), outputs, targets))
        assert math.isnan(value(fw.metrics.build("r2"), targets, outputs))


class TestAreaUnderCurve:
    ROWS = 20_000

    @pytest.fixture
    def scores(self):
        draw = torch.Generator().manual_seed(0)
        own = torch.rand(self.ROWS, generator=draw) < 0.1
        return torch.randn(self.ROWS, generator=draw) + own, own

    @pytest.mark.parametrize("offset", [0.0, 8.0, -8.0, 1000.0, 1e4, -1e4])
    @pytest.mark.parametrize("factor", [1e-3, 1.0, 20.0, 1e4])
    def test_it_equals_that_of_scikit_learn_for_logits_of_any_scale_and_offset(
        self, scores, factor, offset
    ):
        logits = scores[0] * factor + offset
        own = scores[1]
        expected = roc_auc_score(own, logits)
        metric = fw.metrics.build("auroc")
        pairs = torch.stack([torch.full_like(logits, 3.0), logits + 3.0], dim=1)
        expected_of_pairs = roc_auc_score(own, pairs[:, 1].double() - 3)
        assert value(metric, pairs, own.long(), 5000) == pytest.approx(expected_of_pairs, abs=1e-3)
        labels = own.float().unsqueeze(1)
        assert value(metric, logits.unsqueeze(1), labels, 5000) == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize(
        "kind", ["rounded", "half of them equal", "two groups", "heavy tails", "outliers"]
    )
    def test_it_is_exact_for_ties_and_uneven_scores(self, scores, kind):
        logits, own = scores
        row = torch.arange(self.ROWS)
        scale = torch.linspace(-8, 8, self.ROWS)[torch.randperm(self.ROWS)].exp()
        changed = {
            "rounded": logits.round(),
            "half of them equal": torch.where(row % 2 == 0, 1e4, 1e4 + logits),
            "two groups": torch.where(row % 2 == 0, 1e4 + logits, logits - 1e4),
            "heavy tails": logits * scale,
            "outliers": torch.where(row % 5000 == 0, -1e9, 1e4 + logits),
        }[kind]
        labels = own.float().unsqueeze(1)
        found = value(fw.metrics.build("auroc"), changed.unsqueeze(1), labels, 5000)
        assert found == pytest.approx(roc_auc_score(own, changed), abs=1e-3)

    @pytest.mark.parametrize("factor", [1.0, 100.0, 1e4])
    def test_saturated_probabilities_of_many_classes_keep_their_order(self, factor):
        targets = torch.randint(4, (4000,))
        logits = (torch.randn(4000, 4) + F.one_hot(targets, 4)) * factor
        logits += torch.tensor([0.0, 8.0, -8.0, 500.0])
        exact = logits.double()
        areas = []
        for index in range(4):
            others = exact[:, torch.arange(4) != index].logsumexp(1)
            areas.append(roc_auc_score(targets == index, exact[:, index] - others))
        metric = fw.metrics.build("auroc")
        assert value(metric, logits, targets, 1000) == pytest.approx(np.mean(areas), abs=1e-3)
        assert value(metric, logits + 1e4, targets, 1000) == pytest.approx(np.mean(areas), abs=1e-3)

    def test_scores_of_a_device_without_float64_have_the_same_order(self):
        powers = 10.0 ** torch.randint(-20, 20, (1000,))
        scores = torch.cat([torch.randn(1000) * powers, torch.tensor([0.0, math.inf, -math.inf])])
        keys = as_keys(scores)
        assert torch.equal(keys.argsort(stable=True), scores.argsort(stable=True))
        assert torch.equal(keys[:-2], as_keys(scores.double())[:-2])

    def test_a_logit_of_nan_gives_nan(self, scores):
        logits = scores[0][:500].clone().unsqueeze(1)
        labels = scores[1][:500].float().unsqueeze(1)
        logits[7] = math.nan
        assert math.isnan(value(fw.metrics.build("auroc"), logits, labels))


def test_matthews_of_large_counts_is_exact():
    sums = torch.tensor([[10**9, 1], [10**9 + 1, 2], [10**9 + 1, 2]], dtype=torch.float64)
    n = 10**9 + 3
    right = 10**9 + 1
    expected = (n * right - (10**9 + 1) ** 2 - 4) / (n**2 - (10**9 + 1) ** 2 - 4)
    assert fw.metrics.build("matthews").compute(sums) == pytest.approx(expected, rel=1e-12)


ROWS = 60
DRAW = np.random.default_rng(0)
INPUTS = DRAW.normal(size=(ROWS, 3))
VALUES = INPUTS @ [1.0, 2.0, -1.0] + 0.1 * DRAW.normal(size=ROWS)
CLASSES = np.arange(ROWS) % 3
CHANGES = [
    (1.0, 1e6),
    (1.0, -1e8),
    (3.0, 1e3),
    (1e-12, 0.0),
    (1e-12, 1e-6),
    (1e9, 1e15),
    (86_400.0, 1.7e9),
]
"""Factors and offsets of numbers whose mean is 0 and whose standard deviation is about 1."""


def csv(path: Path, columns: dict[str, np.ndarray]) -> Path:
    lists = [column.tolist() for column in columns.values()]
    lines = [",".join(columns)]
    lines += [",".join(map(repr, row)) for row in zip(*lists, strict=True)]
    path.write_text("\n".join(lines))
    return path


def ts(path: Path, inputs: np.ndarray) -> Path:
    """Write each row as a sequence of 2 or 3 frames in two equal channels."""
    lines = ["@classLabel true a b", "@data"]
    for number, row in enumerate(inputs):
        frames = ",".join(map(repr, row.tolist()[: 2 + number % 2]))
        lines.append(f"{frames}:{frames}:{'ab'[number % 2]}")
    path.write_text("\n".join(lines))
    return path


def idx(path: Path, array: np.ndarray) -> None:
    kind, number = (">f8", 14) if array.dtype.kind == "f" else ("u1", 8)
    header = bytes([0, 0, number, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(kind).tobytes())


def load_npz(folder, inputs, values):
    np.savez(folder / "d.npz", x=inputs, y=CLASSES)
    return fw.datasets.build("npz", path=folder / "d.npz")


def load_official_parts(folder, inputs, values):
    parts = {"x_train": inputs[:40], "x_val": inputs[40:50], "x_test": inputs[50:]}
    answers = {"y_train": CLASSES[:40], "y_val": CLASSES[40:50], "y_test": CLASSES[50:]}
    np.savez(folder / "d.npz", **parts, **answers)
    return fw.datasets.build("npz", path=folder / "d.npz")


def load_idx(folder, inputs, values):
    for part in ("train", "t10k"):
        idx(folder / f"{part}-images-idx3-ubyte", inputs[:, :, None])
        idx(folder / f"{part}-labels-idx1-ubyte", CLASSES)
    return fw.datasets.build("idx", path=folder)


def load_table(folder, inputs, values):
    path = csv(folder / "d.csv", {"a": inputs[:, 0], "b": inputs[:, 1], "y": values})
    return fw.datasets.build("table", path=path, target="y")


def load_parquet(folder, inputs, values):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"a": inputs[:, 0], "y": values}), folder / "d.parquet")
    return fw.datasets.build("table", path=folder / "d.parquet", target="y", quantile=True)


def load_diamonds(folder, inputs, values):
    path = csv(
        folder / "diamonds.csv", {"carat": inputs[:, 0], "depth": inputs[:, 1], "price": values}
    )
    return fw.datasets.build("diamonds", path=path, scale_target="standard")


def load_series(folder, inputs, values):
    path = csv(folder / "d.csv", {"v": values, "w": inputs[:, 1]})
    return fw.datasets.build("series", path=path, target="v", features=["w"], lookback=4, horizon=2)


def load_electricity(folder, inputs, values):
    (folder / "taylor.py").write_text(f"data = {values.tolist()!r}")
    return fw.datasets.build("electricity", path=folder / "taylor.py", lookback=4, horizon=2)


def load_ts_files(folder, inputs, values):
    return fw.datasets.build("ts_files", path=ts(folder / "d.ts", inputs))


def load_vowels(folder, inputs, values):
    for part in ("TRAIN", "TEST"):
        ts(folder / f"JapaneseVowels_{part}.ts", inputs)
    return fw.datasets.build("vowels", path=folder)


SOURCES = {
    "npz": load_npz,
    "official_parts": load_official_parts,
    "idx": load_idx,
    "table": load_table,
    "parquet": load_parquet,
    "diamonds": load_diamonds,
    "series": load_series,
    "electricity": load_electricity,
    "ts_files": load_ts_files,
    "vowels": load_vowels,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_neither_inputs_nor_targets_of_a_data_source_depend_on_unit_and_offset(source, tmp_path):
    plain = source(tmp_path, INPUTS, VALUES)
    for factor, offset in CHANGES:
        data = source(tmp_path, factor * INPUTS + offset, factor * VALUES + offset)
        for part in ("train", "val", "test"):
            tensors = getattr(data, part).tensors
            for found, expected in zip(tensors, getattr(plain, part).tensors, strict=True):
                assert found.dtype == expected.dtype
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-5)
        if data.scale is not None:
            found = (data.scale.inverse_transform(data.test.tensors[1]) - offset) / factor
            torch.testing.assert_close(
                found, plain.scale.inverse_transform(plain.test.tensors[1]), rtol=1e-5, atol=5e-5
            )


@pytest.mark.parametrize("kind", ["npz", "table"])
def test_integers_far_from_0_are_distinguished(kind, tmp_path):
    small = (1000 * INPUTS).round().astype(np.int64)
    sets = []
    for inputs in (small.astype(float), 2**40 + small, -(2**44) + small):
        if kind == "npz":
            np.savez(tmp_path / "d.npz", x=inputs, y=CLASSES)
            sets.append(fw.datasets.build("npz", path=tmp_path / "d.npz"))
        else:
            path = csv(tmp_path / "d.csv", {"a": inputs[:, 0], "y": VALUES})
            sets.append(fw.datasets.build("table", path=path, target="y"))
    expected = sets[0].train.tensors[0]
    for data in sets[1:]:
        torch.testing.assert_close(data.train.tensors[0], expected, rtol=1e-5, atol=5e-5)


def test_a_constant_feature_becomes_0(tmp_path):
    for constant in (0.1, 1e8 + 0.1, 2.0**60):
        inputs = np.concatenate([INPUTS[:, :1], np.full((ROWS, 1), constant)], 1)
        np.savez(tmp_path / "d.npz", x=inputs, y=CLASSES)
        assert not fw.datasets.build("npz", path=tmp_path / "d.npz").train.tensors[0][:, 1].any()
        path = csv(tmp_path / "d.csv", {"a": inputs[:, 1], "b": inputs[:, 0], "y": VALUES})
        assert not fw.datasets.build("table", path=path, target="y").train.tensors[0][:, 0].any()


@pytest.mark.parametrize("constant", [0.1, 1e6 / 3])
def test_constant_frames_and_targets_become_0(constant, tmp_path):
    constants = np.full((ROWS, 3), constant)
    cases = load_ts_files(tmp_path, constants, VALUES)
    assert (cases.mean, cases.std) == ([pytest.approx(constant)] * 2, [1, 1])
    assert not cases.train.tensors[0][:, :2].any()
    series = load_series(tmp_path, constants, VALUES)
    assert not series.train.tensors[0][:, :, 1].any()
    table = load_table(tmp_path, INPUTS, constants[:, 0])
    assert table.scale == (pytest.approx(constant), 1, False)
    np.savez(tmp_path / "d.npz", x=INPUTS, y=np.stack([VALUES, constants[:, 0]], 1))
    two = fw.datasets.build("npz", path=tmp_path / "d.npz", scale_target="standard")
    assert two.scale.std == [pytest.approx(VALUES.std(), rel=0.3), 1]
    assert not two.train.tensors[1][:, 1].any()


class TestWhatFloat32CannotHold:
    def test_inputs_that_are_not_standardised(self, tmp_path):
        np.savez(tmp_path / "d.npz", x=INPUTS + 1e8, y=CLASSES)
        with pytest.raises(
            DataError,
            match=r"float32 cannot hold numbers up to 1e\+08 with .*; use data.normalize=true",
        ):
            fw.datasets.build("npz", path=tmp_path / "d.npz", normalize=False)
        path = csv(tmp_path / "d.csv", {"a": INPUTS[:, 0] + 1e8, "y": VALUES})
        with pytest.raises(
            DataError, match=r"column 'a': float32 cannot hold .*; use normalize=true"
        ):
            fw.datasets.build("table", path=path, target="y", normalize=False)
        with pytest.raises(
            DataError, match=r"frames: float32 cannot hold .*; use data.normalize=true"
        ):
            fw.datasets.build("ts_files", path=ts(tmp_path / "d.ts", INPUTS + 1e8), normalize=False)

    def test_targets_that_are_not_scaled(self, tmp_path):
        path = csv(tmp_path / "d.csv", {"a": INPUTS[:, 0], "y": VALUES + 1e8})
        with pytest.raises(
            DataError, match=r"targets: float32 cannot hold .*; use scale_target=standard"
        ):
            fw.datasets.build("table", path=path, target="y", scale_target="none")

    def test_integers_that_float64_cannot_hold_either(self, tmp_path):
        np.savez(tmp_path / "d.npz", x=2**62 + np.arange(ROWS)[:, None], y=CLASSES)
        with pytest.raises(
            DataError, match=r"float64 cannot hold integers up to 46116\d+; subtract an offset"
        ):
            fw.datasets.build("npz", path=tmp_path / "d.npz")
        path = csv(tmp_path / "d.csv", {"a": 2**62 + np.arange(ROWS), "y": VALUES})
        with pytest.raises(
            DataError, match=r"column 'a': float64 cannot distinguish 46116\d+ and 46116\d+;"
        ):
            fw.datasets.build("table", path=path, target="y")


def test_values_of_an_array_are_scaled_only_where_they_must_be(tmp_path):
    def scale(values, **settings):
        np.savez(tmp_path / "d.npz", x=INPUTS, y=values)
        return fw.datasets.build("npz", path=tmp_path / "d.npz", **settings).scale

    assert scale(VALUES) is None
    far = scale(VALUES + 1e7)
    assert far.mean == pytest.approx(1e7, abs=2)
    assert far.std == 1
    assert scale(1e-12 * VALUES).std == pytest.approx(1e-12 * VALUES.std(), rel=0.3)
    assert scale(VALUES, scale_target="standard").std == pytest.approx(VALUES.std(), rel=0.3)
    two = scale(np.stack([1e-9 * VALUES, VALUES + 1.7e9], 1))  # each by its own moments
    assert two.std == pytest.approx([1e-9 * VALUES.std(), VALUES.std()], rel=0.3)


def run_training(folder: Path, *overrides: str) -> Result:
    results = []
    limits = [
        "trainer.max_epochs=6",
        "trainer.device=cpu",
        "optimizer.lr=0.01",
        "loader.batch_size=16",
    ]
    model = ["model.depth=1", "model.width=16", "model.dropout=0"]
    parts = ["task=regression", "metrics=[r2,mae]", "loggers=[]", "callbacks=checkpoint"]
    line = CommandLine([*limits, *model, *parts, *overrides, f"run.root={folder / 'runs'}"])
    compose(line, lambda job: results.append(train(job.spec, job.experiment, job.overrides)))
    return results[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", ["table", "series", "npz"])
def test_metrics_and_predictions_do_not_depend_on_unit_and_offset(kind, tmp_path):
    found = []
    values = (VALUES - VALUES.mean()) / VALUES.std()
    for factor, offset in ((1.0, 0.0), (1.0, 1e6), (1000.0, 1.7e9)):
        inputs = factor * INPUTS + offset
        targets = factor * values + offset
        folder = tmp_path / f"{factor}-{offset}"
        folder.mkdir()
        if kind == "npz":
            np.savez(folder / "d.npz", x=inputs, y=targets)
            settings = ["data=npz", f"data.path={folder / 'd.npz'}", "data.scale_target=standard"]
        else:
            csv(
                folder / "d.csv",
                {"a": inputs[:, 0], "b": inputs[:, 1], "c": inputs[:, 2], "y": targets},
            )
            settings = [f"data={kind}", f"data.path={folder / 'd.csv'}", "data.target=y"]
        if kind == "series":
            settings += ["data.features=[a,b]", "data.lookback=4", "data.horizon=2"]
        result = run_training(folder, *settings)
        run = open_run(result.folder)
        (file,) = folder.glob("d.*")
        predicted = next(iter(run.predict(run.read_inputs(file)).values()))
        assert predicted.dtype == torch.float64
        test_metrics = {name: value for name, value in result.metrics.items() if "test" in name}
        assert run.evaluate() == pytest.approx(test_metrics)
        found.append((result.metrics, factor, (predicted - offset) / factor))
    plain = found[0][0]
    assert -1 < plain["test/r2"] < 0.999
    for metrics, factor, predicted in found[1:]:
        for part in ("train", "val", "test"):
            assert metrics[f"{part}/r2"] == pytest.approx(plain[f"{part}/r2"], abs=1e-4)
            assert metrics[f"{part}/mae"] / factor == pytest.approx(plain[f"{part}/mae"], rel=1e-4)
        torch.testing.assert_close(predicted, found[0][2], rtol=0, atol=1e-4)


def test_predictions_of_a_float64_model_keep_their_digits():
    outputs = 1.7e9 + torch.arange(10, dtype=torch.float64)[:, None] / 8
    assert torch.equal(fw.Trainer(max_steps=1).predict(outputs, model=torch.nn.Identity()), outputs)


def test_a_run_with_targets_of_another_scale_is_not_evaluated(tmp_path):
    path = csv(tmp_path / "d.csv", {"a": INPUTS[:, 0], "y": VALUES})
    result = run_training(
        tmp_path, "data=table", f"data.path={path}", "data.target=y", "trainer.max_epochs=1"
    )
    facts = json.loads((result.folder / "facts.json").read_text())
    for scale in (None, [100.0, 1.0, False]):
        changed = {name: value for name, value in facts.items() if name != "scale"}
        changed |= {"scale": scale} if scale else {}
        (result.folder / "facts.json").write_text(json.dumps(changed))
        with pytest.raises(RunError, match="the targets were scaled by"):
            open_run(result.folder).evaluate()
