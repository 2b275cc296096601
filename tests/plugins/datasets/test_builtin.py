import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits, load_iris
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier

import framework as fw
from framework.data.dataset import check_data
from framework.errors import DataError, SettingError

NEED_NO_FILE = [
    "digits",
    "blobs",
    "spirals",
    "friedman1",
    "iris",
    "wine",
    "breast_cancer",
    "diabetes",
]


def arrays(split):
    return tuple(tensor.numpy() for tensor in split.tensors)


def score(model, data):
    x, y = arrays(data.train)
    x_test, y_test = arrays(data.test)
    return model.fit(x, y.squeeze()).score(x_test, y_test.squeeze())


ABSURD = {
    "blobs": [{"samples": 10**12}, {"features": 10**12}, {"classes": 10**12}, {"samples": 10**30}],
    "spirals": [{"samples": 10**12}],
    "friedman1": [{"samples": 10**12}, {"features": 10**12}],
    "digits": [{"size": 10**6}],
    "seasonal": [{"weeks": 10**12}],
    "tones": [{"samples": 10**12}, {"seconds": 1e12}, {"seconds": 1e308}, {"sample_rate": 10**12}],
}
CASES = []
for dataset, cases in ABSURD.items():
    CASES += [pytest.param(dataset, case, id=f"{dataset}-{next(iter(case))}") for case in cases]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_size_beyond_the_memory_is_refused(name, settings):
    with pytest.raises(DataError, match=r"needs about \S+ GiB; \S+ GiB are free$"):
        fw.datasets.build(name, **settings)


def test_every_size_setting_of_synthetic_data_is_tested():
    """Control: a new setting of a data set must be added to ABSURD."""
    sizes = {"samples", "features", "size", "weeks", "seconds", "sample_rate"}
    for name, cases in ABSURD.items():
        tested = set().union(*cases)
        assert sizes & set(fw.datasets.get(name).settings) <= tested


@pytest.mark.parametrize("name", NEED_NO_FILE)
def test_every_data_set_fulfils_the_contract(name):
    data = fw.datasets.build(name)
    check_data(data)
    x, y = data.train[:5]
    assert x.shape == (5, *data.in_shape)
    assert (x.dtype, data.train.tensors[0].is_contiguous()) == (torch.float32, True)
    if data.target == "class":
        assert (y.shape, y.dtype, data.out_shape) == ((5,), torch.int64, (len(data.classes),))
        for split in (data.train, data.val, data.test):
            assert set(split.tensors[1].tolist()) == set(range(len(data.classes)))
    else:
        assert (y.shape, y.dtype, data.classes) == ((5, *data.out_shape), torch.float32, [])
    assert json.loads(json.dumps(data.facts())) == data.facts()
    assert torch.equal(fw.datasets.build(name).val.tensors[0], data.val.tensors[0])
    raw = fw.datasets.build(name, normalize=False, val_fraction=0.0, test_fraction=0.0)
    assert raw.val is raw.test is None
    assert len(raw.train) == sum(map(len, (data.train, data.val, data.test)))


def test_digits_equal_those_of_scikit_learn():
    data = fw.datasets.build("digits", normalize=False, val_fraction=0.0, test_fraction=0.0)
    pixels, labels = load_digits(return_X_y=True)
    np.testing.assert_array_equal(data.train.tensors[0] * 16, pixels)
    np.testing.assert_array_equal(data.train.tensors[1], labels)
    assert fw.datasets.build("digits", image=True).in_shape == (1, 8, 8)


def stretched(images, size):
    """Interpolate linearly along each axis between the centres of the pixels."""
    at = (np.arange(size) + 0.5) * 8 / size - 0.5
    for axis in (1, 2):
        images = np.apply_along_axis(lambda line: np.interp(at, np.arange(8), line), axis, images)
    return images


