"""The curves of parts in `framework show`, compared with torch and with closed forms."""

import json
import math
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework.cli import main as cli
from framework.cli.parts.curves import (
    DEPTH,
    MEASURES,
    SURFACES,
    WIDTH,
    NotPlotted,
    curves_of,
    maker_of,
)
from framework.cli.parts.plots import PLOTTED
from framework.composition import catalogue
from framework.registry.registry import Registry


def numbers(kind, name, steps=None, **settings):
    return curves_of(maker_of(kind, name, settings), steps).numbers


def show(capsys, *words):
    """Return the output of `framework show`."""
    assert cli.run(["show", *words]) in (None, 0)
    return capsys.readouterr().out


def json_of(capsys, *words):
    """Return the document of `framework show --json`."""
    assert cli.exit_status_of(["show", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_gelu_and_its_derivative_are_those_of_torch():
    found = numbers("activation", "gelu")
    x = torch.tensor(found["x"], dtype=torch.float64, requires_grad=True)
    assert x.min() == -6
    assert x.max() == 6
    y = F.gelu(x)
    torch.testing.assert_close(torch.tensor(found["f"], dtype=torch.float64), y.detach())
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(torch.tensor(found["derivative"], dtype=torch.float64), slope)


def test_sigmoid_saturates_where_its_derivative_is_below_a_hundredth_of_a_quarter():
    low = (1 - math.sqrt(0.99)) / 2  # s (1 - s) = 0.01 / 4
    edge = math.log(low / (1 - low))
    (left, right) = numbers("activation", "sigmoid")["saturated"]
    assert left[0] is None
    assert right[1] is None
    assert left[1] == pytest.approx(edge, abs=0.002)
    assert right[0] == pytest.approx(-edge, abs=0.002)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu", [(None, 0)]),
        ("tanh", [(None, -math.atanh(math.sqrt(0.99))), (math.atanh(math.sqrt(0.99)), None)]),
        ("softsign", [(None, -9), (9, None)]),
        ("hardshrink", [(-0.5, 0.5)]),
        ("elu", [(None, math.log(0.01))]),
        ("leaky_relu", []),
        ("identity", []),
        ("sine", []),  # the minima and maxima of f do not count
    ],
)
def test_the_intervals_of_saturation_have_closed_forms(name, expected):
    found = numbers("activation", name)["saturated"]
    assert len(found) == len(expected)
    for interval, ends in zip(found, expected, strict=True):
        for end, right in zip(interval, ends, strict=True):
            assert (end is None) == (right is None)
            assert end is None or end == pytest.approx(right, abs=0.0021)


@pytest.mark.parametrize("name", ["softmax", "glu", "geglu"])
def test_an_activation_that_is_not_elementwise_is_not_plotted(name):
    with pytest.raises(NotPlotted):
        numbers("activation", name)


def test_a_cosine_schedule_is_that_of_torch():
    found = numbers("scheduler", "cosine", steps=50)["factor"]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for factor in found:
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        schedule.step()


def test_a_one_cycle_schedule_is_that_of_torch():
    found = numbers("scheduler", "one_cycle", steps=50, warmup=0.3)["factor"]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=50, pct_start=0.3, cycle_momentum=False
    )
    for step, factor in enumerate(found):
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        if step < 49:
            schedule.step()


def test_a_schedule_that_observes_values_is_not_plotted():
    with pytest.raises(NotPlotted, match="validation"):
        numbers("scheduler", "reduce_on_plateau")


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mse", lambda e: e**2),
        ("l1", abs),
        ("huber", lambda e: e**2 / 2 if abs(e) < 1 else abs(e) - 0.5),
        ("quantile", lambda e: 0.5 * abs(e)),
    ],
)
def test_a_loss_of_values_is_plotted_over_the_error(name, function):
    found = numbers("loss", name)
    assert found["x_is"] == "error"
    assert found["loss"] == pytest.approx([function(x) for x in found["x"]])


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("cross_entropy", lambda m: math.log1p(math.exp(-m))),
        ("multi_margin", lambda m: max(0, 1 - m) / 2),
        ("kl_div", lambda m: math.log1p(math.exp(-m))),  # of one class, as cross entropy
    ],
)
def test_a_loss_of_classes_is_plotted_over_the_margin(name, function):
    found = numbers("loss", name)
    assert found["x_is"] == "margin"
    assert found["loss"] == pytest.approx([function(x) for x in found["x"]])


