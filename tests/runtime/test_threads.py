"""The number of threads of an operation."""

import pytest
import torch
from torch import nn

from framework.runtime.threads import intra_op_threads, suitable_threads


def test_a_small_model_gets_one_thread_and_a_large_model_those_that_workers_leave(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    small = nn.Linear(64, 128)
    large = nn.Linear(2000, 1000)
    assert suitable_threads(small, rows=32) == 1
    assert suitable_threads(large, rows=32) == 8
    assert suitable_threads(large, rows=32, workers=3) == 5
    assert suitable_threads(large, rows=32, workers=20) == 1
    assert suitable_threads(small, rows=32 * 10_000) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert suitable_threads(small, rows=32) == 8


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), intra_op_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before
