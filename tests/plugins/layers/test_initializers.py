import math

import pytest
import torch
from scipy import stats

import framework as fw
from framework.errors import BuildError

LINEAR = (400, 300)
CONV = (60, 20, 5, 5)
FAN_IN = {LINEAR: 300, CONV: 500}
FAN_OUT = {LINEAR: 400, CONV: 1500}


def draw(name, shape=LINEAR, **settings):
    return fw.initializers.build(name, torch.empty(shape), **settings)


@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize(
    ("name", "settings", "variance"),
    [
        ("xavier_uniform", {}, lambda i, o: 2 / (i + o)),
        ("xavier_normal", {"gain": 3.0}, lambda i, o: 18 / (i + o)),
        ("kaiming_uniform", {}, lambda i, o: 2 / i),
        ("kaiming_normal", {"mode": "fan_out"}, lambda i, o: 2 / o),
        ("kaiming_normal", {"a": 1.0}, lambda i, o: 1 / i),
        ("lecun_normal", {}, lambda i, o: 1 / i),
        ("lecun_uniform", {}, lambda i, o: 1 / i),
        ("variance_scaling", {}, lambda i, o: 1 / i),
        ("variance_scaling", {"scale": 2.0, "mode": "fan_out"}, lambda i, o: 2 / o),
        (
            "variance_scaling",
            {"mode": "fan_avg", "distribution": "uniform"},
            lambda i, o: 2 / (i + o),
        ),
        ("normal", {}, lambda i, o: 0.02**2),
        ("uniform", {}, lambda i, o: 0.1**2 / 12),
    ],
)
def test_weights_have_the_variance_of_the_paper(name, settings, variance, shape):
    weight = draw(name, shape, **settings)
    expected = variance(FAN_IN[shape], FAN_OUT[shape])
    assert weight.var().item() == pytest.approx(expected, rel=0.05)
    assert abs(weight.mean().item()) < 5 * math.sqrt(expected / weight.numel())


@pytest.mark.parametrize("name", [entry.name for entry in fw.initializers])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 3)], ids=str)
def test_it_fills_a_weight_in_place(name, shape):
    weight = torch.nn.Parameter(torch.full(shape, torch.nan))
    fw.initializers.build(name, weight)
    assert weight.isfinite().all()
    assert weight.is_leaf
    assert weight.requires_grad


def test_uniform_and_normal_have_their_shapes():
    bound = math.sqrt(3 / 300)
    assert (
        stats.kstest(
            draw("lecun_uniform").flatten()[:5000], stats.uniform(-bound, 2 * bound).cdf
        ).pvalue
        > 0.01
    )
    assert (
        stats.kstest(draw("normal", std=2.0).flatten()[:5000], stats.norm(0, 2).cdf).pvalue > 0.01
    )
    assert (
        stats.kstest(draw("uniform", a=1.0, b=3.0).flatten()[:5000], stats.uniform(1, 2).cdf).pvalue
        > 0.01
    )


def test_the_cut_of_trunc_normal_is_in_standard_deviations():
    weight = draw("trunc_normal", mean=1.0, std=0.1, cut=1.5)
    assert weight.min() >= 0.85
    assert weight.max() <= 1.15
    assert weight.std().item() == pytest.approx(
        stats.truncnorm(-1.5, 1.5, scale=0.1).std(), rel=0.02
    )


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (16, 8, 3, 3)], ids=str)
def test_orthogonal_weights_have_orthonormal_rows_or_columns(shape):
    matrix = draw("orthogonal", shape, gain=2.0).flatten(1)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    torch.testing.assert_close(matrix @ matrix.T, 4 * torch.eye(len(matrix)), atol=1e-4, rtol=0)


def test_identity_layers_return_their_input():
    features = torch.randn(2, 6)
    image = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(features @ draw("identity", (6, 6)).T, features)
    torch.testing.assert_close(
        torch.nn.functional.conv2d(image, draw("eye", (6, 6, 3, 3)), padding=1), image
    )
    grouped = torch.nn.functional.conv2d(
        image, draw("dirac", (6, 3, 3, 3), groups=2), padding=1, groups=2
    )
    torch.testing.assert_close(grouped, image)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_sparse_zeroes_a_share_of_each_column(memory):
    weight = fw.initializers.build(
        "sparse", torch.empty(50, 4, 3, 3).to(memory_format=memory), sparsity=0.8, std=1.0
    )
    assert (weight.reshape(50, -1) == 0).sum(0).tolist() == [40] * 36


def test_fixed_values():
    assert (draw("zeros") == 0).all()
    assert (draw("ones") == 1).all()
    assert (draw("constant", val=0.3) == 0.3).all()


def test_glorot_and_he_are_other_names():
    for alias, name in [("glorot_uniform", "xavier_uniform"), ("he_normal", "kaiming_normal")]:
        assert fw.initializers.get(alias).name == name


def test_wrong_arguments_are_explained():
    with pytest.raises(BuildError, match="a <= b, got a=1, b=0"):
        draw("uniform", a=1.0, b=0.0)
    with pytest.raises(BuildError, match=r"2 or more axes, got \(5,\)"):
        draw("variance_scaling", (5,))
