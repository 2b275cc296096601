"""Chooses the sweeper and the launcher of a sweep: ours, or one of an installed Hydra plugin."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from framework.composition.hydra_groups import plugin_option
from framework.composition.hydra_internals import plugin_target
from framework.composition.sections import HYDRA_PLUGINS, HydraPlugin, load, plugin_settings
from framework.errors import ConfigError, FrameworkError, SettingError
from framework.tuning.sections import DEFAULTS


def choose(config: DictConfig, group: str, chosen: bool) -> dict[str, type]:
    """See to it that Hydra can build the sweeper or launcher of a config.

    Args:
        config: the composed config, which is changed.
        group: "sweeper" or "launcher".
        chosen: whether the user chose it; else ours takes the place of Hydra's default, with the settings of both.

    Returns our class by its target; {} when it is one of an installed Hydra plugin. Raises ConfigError for settings
    that ours does not take, and FrameworkError when what it needs is not installed.
    """
    name = config.hydra.runtime.choices[f"hydra/{group}"]
    node: Any = OmegaConf.to_container(config.hydra[group])
    if name == "basic" and not chosen:
        name = DEFAULTS[group]
        ours = plugin_option(HYDRA_PLUGINS[group, name])
        node = {**ours, **{key: value for key, value in node.items() if key in ours and key != "_target_"}}
        OmegaConf.update(config, f"hydra.{group}", OmegaConf.create(node), merge=False)
    plugin = HYDRA_PLUGINS.get((group, name))
    if plugin is None or plugin.replaces not in (None, node["_target_"]):
        return {}
    owner = load_plugin(plugin)
    problems = list(faults(plugin, node))
    if problems:
        raise ConfigError(problems)
    target = plugin_target(plugin.owner)
    config.hydra[group]._target_ = target
    return {target: owner}


def load_plugin(plugin: HydraPlugin) -> type:
    """Import the class of a sweeper or launcher. Raises FrameworkError when what it needs is not installed."""
    try:
        owner: Any = load(plugin.owner)
    except ModuleNotFoundError as error:
        if plugin.needs is None or error.name is None or error.name.partition(".")[0] != plugin.needs:
            raise
        needed = f"hydra/{plugin.group}={plugin.name} needs {plugin.needs}"
        raise FrameworkError(f"{needed}: pip install 'framework[tuning]'") from None
    return owner


def faults(plugin: HydraPlugin, node: Mapping[str, Any]) -> Iterator[str]:
    """Yield which settings have a value that they cannot have; one with a schema of its own checks them itself."""
    if plugin.schema is not None or plugin.replaces is not None:
        return
    for key, setting in plugin_settings(plugin).items():
        try:
            setting.convert(node[key])
        except SettingError as error:
            yield f"hydra.{plugin.group}.{key}={node[key]}: {error}"
