"""The registries as Hydra groups: options made when they are chosen, whatever Hydra copies or sends elsewhere."""

import copy
import pickle

import pytest
from omegaconf import OmegaConf

from framework.composition.hydra_groups import NONE, filled_store
from framework.registry.registry import Registry


@pytest.fixture(scope="module")
def store():
    return filled_store()


def content(store, path):
    return OmegaConf.to_container(store.load(f"{path}.yaml").node, resolve=False)


def test_each_part_and_alias_is_an_option_with_its_defaults(store):
    for registry in Registry.every.values():
        key = registry.kind.key
        for entry in registry:
            if not entry.registered.module.startswith("framework_plugins"):
                continue  # of another test
            for name in (entry.name, *entry.aliases):
                options = content(store, f"{key}/{name}")
                settings = options[entry.name] if registry.kind.many else options
                assert settings.keys() - {"name"} == entry.settings.keys()
    assert content(store, "optimizer/sgd")["name"] == "sgd"
    assert content(store, "optimizer/sgd")["momentum"] == 0
    assert content(store, "block/dense")["name"] == "linear"
    assert content(store, "data/table")["path"] == "???"


def test_a_part_in_a_part_follows_the_experiment(store):
    assert content(store, "model/mlp")["activation"] == "${activation}"


def test_several_parts_and_no_part(store):
    assert content(store, "callbacks/early_stop").keys() == {"early_stop"}
    assert content(store, "also/callbacks/early_stop") == content(store, "callbacks/early_stop")
    assert content(store, f"scheduler/{NONE}") == {}


def test_the_sections_and_our_own_config(store):
    sections = content(store, "sections")
    assert sections["trainer"]["log_every"] == "50steps"
    assert sections["optimizer"] is None
    assert {"model": "mlp"} in content(store, "framework")["defaults"]


def test_a_copy_costs_nothing_and_a_job_elsewhere_fills_its_own(store):
    assert copy.deepcopy(store) is store
    sent = pickle.dumps(store)
    assert len(sent) < 2000, "no part is sent"
    assert content(pickle.loads(sent), "optimizer/sgd") == content(store, "optimizer/sgd")
    node = store.load("optimizer/sgd.yaml").node
    node.lr = 7
    assert content(store, "optimizer/sgd")["lr"] != 7