def test_a_loss_of_labels_is_plotted_over_the_output_for_both_targets():
    found = numbers("loss", "bce_with_logits")
    assert found["x_is"] == "output"
    for x, one, zero, slope in zip(
        found["x"], found["loss_1"], found["loss_0"], found["gradient_1"], strict=True
    ):
        assert one == pytest.approx(math.log1p(math.exp(-x)))
        assert zero == pytest.approx(math.log1p(math.exp(x)))
        assert slope == pytest.approx(-1 / (1 + math.exp(x)))


def test_the_weights_and_outputs_of_initializers_have_the_expected_size():
    kaiming = numbers("initializer", "kaiming_normal")
    assert kaiming["weights"]["std"] == pytest.approx(math.sqrt(2 / WIDTH), rel=0.01)
    assert sum(kaiming["weights"]["histogram"]["counts"]) == WIDTH**2
    growth = kaiming["output_std"]["linear"]
    for layer, std in enumerate(growth, 1):
        assert std == pytest.approx(2 ** (layer / 2), rel=0.25)
    orthogonal = numbers("initializer", "orthogonal")["output_std"]["linear"]
    assert orthogonal == pytest.approx([1.0] * DEPTH, rel=0.01)
    # for relu, the mean square stays, and the std is √(2 (1 - 1/π) / 2) of the first layer
    assert kaiming["output_std"]["relu"][0] == pytest.approx(math.sqrt(1 - 1 / math.pi), rel=0.02)
    assert 0.3 < kaiming["output_std"]["relu"][-1] < 1.2
    assert numbers("initializer", "xavier_normal")["output_std"]["relu"][-1] < 1e-2
    assert numbers("initializer", "zeros")["output_std"]["tanh"][-1] == 0


def test_sgd_on_the_quadratic_ends_at_its_closed_form():
    found = numbers("optimizer", "sgd", lr=0.05, steps=30)["quadratic"]
    x, y = SURFACES[0].start
    expected = [((1 - 0.05) ** k * x, (1 - 16 * 0.05) ** k * y) for k in range(31)]
    for point, right in zip(found["points"], expected, strict=True):
        assert point == pytest.approx(right, abs=1e-9)
    last = expected[-1]
    assert found["final_loss"] == pytest.approx((last[0] ** 2 + 16 * last[1] ** 2) / 2)
    assert not found["diverged"]
    assert numbers("optimizer", "sgd", lr=0.2, steps=200)["quadratic"]["diverged"]


def test_the_minima_and_the_window_belong_to_the_surfaces():
    for surface in SURFACES:
        minimum = torch.tensor(surface.minimum, dtype=torch.float64, requires_grad=True)
        value = surface.function(minimum[0], minimum[1])
        assert float(value.detach()) == 0
        assert torch.autograd.grad(value, minimum)[0].tolist() == [0, 0]
        left, right, bottom, top = surface.window
        assert left < surface.start[0] < right
        assert bottom < surface.start[1] < top


def test_muon_moves_the_point_by_its_own_rule():
    muon = numbers("optimizer", "muon", lr=0.05, steps=5)["quadratic"]["points"]
    adamw = numbers("optimizer", "adamw", lr=0.05, steps=5)["quadratic"]["points"]
    assert muon[1] != pytest.approx(adamw[1], rel=1e-3)


@pytest.mark.parametrize("kind", PLOTTED)
def test_every_part_is_plotted_or_says_why_not(kind, capsys, recwarn):
    assert set(PLOTTED) == set(MEASURES)
    for entry in Registry.every[kind]:
        assert entry.kind.name == kind
    names = [f"{kind}/{entry.name}" for entry in Registry.every[kind]]
    for first in range(0, len(names), 6):
        out = show(capsys, *names[first : first + 6])
        for name in names[first : first + 6]:
            assert f"\n{name.partition('/')[2]}  " in out
        charts = [line for line in out.splitlines() if "\u2800" in line]
        assert charts
        assert max(map(len, charts)) <= 80
    assert not recwarn.list


def test_a_chart_fits_80_columns_and_has_labels_and_letters(capsys):
    out = show(capsys, "relu", "gelu", "sigmoid")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split() == ["a", "relu", "a", "relu"] for line in lines)
    drawn = [line for line in lines if any("\u2800" < character <= "\u28ff" for character in line)]
    assert len(drawn) == 10
    for letter in "abc":
        assert sum(line.count(letter) for line in drawn) > 2
    assert "sigmoid  saturates for x < -5.99 and x > 5.99" in out


def test_the_numbers_are_in_the_json(capsys):
    document = json_of(capsys, "scheduler/linear", "--steps", "4")
    assert document["name"] == "linear"
    assert document["plots"][0]["factor"] == [1, 0.75, 0.5, 0.25]
    several = json_of(capsys, "relu", "block/linear", "softmax")["parts"]
    assert [each["name"] for each in several] == ["relu", "linear", "softmax"]
    assert "plots" not in several[1]
    assert "depends on more than one input" in several[2]["plots"][0]["problem"]


