"""The strategies of one process."""

import pytest

import framework as fw
from distributed_runs import environment
from framework.errors import SettingError


@pytest.fixture
def one_of_two(monkeypatch):
    """Return a function that makes this process one of two."""

    def start():
        for name, value in environment(0, 2, 1).items():
            monkeypatch.setenv(name, value)

    return start


def test_single_refuses_several_processes(one_of_two):
    """Each of them would train the whole model on all data."""
    fw.Trainer(max_steps=1, strategy=fw.strategies.build("single"))
    one_of_two()
    for strategy in (fw.strategies.build("single"), None):
        with pytest.raises(SettingError, match=r"^strategy.* processes"):
            fw.Trainer(max_steps=1, strategy=strategy)


class OfPairs(fw.Strategy):
    def check_processes(self, count):
        if count % 2:
            raise SettingError(f"strategy=of_pairs: expected an even number, got {count}")


def test_a_strategy_decides_on_the_number_of_processes(one_of_two):
    with pytest.raises(SettingError, match="expected an even number, got 1"):
        fw.Trainer(max_steps=1, strategy=OfPairs())
    one_of_two()
    fw.Trainer(max_steps=1, strategy=OfPairs())
