"""What an experiment contains besides parts: sections such as `trainer`, sweepers and launchers.

The package that owns one registers it here, since composition does not import the packages above
it. An owner is named as "module:Class" and is imported when its settings are first read, which
keeps start-up fast.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Literal

from framework.errors import ContractError
from framework.registry.schema import Setting, read_settings
from framework.registry.signatures import signature_parameters


@dataclass(frozen=True)
class Section:
    """A top-level key of an experiment, whose settings are the parameters of a class.

    Attributes:
        name: the key.
        owner: the class, as "module:Class".
        given: parameters that the framework passes; all others are settings.
        of_run: whether a run depends on it; the config of a run contains it then.
    """

    name: str
    owner: str
    given: tuple[str, ...] = ()
    of_run: bool = True


@dataclass(frozen=True)
class HydraPlugin:
    """A sweeper or a launcher, which `hydra/sweeper=NAME` or `hydra/launcher=NAME` chooses.

    Attributes:
        group: "sweeper" or "launcher".
        name: the option of the group.
        owner: the class, as "module:Class".
        schema: the class whose parameters are the settings, if not the owner.
        in_files: whether config files may contain its settings, not only the command line.
        needs: an optional module that it imports; the extra `tuning` installs it.
        replaces: the class of an installed Hydra plugin that it replaces, whose option and
            settings are kept.
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
    """Register sections, sweepers and launchers.

    Raises:
        ContractError: a name is taken.
    """
    for entry in entries:
        before: Section | HydraPlugin
        if isinstance(entry, Section):
            before = SECTIONS.setdefault(entry.name, entry)
        else:
            before = HYDRA_PLUGINS.setdefault((entry.group, entry.name), entry)
        if before != entry:
            raise ContractError(
                f"{entry.name!r} is registered twice: by {before.owner} and {entry.owner}"
            )


def import_owner(owner: str) -> Callable[..., Any]:
    """Import the class "module:Class"."""
    module, _, name = owner.partition(":")
    loaded: Callable[..., Any] = getattr(import_module(module), name)
    return loaded


@cache
def section_settings(name: str) -> dict[str, Setting]:
    """Return the settings of a section.

    Raises:
        ContractError: if the owner does not have one of the parameters in `given`.
    """
    section = SECTIONS[name]
    owner = import_owner(section.owner)
    missing = set(section.given) - signature_parameters(owner).keys()
    if missing:
        names = ", ".join(sorted(missing))
        raise ContractError(f"section {name}: {section.owner} has no parameter {names}")
    return read_settings(owner, section.given)


def plugin_settings(plugin: HydraPlugin) -> dict[str, Setting]:
    """Return the settings of a sweeper or launcher."""
    return read_settings(import_owner(plugin.schema or plugin.owner))


register(
    Section(
        "trainer",
        "framework.training.trainer:Trainer",
        given=("seed", "strategy", "callbacks", "loggers", "folder"),
    ),
    Section("parameters", "framework.contracts.optimizer:Parameters"),
    Section("loader", "framework.data.dataset:Loader", given=("split", "shuffle", "seed", "model")),
    Section("run", "framework.runs.folder:RunFolder", given=("experiment",)),
)