def test_settings_make_curves_of_their_own(capsys):
    plots = json_of(capsys, "sgd", "optimizer.lr=0.1", "optimizer.momentum=0,0.9")["plots"]
    assert [each["settings"] for each in plots] == [
        {"lr": 0.1, "momentum": 0},
        {"lr": 0.1, "momentum": 0.9},
    ]
    assert plots[0]["quadratic"]["points"][2] != plots[1]["quadratic"]["points"][2]
    out = show(capsys, "elu", "selu", "activation.alpha=0.5")
    assert "elu alpha=0.5" in out
    assert "selu alpha" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gelu", "activation.aproximate=tanh"], "did you mean 'activation.approximate'"),
        (["gelu", "activation.approximate=cubic"], "expected one of none, tanh"),
        (["activation.alpha=1"], "expected a part before its settings"),
        (["adam", "--steps", "1"], "--steps 1: expected an integer from 2"),
        (["adam", "optimizer.lr=[1"], "expected KIND.SETTING=VALUE"),
        (["adam", "optimizer.lr=interval(0,1)"], "expected a value, or several"),
    ],
)
def test_wrong_settings_are_errors(words, message):
    with pytest.raises(fw.FrameworkError, match=message):
        cli.run(["show", *words])


def test_too_many_curves_are_refused_before_they_are_measured(monkeypatch):
    measured = []
    monkeypatch.setattr("framework.cli.parts.curves.curves_of", lambda *part: measured.append(part))
    words = ["optimizer.lr=range(1,1001)", "optimizer.momentum=range(0,1000)"]
    with pytest.raises(fw.FrameworkError, match="1,000,001 curves in a plot: expected at most 12"):
        cli.run(["show", "relu", "optimizer/sgd", *words])
    assert measured == []


def test_an_activation_of_a_plugin_is_plotted_like_any_other(capsys):
    class Bump(nn.Module):
        """exp(-x²)."""

        def __init__(self, width: float = 1.0):
            super().__init__()
            self.width = width

        def forward(self, x):
            return torch.exp(-((x / self.width) ** 2))

    class Broken(nn.Module):
        """Fails."""

        def forward(self, x):
            raise ValueError("no\x1b[31mcolor")

    fw.activations.register("bump", Bump)
    fw.activations.register("broken", Broken)
    try:
        out = show(capsys, "bump", "broken", "activation.width=2")
    finally:
        for name in ("bump", "broken"):
            del fw.activations._entries[name]
    edge = r"5\.05"  # x/2 exp(-x²/4) is 1 % of its maximum at √2
    assert re.search(rf"bump width=2  saturates for x < -{edge} and x > {edge}\n", out)
    assert "broken  not plotted: " in out
    assert "\x1b" not in out


def test_a_loss_of_a_plugin_with_other_inputs_says_so():
    class Pairs(nn.Module):
        """Takes three arguments."""

        def forward(self, one, other, same):
            return (one - other).mean()

    fw.losses.register("pairs", Pairs)
    try:
        with pytest.raises(NotPlotted), warnings.catch_warnings():
            numbers("loss", "pairs")
    finally:
        del fw.losses._entries["pairs"]


def test_no_plot_leaves_the_page_as_it_was(capsys):
    assert "f(x)" in show(capsys, "relu")
    page = show(capsys, "relu", "--no-plot")
    assert "f(x)" not in page
    assert "registered in" in page


PLUGIN = """
from torch import nn
from framework import activations

@activations.register("triple")
class Triple(nn.Module):
    def forward(self, x):
        return 3 * x
"""


def test_parts_from_the_cached_index_are_registered_for_a_plot(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for _ in range(2):  # the first one writes the index, the second one reads it
        ended = subprocess.run(
            [sys.executable, "-m", "framework", "show", "triple", "--json", "--plugins", "mine.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        plots = json.loads(ended.stdout)["plots"]
        assert set(plots[0]["derivative"]) == {3.0}


def test_a_plot_runs_no_plugin_of_an_untrusted_folder(tmp_path, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(catalogue, "discover", lambda *names, **more: loaded.append(names))
    monkeypatch.setattr(Registry, "every", {})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/config.yaml").write_text("plugins: [mine.py]\n")
    catalogue.load_parts()
    assert not any("mine" in plugin for plugin in loaded[0][0])
    catalogue.load_parts(trusted=True)
    assert any("mine" in plugin for plugin in loaded[1][0])