def test_digits_of_another_size_are_interpolated(tmp_path):
    fractions = {"val_fraction": 0.0, "test_fraction": 0.0}
    data = fw.datasets.build("digits", size=28, normalize=False, **fractions)
    assert data.in_shape == (1, 28, 28)
    expected = stretched(load_digits().images[:40], 28)[:, None] / 16
    np.testing.assert_allclose(data.train.tensors[0][:40], expected, atol=1e-6)
    scaled = fw.datasets.build("digits", size=28, **fractions)
    inputs = scaled.train.tensors[0]
    assert (inputs.mean().item(), inputs.std().item()) == pytest.approx((0, 1), abs=1e-3)
    np.save(tmp_path / "small.npy", load_digits().data[:9])
    np.save(tmp_path / "large.npy", stretched(load_digits().images[:9], 28))
    for file in ("small.npy", "large.npy"):
        read = type(scaled).read_inputs(tmp_path / file, scaled.facts())
        torch.testing.assert_close(read, inputs[:9], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_digits_can_be_classified():
    data = fw.datasets.build("digits")
    model = MLPClassifier(128, max_iter=60, random_state=0, early_stopping=False)
    assert score(model, data) >= 0.97


def test_digits_predict_from_raw_pixels(tmp_path):
    data = fw.datasets.build("digits", image=True, val_fraction=0.0, test_fraction=0.0)
    np.save(tmp_path / "flat.npy", load_digits().data[:9])
    read = type(data).read_inputs(tmp_path / "flat.npy", data.facts())
    torch.testing.assert_close(read, data.train.tensors[0][:9])


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_spirals_need_a_nonlinear_model_and_blobs_do_not():
    assert score(LogisticRegression(), fw.datasets.build("blobs", noise=0.5)) > 0.98
    spirals = fw.datasets.build("spirals")
    assert score(LogisticRegression(), spirals) < 0.6
    assert score(MLPClassifier((64, 64), max_iter=150, random_state=0), spirals) > 0.95


def test_blobs_have_the_noise_of_the_setting():
    data = fw.datasets.build(
        "blobs", samples=6000, classes=2, features=3, noise=0.5, normalize=False
    )
    x, y = data.train.tensors
    for label in (0, 1):
        torch.testing.assert_close(x[y == label].std(0), torch.full((3,), 0.5), atol=0.03, rtol=0)


def friedman1(x):
    interaction = 10 * np.sin(np.pi * x[:, 0] * x[:, 1])
    return interaction + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]


def test_friedman1_is_the_formula_of_the_paper():
    data = fw.datasets.build("friedman1", features=7, noise=0.0, normalize=False)
    x, y = arrays(data.train)
    np.testing.assert_allclose(y[:, 0], friedman1(x.astype("float64")), rtol=1e-5)
    noisy = fw.datasets.build("friedman1", features=7, noise=2.0, samples=20000, normalize=False)
    x, y = arrays(noisy.train)
    noise = y[:, 0].astype("float64") - friedman1(x.astype("float64"))
    assert np.std(noise) == pytest.approx(2.0, rel=0.03)
    assert 0.5 < score(Ridge(), fw.datasets.build("friedman1")) < 0.85  # of a linear model


def test_the_seed_changes_the_data():
    for name in ("blobs", "spirals", "friedman1"):
        first = fw.datasets.build(name).train.tensors[0]
        second = fw.datasets.build(name, seed=1).train.tensors[0]
        assert not torch.equal(first, second)


def test_iris_predicts_from_a_csv_file(tmp_path):
    iris = load_iris()
    data = fw.datasets.build("iris", val_fraction=0.0, test_fraction=0.0)
    lines = [",".join(iris.feature_names), *(",".join(map(str, row)) for row in iris.data)]
    (tmp_path / "flowers.csv").write_text("\n".join(lines))
    read = type(data).read_inputs(tmp_path / "flowers.csv", data.facts())
    torch.testing.assert_close(read, data.train.tensors[0])
    assert data.classes == ["setosa", "versicolor", "virginica"]


def test_settings_are_checked():
    with pytest.raises(SettingError, match=r"features: expected int in \[5, inf\), got 4"):
        fw.datasets.build("friedman1", features=4)
    with pytest.raises(SettingError, match="expected a sum below 1"):
        fw.datasets.build("digits", val_fraction=0.6, test_fraction=0.5)
    with pytest.raises(DataError, match="too few"):
        fw.datasets.build("blobs", samples=3)
