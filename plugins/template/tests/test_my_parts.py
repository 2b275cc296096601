"""Tests of my_parts."""

import pytest
import torch

import framework as fw

fw.discover()


def test_bent_identity_has_slopes_of_a_half_and_three_halves_away_from_the_bend():
    bent = fw.activations.build("bent_identity", bend=0.5)
    x = torch.tensor([-100.0, 0.0, 100.0])
    assert bent(x).tolist() == pytest.approx([-50.25, 0.0, 149.75], abs=0.01)


def test_confidence_is_the_mean_over_batches_of_any_size():
    confidence = fw.metrics.build("confidence")
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5]]))
    sums = confidence.sums(logits[:2], torch.tensor([0, 1]))
    sums += confidence.sums(logits[2:], torch.tensor([0]))
    assert confidence.compute(sums) == pytest.approx((0.9 + 0.7 + 0.5) / 3)
