"""The strategies of one process."""

import pytest

import framework as fw
from framework.errors import SettingError


def test_single_refuses_several_processes(monkeypatch):
    """Each of them would train the whole model on all data."""
    fw.Trainer(max_steps=1, strategy=fw.strategies.build("single"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for strategy in (fw.strategies.build("single"), None):
        with pytest.raises(SettingError, match="^strategy.* processes"):
            fw.Trainer(max_steps=1, strategy=strategy)


class OfPairs(fw.Strategy):
    def check_processes(self, count):
        if count % 2:
            raise SettingError(f"strategy=of_pairs: expected an even number, got {count}")


def test_a_strategy_decides_on_the_number_of_processes(monkeypatch):
    with pytest.raises(SettingError, match="expected an even number, got 1"):
        fw.Trainer(max_steps=1, strategy=OfPairs())
    monkeypatch.setenv("WORLD_SIZE", "2")
    fw.Trainer(max_steps=1, strategy=OfPairs())
