import sys

import pytest
import torch

import framework as fw
from framework.registry import Registry

torch.set_num_threads(1)  # some tests fork, which a process with OpenMP threads of its own does not survive
fw.discover()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def forget_plugins():
    """Afterwards no part of a plugin file is known any more."""
    yield
    for module in [name for name in sys.modules if name.startswith("framework_plugin_")]:
        del sys.modules[module]
    for registry in Registry.every.values():
        registry.forget_unloaded()
