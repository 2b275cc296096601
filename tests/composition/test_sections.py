"""Sections, sweepers and launchers are registered by the package that owns them."""

import pickle
import subprocess
import sys

import pytest

from framework.composition import sections
from framework.composition.hydra_groups import filled_store
from framework.composition.sections import (
    HYDRA_PLUGINS,
    SECTIONS,
    HydraPlugin,
    Section,
    register,
    section_settings,
)
from framework.errors import ContractError


class Cluster:
    """Where jobs run."""

    def __init__(self, queue: str = "short", *, split: str = "val", folder: object = None):
        pass


@pytest.fixture(autouse=True)
def _registered():
    """What a test registers is gone afterwards."""
    yield
    SECTIONS.pop("cluster", None)
    section_settings.cache_clear()


def test_every_parameter_is_a_setting_but_those_that_are_declared_as_given():
    register(Section("cluster", f"{__name__}:Cluster", given=("folder",)))
    assert section_settings("cluster").keys() == {"queue", "split"}, (
        "another section is given a `split`"
    )


def test_a_given_parameter_exists():
    register(Section("cluster", f"{__name__}:Cluster", given=("foldr",)))
    with pytest.raises(ContractError, match=r"section cluster: .*:Cluster has no parameter foldr"):
        section_settings("cluster")


def test_a_name_is_given_once():
    register(SECTIONS["sweep"])
    with pytest.raises(ContractError, match="'sweep' is registered twice"):
        register(Section("sweep", f"{__name__}:Cluster"))
    with pytest.raises(ContractError, match="'grid' is registered twice"):
        register(HydraPlugin("sweeper", "grid", f"{__name__}:Cluster"))


@pytest.mark.parametrize("name", list(SECTIONS))
def test_the_owners_of_sections_are_there(name):
    assert section_settings(name)


@pytest.mark.parametrize(
    "plugin", HYDRA_PLUGINS.values(), ids=lambda plugin: f"{plugin.group}-{plugin.name}"
)
def test_the_classes_of_sweepers_and_launchers_are_there(plugin):
    if plugin.replaces is not None:
        pytest.importorskip(plugin.replaces.rpartition(".")[0])
    if plugin.needs is not None:
        pytest.importorskip(plugin.needs)
    assert isinstance(sections.load(plugin.owner), type)


def test_the_process_of_a_job_registers_what_the_command_has():
    register(Section("cluster", f"{__name__}:Cluster", given=("folder",)))
    sent = pickle.dumps(filled_store())
    del SECTIONS["cluster"]
    pickle.loads(sent)
    assert section_settings("cluster").keys() == {"queue", "split"}


def test_registering_imports_no_owner():
    program = "import sys, framework.tuning.sections; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    imported = set(done.stdout.split())
    assert not imported & {
        "torch",
        "hydra",
        "optuna",
        "framework.training.trainer",
        "framework.tuning.sweep",
    }
