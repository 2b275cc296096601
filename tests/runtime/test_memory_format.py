"""The choice of the memory format of images; further tests are in tests/data/test_loader.py."""

import pytest
from torch import nn

from framework.runtime.memory_format import choose_memory_format


@pytest.mark.parametrize(("channels", "is_last"), [(4, False), (7, False), (8, True)])
def test_a_strided_shortcut_of_few_channels_keeps_images_channels_first(channels, is_last):
    """oneDNN for AVX2 corrupts memory in its backward pass; see `overruns_memory`."""
    first = nn.Conv2d(3, channels, 3)
    strided = nn.Conv2d(channels, channels, 3, stride=2)
    shortcut = nn.Conv2d(channels, 16, 1, stride=2)
    model = nn.Sequential(first, strided, shortcut)
    assert choose_memory_format("auto", model).channels_last is is_last
    assert choose_memory_format(True, model).channels_last
