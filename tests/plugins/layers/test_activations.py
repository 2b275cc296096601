import math

import numpy as np
import pytest
import torch
from scipy import special
from torch.autograd import gradcheck

import framework as fw
from framework.errors import BuildError, SettingError

X = torch.linspace(-5, 5, 41, dtype=torch.float64)
x = X.numpy()
sigmoid = special.expit

FORMULAS = {
    "identity": x,
    "relu": np.maximum(x, 0),
    "relu6": np.clip(x, 0, 6),
    "leaky_relu": np.where(x > 0, x, 0.01 * x),
    "prelu": np.where(x > 0, x, 0.25 * x),
    "elu": np.where(x > 0, x, np.expm1(x)),
    "celu": np.where(x > 0, x, np.expm1(x)),
    "selu": 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x)),
    "gelu": x * (1 + special.erf(x / math.sqrt(2))) / 2,
    "silu": x * sigmoid(x),
    "mish": x * np.tanh(np.log1p(np.exp(x))),
    "softplus": np.log1p(np.exp(x)),
    "sigmoid": sigmoid(x),
    "logsigmoid": special.log_expit(x),
    "tanh": np.tanh(x),
    "tanhshrink": x - np.tanh(x),
    "softsign": x / (1 + np.abs(x)),
    "softshrink": np.sign(x) * np.maximum(np.abs(x) - 0.5, 0),
    "hardshrink": np.where(np.abs(x) > 0.5, x, 0),
    "hardtanh": np.clip(x, -1, 1),
    "hardsigmoid": np.clip(x / 6 + 0.5, 0, 1),
    "hardswish": x * np.clip(x / 6 + 0.5, 0, 1),
    "threshold": np.maximum(x, 0),
    "softmax": special.softmax(x),
    "softmin": special.softmax(-x),
    "log_softmax": special.log_softmax(x),
    "squareplus": (x + np.sqrt(x**2 + 4)) / 2,
    "snake": x + np.sin(x) ** 2,
    "sine": np.sin(x),
    "relu_squared": np.maximum(x, 0) ** 2,
    "quick_gelu": x * sigmoid(1.702 * x),
}
a, b = np.split(x[:40], 2)
GATES = {
    "glu": a * sigmoid(b),
    "reglu": a * np.maximum(b, 0),
    "geglu": a * b * (1 + special.erf(b / math.sqrt(2))) / 2,
    "swiglu": a * b * sigmoid(b),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_an_activation_follows_its_formula(name):
    out = fw.activations.build(name).double()(X)
    np.testing.assert_allclose(out.detach(), FORMULAS[name], atol=1e-12)


@pytest.mark.parametrize("name", GATES)
def test_a_gate_halves_the_last_axis(name):
    gate = fw.activations.build(name)
    np.testing.assert_allclose(gate(X[:40]), GATES[name], atol=1e-12)
    assert gate(torch.randn(2, 3, 8)).shape == (2, 3, 4)


@pytest.mark.parametrize("name", ["reglu", "geglu", "swiglu"])
def test_a_gated_activation_refuses_an_odd_axis(name):
    with pytest.raises(BuildError, match=r"even last axis, got 5 in \(2, 5\)"):
        fw.activations.build(name)(torch.randn(2, 5))


def test_every_activation_is_checked_here():
    by_chance = {"rrelu"}
    assert FORMULAS.keys() | GATES.keys() | by_chance >= {
        e.name
        for e in fw.activations
        if e.registered.module == "framework_plugins.layers.activations"
    }


def test_rrelu_draws_its_slope_in_training_only():
    rrelu = fw.activations.build("rrelu", lower=0.1, upper=0.2)
    slopes = rrelu(-torch.ones(1000)).neg()
    assert slopes.min() >= 0.1
    assert slopes.max() <= 0.2
    assert slopes.std() > 0.01
    torch.testing.assert_close(rrelu.eval()(-torch.ones(3)), torch.full((3,), -0.15))


def test_settings_reach_the_formula():
    build = fw.activations.build
    torch.testing.assert_close(build("snake", alpha=2.0)(X), X + torch.sin(2 * X) ** 2 / 2)
    torch.testing.assert_close(build("squareplus", b=1.0)(X), (X + torch.sqrt(X**2 + 1)) / 2)
    torch.testing.assert_close(build("sine", omega=30.0)(X), torch.sin(30 * X))
    torch.testing.assert_close(
        build("threshold", threshold=1.0, value=-2.0)(X), torch.where(X > 1, X, -2.0)
    )
    torch.testing.assert_close(build("leaky_relu", negative_slope=0.3)(-X.abs()), -0.3 * X.abs())


def test_the_frequency_of_snake_is_learned_on_request():
    fixed = fw.activations.build("snake")
    learned = fw.activations.build("snake", alpha=0.7, trainable=True)
    assert list(fixed.parameters()) == []
    assert learned.alpha.item() == pytest.approx(0.7)
    points = X.clone().requires_grad_()
    assert gradcheck(learned.double(), (points,))
    learned(points).sum().backward()
    slope = (
        X * torch.sin(1.4 * X) / 0.7 - torch.sin(0.7 * X) ** 2 / 0.49
    ).sum()  # d/dα of sin²(αx)/α
    torch.testing.assert_close(learned.alpha.grad, slope, rtol=1e-6, atol=1e-6)


def test_a_trained_frequency_leaves_the_precision_of_its_input():
    snake = fw.activations.build("snake", trainable=True)
    assert snake(torch.randn(4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("swish", "silu"),
        ("none", "identity"),
        ("linear", "identity"),
        ("hard_swish", "hardswish"),
        ("relu2", "relu_squared"),
    ],
)
def test_an_alias_is_the_same_part(name, same):
    assert fw.activations.get(name) is fw.activations.get(same)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("gelu", {"approximate": "fast"}),
        ("elu", {"alpha": 0.0}),
        ("softshrink", {"lambd": -1}),
        ("relu", {"inplace": True}),
    ],
)
def test_a_setting_out_of_range_is_refused(name, wrong):
    with pytest.raises(SettingError, match=f"activation/{name}"):
        fw.activations.build(name, **wrong)
