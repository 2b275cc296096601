"""The registries as Hydra config groups. Options are made when they are chosen, not before."""

import re
from collections.abc import Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from framework.registry.discovery import discover
from framework.registry.registry import Entry, Registry
from framework.registry.schema import names_parts

from .hydra_internals import LazyStore
from .sections import (
    HYDRA_PLUGINS,
    SECTIONS,
    HydraPlugin,
    Section,
    plugin_settings,
    register,
    section_settings,
)
from .spec import PLAIN, Settings, config_value, followed_kind

NONE = "_none_"  # the option of a group that holds nothing: Hydra has no `GROUP=null` on its command line
ALSO = "also"  # the group in which `+callbacks=NAME` adds to the list of the group `callbacks`


def filled_store(plugins: Iterable[str] = (), without: Iterable[str] = ()) -> LazyStore:
    """Return a store for Hydra with every registered part, the sections, and the sweepers and launchers.

    A launcher that runs jobs in processes of their own sends the store there: as the `plugins` to fill it from, the
    installed ones to leave out, and what is registered besides parts.
    """
    registered = (*SECTIONS.values(), *HYDRA_PLUGINS.values())
    store = LazyStore.extended(restored_store, tuple(plugins), tuple(without), registered)
    store.add("sections", None, None, sections)
    store.add("framework", None, None, ours)
    for plugin in HYDRA_PLUGINS.values():
        if plugin.replaces is None:
            store.add(plugin.name, f"hydra/{plugin.group}", None, partial(plugin_option, plugin))
    for registry in Registry.every.values():
        key = registry.kind.key
        store.add(NONE, key, "_global_", dict)
        groups = (key, f"{ALSO}/{key}") if registry.kind.many else (key,)
        for entry, group in product(registry, groups):
            for name in (entry.name, *entry.aliases):
                store.add(name, group, key, partial(option, entry))
    return store


def restored_store(
    plugins: Iterable[str], without: Iterable[str], registered: Iterable[Section | HydraPlugin]
) -> LazyStore:
    """Load the plugins and return the store, in the process of a job."""
    register(*registered)
    discover(plugins, without)
    return filled_store(plugins, without)


def plugin_option(plugin: HydraPlugin) -> dict[str, Any]:
    """Return what the option of a sweeper or launcher holds: its class, and its settings with their defaults."""
    settings = {name: setting.default for name, setting in plugin_settings(plugin).items()}
    return {"_target_": plugin.owner.replace(":", "."), **settings}


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
            found[name] = followed_kind(str(setting.part))
        elif setting.required:
            found[name] = "???"
        elif setting.in_config and (setting.part is None or names_parts(setting.default)):
            found[name] = escaped(config_value(setting.default))
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
    tree: dict[str, Any] = {
        registry.kind.key: None for registry in Registry.every.values() if not registry.kind.many
    }
    tree |= {name: setting.default for name, setting in PLAIN.items()}
    for name in SECTIONS:
        tree[name] = defaults(section_settings(name))
    return tree
