"""Callbacks that only log, each in a fit of a tiny regression."""

import pytest
import torch

from framework import Callback
from regressions import build, fit, linear


@pytest.mark.parametrize(("log_every", "steps"), [("1epoch", [3, 6]), ("2steps", [2, 3, 4, 6])])
def test_the_gradient_norm_is_measured_at_logged_steps_only(log_every, steps):
    callback = build("gradient_norm")
    measured = []

    class Watch(Callback):
        def on_step_end(self, trainer):
            if callback.measured is not None:
                measured.append(trainer.state.step)

    _, record = fit(callback, Watch(), epochs=2, log_every=log_every)
    assert list(record.of("train/gradient_norm")) == measured == steps
    _, clipped = fit(build("clip_gradients", norm=1e9), epochs=2, log_every=log_every)
    assert record.of("train/gradient_norm") == pytest.approx(
        clipped.of("train/gradient_norm"), rel=1e-5
    )


def test_the_learning_rate_of_each_parameter_group_is_logged():
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
    rates = pytest.approx({3: 0.1 / 3, 6: 0.1 / 6})
    largest_rates = pytest.approx({3: 0.5 / 3, 6: 0.5 / 6})
    assert record.of("train/learning_rate/0") == rates
    assert record.of("train/learning_rate/bias") == largest_rates
    assert record.of("train/learning_rate") == largest_rates


def test_histograms_show_weights_and_gradients_from_the_start_to_the_end():
    _, record = fit(build("histograms"), epochs=2)
    weights = ["weights/weight", "weights/bias"]
    gradients = ["gradients/weight", "gradients/bias"]
    tags_by_step = {1: [], 4: [], 6: []}
    for step, tag, _ in record.histograms:
        tags_by_step[step].append(tag)
    assert tags_by_step == {1: weights + gradients, 4: weights + gradients, 6: weights}
    assert torch.equal(record.histograms[0][2], linear().weight.detach().flatten())
