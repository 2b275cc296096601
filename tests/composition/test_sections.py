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
    """Remove the section that a test registers."""
    yield
    SECTIONS.pop("cluster", None)
    section_settings.cache_clear()


def test_every_parameter_is_a_setting_unless_the_framework_passes_it():
    register(Section("cluster", f"{__name__}:Cluster", given=("folder",)))
    # `split` is passed to another section only
    assert section_settings("cluster").keys() == {"queue", "split"}


def test_a_parameter_that_the_framework_passes_must_exist():
    register(Section("cluster", f"{__name__}:Cluster", given=("foldr",)))
    with pytest.raises(ContractError, match=r"section cluster: .*:Cluster has no parameter foldr"):
        section_settings("cluster")


def test_a_name_is_registered_once():
    register(SECTIONS["sweep"])
    with pytest.raises(ContractError, match="'sweep' is registered twice"):
        register(Section("sweep", f"{__name__}:Cluster"))
    with pytest.raises(ContractError, match="'grid' is registered twice"):
        register(HydraPlugin("sweeper", "grid", f"{__name__}:Cluster"))


@pytest.mark.parametrize("name", list(SECTIONS))
def test_the_owner_of_a_section_can_be_imported(name):
    assert section_settings(name)


@pytest.mark.parametrize(
    "plugin", HYDRA_PLUGINS.values(), ids=lambda plugin: f"{plugin.group}-{plugin.name}"
)
def test_the_class_of_a_sweeper_or_launcher_can_be_imported(plugin):
    if plugin.replaces is not None:
        pytest.importorskip(plugin.replaces.rpartition(".")[0])
    if plugin.needs is not None:
        pytest.importorskip(plugin.needs)
    assert isinstance(sections.import_owner(plugin.owner), type)


def test_the_process_of_a_job_registers_the_same_sections():
    register(Section("cluster", f"{__name__}:Cluster", given=("folder",)))
    sent = pickle.dumps(filled_store())
    del SECTIONS["cluster"]
    pickle.loads(sent)
    assert section_settings("cluster").keys() == {"queue", "split"}


def test_registering_imports_no_owner():
    program = "import sys, framework.tuning.sections; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    owners = {"framework.training.trainer", "framework.tuning.sweep"}
    assert not imported & {"torch", "hydra", "optuna", *owners}
