"""What an experiment holds besides its parts: sections such as `trainer`, and the sweepers and launchers of sweeps.

A package that owns one registers it here, since composition imports none of the packages above it. Owners are named
as "module:Class" and imported when their settings are first read, so that registering costs next to nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Literal

from framework.errors import ContractError
from framework.registry.schema import Setting, read_settings
from framework.registry.signatures import parameters_of


@dataclass(frozen=True)
class Section:
    """A top-level key of an experiment, whose settings are the parameters of a class.

    Attributes:
        name: the key.
        owner: the class, as "module:Class".
        given: parameters that the framework passes. Every other parameter is a setting.
        of_run: whether a run depends on it, so that the config of a run holds it.
    """

    name: str
    owner: str
    given: tuple[str, ...] = ()
    of_run: bool = True


@dataclass(frozen=True)
class HydraPlugin:
    """A sweeper or a launcher, which `hydra/sweeper=NAME` or `hydra/launcher=NAME` chooses.

    Attributes:
        group: which of the two it is.
        name: the option of the group.
        owner: the class, as "module:Class".
        schema: the class whose parameters are the settings, if not the owner.
        in_files: whether config files may give its settings; otherwise only the command line may.
        needs: the module that it imports and that may be missing; the extra `tuning` installs it.
        replaces: the class of an installed Hydra plugin that it stands for, whose option and settings stay as they are.
    """

    group: Literal["sweeper", "launcher"]
    name: str
    owner: str
    schema: str | None = None
    in_files: bool = False
    needs: str | None = None
    replaces: str | None = None


SECTIONS: dict[str, Section] = {}
HYDRA_PLUGINS: dict[tuple[str, str], HydraPlugin] = {}  # by group and name


def register(*entries: Section | HydraPlugin) -> None:
    """Register sections and plugins of Hydra. Raises ContractError for a name that is taken."""
    for entry in entries:
        before: Section | HydraPlugin
        if isinstance(entry, Section):
            before = SECTIONS.setdefault(entry.name, entry)
        else:
            before = HYDRA_PLUGINS.setdefault((entry.group, entry.name), entry)
        if before != entry:
            raise ContractError(
                f"{entry.name!r} is registered twice: for {before.owner} and for {entry.owner}"
            )


def load(owner: str) -> Callable:
    """Import a class that is named as "module:Class"."""
    module, _, name = owner.partition(":")
    return getattr(import_module(module), name)


@cache
def section_settings(name: str) -> dict[str, Setting]:
    """Return the settings of a section. Raises ContractError when a given parameter is none of its owner's."""
    section = SECTIONS[name]
    owner = load(section.owner)
    strange = set(section.given) - parameters_of(owner).keys()
    if strange:
        raise ContractError(
            f"section {name}: {section.owner} has no parameter {', '.join(sorted(strange))}"
        )
    return read_settings(owner, section.given)


def plugin_settings(plugin: HydraPlugin) -> dict[str, Setting]:
    """Return the settings of a sweeper or launcher."""
    return read_settings(load(plugin.schema or plugin.owner))


register(
    Section(
        "trainer",
        "framework.training.trainer:Trainer",
        given=("seed", "callbacks", "loggers", "folder"),
    ),
    Section("parameters", "framework.contracts.optimizer:Parameters"),
    Section("loader", "framework.data.dataset:Loader", given=("split", "shuffle", "seed", "model")),
    Section("run", "framework.runs.folder:RunFolder", given=("experiment",)),
)
