"""Builds the sweeper and the launcher of a sweep, if they are ours and not those of an installed Hydra plugin."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from framework.composition.sections import HYDRA_PLUGINS, HydraPlugin, load, plugin_settings
from framework.errors import ConfigError, FrameworkError, SettingError
from framework.tuning.sections import DEFAULTS


def build(config: DictConfig, group: str, chosen: bool) -> Any:
    """Return our sweeper or launcher for a composed config; None when it is one of an installed Hydra plugin.

    Args:
        config: the composed config.
        group: "sweeper" or "launcher".
        chosen: whether the user chose it; else ours takes the place of Hydra's default, with the settings of both.

    Raises ConfigError for settings that ours does not take, and FrameworkError when what it needs is not installed.
    """
    name = config.hydra.runtime.choices[f"hydra/{group}"]
    settings: Any = OmegaConf.to_container(config.hydra[group], resolve=True)
    target = settings.pop("_target_")
    if name == "basic" and not chosen:
        name = DEFAULTS[group]
        known = plugin_settings(HYDRA_PLUGINS[group, name])
        settings = {key: settings.get(key, setting.default) for key, setting in known.items()}
    plugin = HYDRA_PLUGINS.get((group, name))
    if plugin is None or plugin.replaces not in (None, target):
        return None
    owner = load_owner(plugin)
    problems = list(faults(plugin, settings))
    if problems:
        raise ConfigError(problems)
    return owner(**settings)


def load_owner(plugin: HydraPlugin) -> type:
    """Import the class of a sweeper or launcher. Raises FrameworkError when what it needs is not installed."""
    try:
        owner: Any = load(plugin.owner)
    except ModuleNotFoundError as error:
        if (
            plugin.needs is None
            or error.name is None
            or error.name.partition(".")[0] != plugin.needs
        ):
            raise
        needed = f"hydra/{plugin.group}={plugin.name} needs {plugin.needs}"
        raise FrameworkError(f"{needed}: pip install 'framework[tuning]'") from None
    return owner


def faults(plugin: HydraPlugin, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield which settings have a value that they cannot have; one with a schema of its own checks them itself."""
    if plugin.schema is not None or plugin.replaces is not None:
        return
    for key, setting in plugin_settings(plugin).items():
        try:
            setting.convert(settings[key])
        except SettingError as error:
            yield f"hydra.{plugin.group}.{key}={settings[key]}: {error}"
