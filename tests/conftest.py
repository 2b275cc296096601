import logging
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


@pytest.fixture(autouse=True)
def _alone():
    """Afterwards Hydra's launchers have left nothing: no loggers on streams of the test, no processes in its folder."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    loky = sys.modules.get("joblib.externals.loky")
    if loky is not None:
        loky.get_reusable_executor().shutdown(wait=True)


@pytest.fixture
def forget_plugins():
    """Afterwards no part of a plugin file is known any more."""
    yield
    for module in [name for name in sys.modules if name.startswith("framework_plugin_")]:
        del sys.modules[module]
    for registry in Registry.every.values():
        registry.forget_unloaded()
