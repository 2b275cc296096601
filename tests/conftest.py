import pytest
import torch

import framework as fw

fw.discover()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
