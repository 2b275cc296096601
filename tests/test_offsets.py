"""An offset or another unit of inputs and targets changes no result beyond rounding."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score, roc_auc_score
from torch import Tensor
from torch.nn import functional as F

import framework as fw


def value(metric: fw.Metric, outputs: Tensor, targets: Tensor, size: int = 97) -> float:
    """Return the metric over batches, as the framework adds them up."""
    batches = zip(outputs.split(size), targets.split(size), strict=True)
    sums = [metric.sums(*batch).double() for batch in batches]
    return metric.compute(torch.stack(sums).sum(0))


class TestR2:
    @pytest.mark.parametrize(
        ("mean", "std"),
        [(0, 1), (1e6, 0.5), (2_451_545, 0.9), (1.7e9, 1000), (1.7e9, 0.5), (-1e12, 1), (0, 1e-12), (1e-6, 1e-12)],
    )
    def test_it_is_that_of_scikit_learn_however_far_targets_are_from_0(self, mean, std):
        targets = mean + std * torch.randn(1000, 1, dtype=torch.float64)
        outputs = targets + 0.1 * std * torch.randn(1000, 1, dtype=torch.float64)
        found = value(fw.metrics.build("r2"), outputs, targets)
        assert found == pytest.approx(r2_score(targets, outputs), abs=1e-9)
        assert found == pytest.approx(0.99, abs=0.003)

    @pytest.mark.parametrize(("mean", "std"), [(1e4, 0.003), (1e5, 0.03), (1e6, 0.3)])
    def test_independent_noise_is_no_perfect_prediction_of_float32_targets(self, mean, std):
        targets, outputs = mean + std * torch.randn(2, 500, 1)
        expected = r2_score(targets.double(), outputs.double())
        assert value(fw.metrics.build("r2"), outputs, targets) == pytest.approx(expected, abs=1e-9)
        assert expected < -0.5

    @pytest.mark.parametrize("constant", [0.0, 0.1, 1e3, 1.7e9 + 1 / 3])
    def test_constant_targets_score_1_when_met_exactly_and_else_0(self, constant):
        targets = torch.full((500, 1), constant, dtype=torch.float64)
        assert value(fw.metrics.build("r2"), targets, targets) == 1
        assert value(fw.metrics.build("r2"), targets + 1e-6, targets) == 0

    def test_of_several_values_it_is_the_mean(self):
        targets = torch.randn(300, 3, dtype=torch.float64) * torch.tensor([1e-9, 1, 1e6]) + torch.tensor([5, 1e7, 0])
        outputs = targets + torch.randn(300, 3, dtype=torch.float64) * torch.tensor([1e-9, 0.1, 3e5])
        expected = r2_score(targets, outputs)
        assert value(fw.metrics.build("r2"), outputs, targets) == pytest.approx(expected, abs=1e-6)

    def test_what_is_no_number_gives_none(self):
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
    def test_it_is_that_of_scikit_learn_for_logits_of_any_scale_and_offset(self, scores, factor, offset):
        logits, own = scores[0] * factor + offset, scores[1]
        expected = roc_auc_score(own, logits)
        metric = fw.metrics.build("auroc")
        pairs = torch.stack([torch.full_like(logits, 3.0), logits + 3.0], dim=1)
        expected_of_pairs = roc_auc_score(own, pairs[:, 1].double() - 3)
        assert value(metric, pairs, own.long(), 5000) == pytest.approx(expected_of_pairs, abs=1e-3)
        labels = own.float().unsqueeze(1)
        assert value(metric, logits.unsqueeze(1), labels, 5000) == pytest.approx(expected, abs=1e-3)

    @pytest.mark.parametrize("kind", ["rounded", "half of them equal", "two groups", "heavy tails", "outliers"])
    def test_ties_and_uneven_scores_are_counted_rightly(self, scores, kind):
        logits, own = scores
        made = {
            "rounded": logits.round(),
            "half of them equal": torch.where(torch.arange(self.ROWS) % 2 == 0, 1e4, 1e4 + logits),
            "two groups": torch.where(torch.arange(self.ROWS) % 2 == 0, 1e4 + logits, logits - 1e4),
            "heavy tails": logits * torch.linspace(-8, 8, self.ROWS)[torch.randperm(self.ROWS)].exp(),
            "outliers": torch.where(torch.arange(self.ROWS) % 5000 == 0, -1e9, 1e4 + logits),
        }[kind]
        found = value(fw.metrics.build("auroc"), made.unsqueeze(1), own.float().unsqueeze(1), 5000)
        assert found == pytest.approx(roc_auc_score(own, made), abs=1e-3)

    @pytest.mark.parametrize("factor", [1.0, 100.0, 1e4])
    def test_saturated_probabilities_of_many_classes_keep_their_order(self, factor):
        targets = torch.randint(4, (4000,))
        logits = (torch.randn(4000, 4) + F.one_hot(targets, 4)) * factor + torch.tensor([0.0, 8.0, -8.0, 500.0])
        exact = logits.double()
        areas = []
        for index in range(4):
            others = exact[:, torch.arange(4) != index].logsumexp(1)
            areas.append(roc_auc_score(targets == index, exact[:, index] - others))
        metric = fw.metrics.build("auroc")
        assert value(metric, logits, targets, 1000) == pytest.approx(np.mean(areas), abs=1e-3)
        assert value(metric, logits + 1e4, targets, 1000) == pytest.approx(np.mean(areas), abs=1e-3)

    def test_a_logit_that_is_no_number_gives_none(self, scores):
        logits, own = scores[0][:500].clone(), scores[1][:500]
        logits[7] = math.nan
        assert math.isnan(value(fw.metrics.build("auroc"), logits.unsqueeze(1), own.float().unsqueeze(1)))


def test_matthews_of_large_counts_is_exact():
    sums = torch.tensor([[10**9, 1], [10**9 + 1, 2], [10**9 + 1, 2]], dtype=torch.float64)
    n, right = 10**9 + 3, 10**9 + 1
    expected = (n * right - (10**9 + 1) ** 2 - 4) / (n**2 - (10**9 + 1) ** 2 - 4)
    assert fw.metrics.build("matthews").compute(sums) == pytest.approx(expected, rel=1e-12)
