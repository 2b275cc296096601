"""The registries as Hydra config groups. Options are built when they are chosen, not before.

Hydra copies its whole ConfigStore for each composition, and a schema for every part would cost half a second a run.
"""

import re
from collections.abc import Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf

from framework.registry.discovery import discover
from framework.registry.registry import Entry, Registry
from framework.registry.schema import names_parts
from framework.tuning.hydra_parts import register

from .spec import PLAIN, SECTIONS, Settings, follow, plain, section_settings

NONE = "_none_"  # the option of a group that holds nothing: Hydra has no `GROUP=null` on its command line
ALSO = "also"  # the group in which `+callbacks=NAME` adds to the list of the group `callbacks`


class LazyNode(ConfigNode):
    """An option of a group, made from a registered part when Hydra asks for it."""

    def __init__(self, name: str, group: str | None, package: str | None, content: Any):
        self.name, self.group, self.package, self.provider = f"{name}.yaml", group, package, "framework"
        self.content = content

    @property
    def node(self) -> DictConfig:  # type: ignore[override]
        return OmegaConf.create(self.content())

    @node.setter
    def node(self, value: DictConfig) -> None:
        """Hydra puts a deep copy back; each reading is fresh anyway."""


def fill_store(plugins: Iterable[str] = (), without: Iterable[str] = ()) -> None:
    """Put every registered part, and the sections, into Hydra's ConfigStore.

    A launcher that runs jobs in processes of their own sends the store there: as the `plugins` to fill it from, and
    the installed ones to leave out.
    """
    store, loaded = ConfigStore.instance(), (tuple(plugins), tuple(without))
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]  # see above
    ConfigStore.__reduce__ = lambda self: (filled_store, loaded)  # type: ignore[method-assign, assignment]
    add(store.repo, "sections", None, None, sections)
    add(store.repo, "framework", None, None, ours)
    register(lambda name, group, content: add(store.repo, name, group, None, content))
    for registry in Registry.every.values():
        key = registry.kind.key
        add(store.repo, NONE, key, "_global_", dict)
        groups = (key, f"{ALSO}/{key}") if registry.kind.many else (key,)
        for entry, group in product(registry, groups):
            for name in (entry.name, *entry.aliases):
                add(store.repo, name, group, key, partial(option, entry))


def filled_store(plugins: Iterable[str], without: Iterable[str] = ()) -> ConfigStore:
    """Load the plugins and return the store, in the process of a job."""
    discover(plugins, without)
    fill_store(plugins, without)
    return ConfigStore.instance()


def add(repo: dict[str, Any], name: str, group: str | None, package: str | None, content: Any) -> None:
    for part in group.split("/") if group else ():
        repo = repo.setdefault(part, {})
    repo[f"{name}.yaml"] = LazyNode(name, group, package, content)


def option(entry: Entry) -> dict[str, Any]:
    """Return what a part's config group option holds: its name, and each setting with its default.

    A default that a config cannot hold is left out, so that the part's signature supplies it.
    """
    settings = {"name": entry.name} | defaults(entry.settings, entry.kind.name)
    return {entry.name: settings} if entry.kind.many else settings


def defaults(settings: Settings, kind: str | None = None) -> dict[str, Any]:
    """Return the defaults of settings; a part of a kind does not follow the choice of that kind, which is itself."""
    found: dict[str, Any] = {}
    for name, setting in settings.items():
        if setting.part not in (None, kind) and not setting.many:
            found[name] = follow(str(setting.part))
        elif setting.required:
            found[name] = "???"
        elif setting.in_config and (setting.part is None or names_parts(setting.default)):
            found[name] = escaped(plain(setting.default))
    return found


def escaped(value: Any) -> Any:
    """Return a default in which "${" stays text, where OmegaConf would read a reference to another key."""
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def ours() -> DictConfig:
    """Return our own config.yaml, so that a project's may begin with `defaults: [framework, _self_]`."""
    import framework_conf

    return OmegaConf.load(Path(framework_conf.__path__[0]) / "config.yaml")  # type: ignore[return-value]


def sections() -> dict[str, Any]:
    tree: dict[str, Any] = {registry.kind.key: None for registry in Registry.every.values() if not registry.kind.many}
    tree |= {name: setting.default for name, setting in PLAIN.items()}
    for name in SECTIONS:
        tree[name] = defaults(section_settings(name))
    return tree
