"""The better direction of a metric."""

import framework as fw
from framework.contracts.direction import direction_sign, metric_directions

fw.discover()


def test_the_loss_and_each_metric_have_a_direction():
    metrics = [fw.metrics.build("accuracy"), fw.metrics.build("mae")]
    assert metric_directions(metrics) == {"loss": "min", "accuracy": "max", "mae": "min"}


def test_the_sign_makes_high_values_the_better_ones():
    assert max([3.0, 1.0, 2.0], key=lambda value: direction_sign("min") * value) == 1.0
    assert max([3.0, 1.0, 2.0], key=lambda value: direction_sign("max") * value) == 3.0
