"""The registries as Hydra groups; options are made when they are chosen."""

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
    """Return the content of an option."""
    return OmegaConf.to_container(store.load(f"{path}.yaml").node, resolve=False)


def test_each_part_and_alias_is_an_option_with_its_defaults(store):
    for registry in Registry.every.values():
        if not registry.kind.composed:
            continue
        key = registry.kind.key
        for entry in registry:
            if not entry.registered.module.startswith("framework_plugins"):
                continue  # registered by another test
            for name in (entry.name, *entry.aliases):
                options = content(store, f"{key}/{name}")
                settings = options[entry.name] if registry.kind.many else options
                assert settings.keys() - {"name"} == entry.settings.keys()
    assert content(store, "optimizer/sgd")["name"] == "sgd"
    assert content(store, "optimizer/sgd")["momentum"] == 0
    assert content(store, "block/dense")["name"] == "linear"
    assert content(store, "data/table")["path"] == "???"


def test_a_setting_that_names_a_part_follows_the_experiment(store):
    assert content(store, "model/mlp")["activation"] == "${activation}"


def test_options_of_lists_and_the_option_without_content(store):
    assert content(store, "callbacks/early_stop").keys() == {"early_stop"}
    assert content(store, "also/callbacks/early_stop") == content(store, "callbacks/early_stop")
    assert content(store, f"scheduler/{NONE}") == {}


def test_the_sections_and_the_config_of_the_framework_are_options(store):
    sections = content(store, "sections")
    assert sections["trainer"]["log_every"] == "50steps"
    assert sections["optimizer"] is None
    assert {"model": "mlp"} in content(store, "framework")["defaults"]


def test_a_copy_is_the_store_itself_and_a_pickle_contains_no_part(store):
    assert copy.deepcopy(store) is store
    sent = pickle.dumps(store)
    assert len(sent) < 2000, "contains no part"
    assert content(pickle.loads(sent), "optimizer/sgd") == content(store, "optimizer/sgd")
    node = store.load("optimizer/sgd.yaml").node
    node.lr = 7
    assert content(store, "optimizer/sgd")["lr"] != 7
