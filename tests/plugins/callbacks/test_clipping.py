"""Gradient clipping in fits of a tiny regression."""

import pytest
import torch
from torch import nn

from framework.errors import SettingError
from regressions import SPLIT, build, fit, linear


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_gradients_are_clipped_by_norm_and_then_by_value():
    model = linear()
    inputs, targets = SPLIT.tensors
    nn.functional.mse_loss(model(inputs), targets).backward()
    gradient = flat(p.grad for p in model.parameters())
    norm = gradient.norm()
    by_norm = gradient * (0.01 / norm)
    by_both = by_norm.clamp(-0.004, 0.004)
    assert norm > 0.01
    assert not torch.allclose(by_norm, by_both)
    for settings, expected in (
        ({"norm": 0.01}, by_norm),
        ({"norm": 0.01, "value": 0.004}, by_both),
    ):
        model = linear()
        before = flat(model.parameters())
        clip = build("clip_gradients", **settings)
        _, record = fit(clip, epochs=1, model=model, lr=1.0, batch_size=12)
        change = before - flat(model.parameters())
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-7)
        assert record.of("train/gradient_norm") == {1: pytest.approx(float(norm), rel=1e-5)}


def test_small_gradients_are_not_clipped():
    clipped, _ = fit(build("clip_gradients", norm=1e6, value=1e6))
    free, _ = fit()
    assert torch.allclose(clipped.model.weight, free.model.weight, rtol=1e-6)


def test_clipping_without_a_limit_is_an_error():
    with pytest.raises(SettingError, match="set `norm` or `value`"):
        build("clip_gradients", norm=None)
