"""Batch norms and instance norms are recognized by their base class."""

import pytest
from torch import nn

from framework.runtime.torch_internals import norms

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("base", [norms.BASE, None])
def test_batch_and_instance_norms_are_recognized(base, monkeypatch):
    monkeypatch.setattr(norms, "BASE", base)

    class Own(nn.BatchNorm1d):
        pass

    for module in (nn.BatchNorm2d(3), nn.SyncBatchNorm(3), nn.InstanceNorm1d(3), Own(3)):
        assert norms.has_statistics(module)
    for module in (nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.Linear(3, 3)):
        assert not norms.has_statistics(module)
