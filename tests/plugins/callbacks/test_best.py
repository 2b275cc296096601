"""The best values of a metric, as early_stop and checkpoint track them."""

from typing import ClassVar

import pytest
import torch

from framework import Metric
from framework.errors import SettingError
from regressions import Script, build, fit


class Correct(Metric):
    name = "correct"
    better: ClassVar = "higher"

    def sums(self, outputs, targets):
        return torch.tensor([1.0, 2.0])

    def compute(self, sums):
        return float(sums[0] / sums[1])


def test_which_way_is_better_comes_from_the_metric_itself():
    script = Script("val/correct", [0.1, 0.2, 0.3, 0.4])
    trainer, _ = fit(
        script, build("early_stop", monitor="val/correct", patience=1), metrics=[Correct()]
    )
    assert trainer.state.epoch == 4
    script = Script("val/correct", [0.4, 0.3, 0.2, 0.1])
    trainer, _ = fit(
        script, build("early_stop", monitor="val/correct", patience=1), metrics=[Correct()]
    )
    assert trainer.state.epoch == 2


@pytest.mark.parametrize("name", ["early_stop", "checkpoint"])
def test_a_metric_that_nobody_knows_is_an_error_before_the_first_step(tmp_path, name):
    with pytest.raises(
        SettingError, match="'val/corect' is better high or low; did you mean 'val/correct'"
    ):
        fit(build(name, monitor="val/corect"), metrics=[Correct()], folder=tmp_path)
    with pytest.raises(SettingError, match="nothing logs 'val/mine'"):
        fit(build(name, monitor="val/mine", mode="max"), folder=tmp_path)
