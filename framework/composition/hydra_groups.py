"""The registries as Hydra config groups; the content of an option is made when it is chosen."""

import re
from collections.abc import Iterable
from functools import partial
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
from .spec import MISSING, PLAIN, Schema, config_value, followed_kind

NONE = "_none_"  # an option without content; Hydra has no `GROUP=null` on its command line
ALSO = "also"  # `also/callbacks` is the group by which `+callbacks=NAME` adds to `callbacks`


def filled_store(plugins: Iterable[str] = (), without: Iterable[str] = ()) -> LazyStore:
    """Return a store for Hydra with all registered parts, sections, sweepers and launchers.

    A launcher that runs jobs in other processes pickles the store. The pickle contains only the
    arguments and the registered sections; `restored_store` fills a new store from them.

    Args:
        plugins: the plugins that are loaded.
        without: installed plugins that are not loaded.
    """
    registered = (*SECTIONS.values(), *HYDRA_PLUGINS.values())
    store = LazyStore.extended(restored_store, tuple(plugins), tuple(without), registered)
    store.add("sections", None, None, sections)
    store.add("framework", None, None, framework_config)
    for plugin in HYDRA_PLUGINS.values():
        if plugin.replaces is None:
            store.add(plugin.name, f"hydra/{plugin.group}", None, partial(plugin_option, plugin))
    for key, registry in Registry.by_key().items():
        store.add(NONE, key, "_global_", dict)
        for entry in registry:
            for name in (entry.name, *entry.aliases):
                store.add(name, key, key, partial(option, entry))
                if registry.kind.many:
                    store.add(name, f"{ALSO}/{key}", key, partial(option, entry))
    return store


def restored_store(
    plugins: Iterable[str], without: Iterable[str], registered: Iterable[Section | HydraPlugin]
) -> LazyStore:
    """Load the plugins and return a filled store, in the process of a job."""
    register(*registered)
    discover(plugins, without)
    return filled_store(plugins, without)


def plugin_option(plugin: HydraPlugin) -> dict[str, Any]:
    """Return the content of a sweeper's or launcher's option: class and default settings."""
    settings = {name: setting.default for name, setting in plugin_settings(plugin).items()}
    return {"_target_": plugin.owner.replace(":", "."), **settings}


def option(entry: Entry) -> dict[str, Any]:
    """Return the content of a part's option: its name and default settings.

    A default that a config cannot hold is left out; the part's signature supplies it.
    """
    settings = {"name": entry.name} | defaults(entry.settings, entry.kind.name)
    return {entry.name: settings} if entry.kind.many else settings


def defaults(schema: Schema, kind: str | None = None) -> dict[str, Any]:
    """Return the defaults of settings, as a config holds them.

    A setting that names a part follows the experiment's choice of its kind: "${activation}".

    Args:
        schema: the settings of a part or section.
        kind: the kind of the part. It does not follow the choice of this kind, which is the part.
    """
    found: dict[str, Any] = {}
    for name, setting in schema.items():
        if setting.part not in (None, kind) and not setting.many:
            found[name] = followed_kind(str(setting.part))
        elif setting.required:
            found[name] = MISSING
        elif setting.in_config and (setting.part is None or names_parts(setting.default)):
            found[name] = escaped(config_value(setting.default))
    return found


def escaped(value: Any) -> Any:
    """Return a default with "${" escaped, so that OmegaConf does not read a reference."""
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def framework_config() -> DictConfig:
    """Return the framework's config.yaml.

    A project's config.yaml builds on it with `defaults: [framework, _self_]`.
    """
    import framework_conf

    loaded: Any = OmegaConf.load(Path(framework_conf.__path__[0]) / "config.yaml")
    config: DictConfig = loaded
    return config


def sections() -> dict[str, Any]:
    """Return all keys of an experiment with their defaults, and no part for each kind."""
    tree: dict[str, Any] = {}
    for key, registry in Registry.by_key().items():
        if not registry.kind.many:
            tree[key] = None
    for name, setting in PLAIN.items():
        tree[name] = setting.default
    for name in SECTIONS:
        tree[name] = defaults(section_settings(name))
    return tree
