import pytest
import torch

import framework as fw

torch.set_num_threads(1)  # some tests fork, which a process with OpenMP threads of its own does not survive
fw.discover()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
