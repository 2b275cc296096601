"""Builds the sweeper and launcher of a sweep, except those of installed Hydra plugins."""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from framework.composition.sections import HYDRA_PLUGINS, HydraPlugin, import_owner, plugin_settings
from framework.errors import ConfigError, FrameworkError, SettingError
from framework.tuning.sections import DEFAULTS


def build_plugin(config: DictConfig, group: str, chosen: bool) -> Any:
    """Return the sweeper or launcher of a composed config, or None for one of a Hydra plugin.

    Args:
        config: the composed config.
        group: "sweeper" or "launcher".
        chosen: whether the user chose it; otherwise the default of sweeps replaces Hydra's, with
            the settings that both have.

    Raises:
        ConfigError: settings are invalid.
        FrameworkError: a required package is missing.
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
    problems = list(setting_problems(plugin, settings))
    if problems:
        raise ConfigError(problems)
    return owner(**settings)


def load_owner(plugin: HydraPlugin) -> Any:
    """Import the class of a sweeper or launcher.

    Raises:
        FrameworkError: a required package is missing.
    """
    try:
        return import_owner(plugin.owner)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if plugin.needs is None or missing != plugin.needs:
            raise
        raise FrameworkError(
            f"hydra/{plugin.group}={plugin.name} needs {plugin.needs}: "
            "pip install 'framework[tuning]'"
        ) from None


def setting_problems(plugin: HydraPlugin, settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings with invalid values; a plugin with its own schema checks them itself."""
    if plugin.schema is not None or plugin.replaces is not None:
        return
    for key, setting in plugin_settings(plugin).items():
        try:
            setting.convert(settings[key])
        except SettingError as error:
            yield f"hydra.{plugin.group}.{key}={settings[key]}: {error}"
