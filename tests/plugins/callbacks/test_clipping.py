"""Gradient clipping in fits of a tiny regression."""

import pytest
import torch
from torch import nn

from framework.errors import SettingError
from regressions import SPLIT, build, fit, linear


def gradients_of(model, inputs, targets):
    nn.functional.mse_loss(model(inputs), targets).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradients_are_clipped_by_norm_and_then_by_value():
    expected = gradients_of(linear(), *SPLIT.tensors)
    norm = expected.norm()
    by_norm = expected * (0.01 / norm)
    by_both = by_norm.clamp(-0.004, 0.004)
    assert norm > 0.01
    assert not torch.allclose(by_norm, by_both)
    for settings, wanted in (({"norm": 0.01}, by_norm), ({"norm": 0.01, "value": 0.004}, by_both)):
        before, model = linear(), linear()
        _, record = fit(
            build("clip_gradients", **settings), epochs=1, model=model, lr=1.0, batch_size=12
        )
        change = torch.cat(
            [
                (b - a).flatten()
                for b, a in zip(before.parameters(), model.parameters(), strict=True)
            ]
        )
        torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-7)
        assert record.of("train/gradient_norm") == {1: pytest.approx(float(norm), rel=1e-5)}


def test_small_gradients_are_left_alone():
    clipped, _ = fit(build("clip_gradients", norm=1e6, value=1e6))
    free, _ = fit()
    assert torch.allclose(clipped.model.weight, free.model.weight, rtol=1e-6)


def test_clipping_nothing_is_refused():
    with pytest.raises(SettingError, match="set `norm` or `value`"):
        build("clip_gradients", norm=None)
