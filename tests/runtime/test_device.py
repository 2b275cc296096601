"""Devices by name, and deterministic algorithms."""

import os

import pytest
import torch

from framework.errors import SettingError
from framework.runtime.determinism import deterministic_algorithms
from framework.runtime.device import find_device


def test_auto_is_the_fastest_available_device():
    expected = "cpu"
    if torch.cuda.is_available():
        expected = "cuda"
    elif torch.backends.mps.is_available():
        expected = "mps"
    assert find_device("auto").type == expected
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cuda:-1"])
def test_an_unknown_device_is_an_error(name):
    with pytest.raises(SettingError, match=f"cpu, cuda, cuda:N or mps, got '{name}'"):
        find_device(name)


@pytest.mark.parametrize("name", ["cuda:64", "cpu:1", "xpu", "meta"])
def test_a_missing_device_is_an_error(name):
    with pytest.raises(SettingError, match=f"device {name} is not available"):
        find_device(name)


def test_algorithms_are_deterministic_inside_the_block_only(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        with deterministic_algorithms(False):
            assert torch.are_deterministic_algorithms_enabled(), "False changes nothing"
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
