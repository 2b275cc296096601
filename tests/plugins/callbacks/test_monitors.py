"""Callbacks that only log, each in a fit of a tiny regression."""

import pytest
import torch

from framework import Callback
from regressions import build, fit, linear


@pytest.mark.parametrize(("log_every", "steps"), [("1epoch", [3, 6]), ("2steps", [2, 3, 4, 6])])
def test_the_gradient_norm_is_measured_on_logged_steps_only(log_every, steps):
    callback = build("gradient_norm")
    measured = []

    class Watch(Callback):
        def on_step_end(self, trainer):
            measured.extend([trainer.state.step] * (callback.measured is not None))

    _, record = fit(callback, Watch(), epochs=2, log_every=log_every)
    assert list(record.of("train/gradient_norm")) == measured == steps
    _, clipped = fit(build("clip_gradients", norm=1e9), epochs=2, log_every=log_every)
    assert record.of("train/gradient_norm") == pytest.approx(
        clipped.of("train/gradient_norm"), rel=1e-5
    )


def test_every_group_s_learning_rate_is_logged():
    model = linear()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5, "name": "bias"}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    _, record = fit(
        build("learning_rate"),
        epochs=2,
        model=model,
        optimizer=optimizer,
        schedule=lambda step: 1 / (1 + step),
    )
    assert record.of("train/learning_rate") == pytest.approx({3: 0.5 / 3, 6: 0.5 / 6}), (
        "the largest"
    )
    assert record.of("train/learning_rate/0") == pytest.approx({3: 0.1 / 3, 6: 0.1 / 6})
    assert record.of("train/learning_rate/bias") == pytest.approx({3: 0.5 / 3, 6: 0.5 / 6})


def test_histograms_show_weights_and_gradients_from_the_start_to_the_end():
    _, record = fit(build("histograms"), epochs=2)
    tags = ["weights/weight", "weights/bias", "gradients/weight", "gradients/bias"]
    seen = [(step, tag) for step, tag, _ in record.histograms]
    assert seen == [(step, tag) for step in (0, 3) for tag in tags] + [(6, tag) for tag in tags[:2]]
    assert torch.equal(record.histograms[0][2], linear().weight.detach().flatten())
