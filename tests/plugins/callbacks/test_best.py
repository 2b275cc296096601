"""The best values of a metric, as early_stop and checkpoint track them."""

from typing import ClassVar

import pytest
import torch

from framework import Metric
from framework.errors import SettingError
from regressions import Script, build, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*it replaces the value that the trainer itself logs"
)


class Correct(Metric):
    name = "correct"
    better: ClassVar = "higher"

    def sums(self, outputs, targets):
        return torch.tensor([1.0, 2.0])

    def compute(self, sums):
        return float(sums[0] / sums[1])


@pytest.mark.parametrize(
    ("values", "epochs"), [([0.1, 0.2, 0.3, 0.4], 4), ([0.4, 0.3, 0.2, 0.1], 2)]
)
def test_the_metric_itself_decides_which_direction_is_better(values, epochs):
    early_stop = build("early_stop", monitor="val/correct", patience=1)
    trainer, _ = fit(Script("val/correct", values), early_stop, metrics=[Correct()])
    assert trainer.state.epoch == epochs


@pytest.mark.parametrize("name", ["early_stop", "checkpoint"])
def test_an_unknown_metric_is_an_error(tmp_path, name):
    with pytest.raises(SettingError, match=r"'val/corect'.*did you mean 'val/correct'"):
        fit(build(name, monitor="val/corect"), metrics=[Correct()], folder=tmp_path)
    with pytest.raises(SettingError, match="nothing logs 'val/mine'"):
        fit(build(name, monitor="val/mine", mode="max"), folder=tmp_path)
