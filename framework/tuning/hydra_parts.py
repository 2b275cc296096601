"""Our launchers and sweepers, as Hydra knows them. None is imported before it is chosen."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

from framework.errors import ConfigError, FrameworkError, SettingError
from framework.registry.schema import read_settings

PARTS = {
    "sweeper": {"grid": "sweep.grid:Grid", "optuna": "search.search:OptunaSweeper"},
    "launcher": {
        "one_by_one": "sweep.launcher:OneByOne",
        "vectorized": "vectorized.launcher:Vectorized",
        "auto": "vectorized.launcher:Auto",
    },
}
DEFAULTS = {"sweeper": "grid", "launcher": "one_by_one"}  # of a sweep, in the place of Hydra's `basic`
TARGET = "hydra_plugins.framework."  # Hydra takes plugins from there alone
EXTRA = ("optuna", "cmaes")
JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"


def register(add: Callable[[str, str, Callable[[], dict[str, Any]]], None]) -> None:
    """Add each as an option of its group: `add(name, group, content)`."""
    for group, parts in PARTS.items():
        for name in parts:
            add(name, f"hydra/{group}", partial(content, group, name))


def content(group: str, name: str) -> dict[str, Any]:
    """Return what an option holds: the class, and its settings with their defaults."""
    cls = load(group, name)
    given = getattr(sys.modules[cls.__module__], "settings", None)  # of a class that checks them itself
    defaults = given() if given else {key: setting.default for key, setting in read_settings(cls).items()}
    return {"_target_": f"{TARGET}{cls.__name__}", **defaults}


def load(group: str, name: str) -> type:
    """Import a class. Raises FrameworkError when what it needs is not installed."""
    module, _, cls = PARTS[group][name].partition(":")
    try:
        return getattr(import_module(f"{__package__}.{module}"), cls)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRA:
            raise
        raise FrameworkError(f"hydra/{group}={name} needs {error.name}: pip install 'framework[tuning]'") from None


def choose(config: Any, group: str, chosen: bool) -> bool:
    """See to it that Hydra can build the sweeper or launcher of a config; returns whether it is ours.

    chosen: whether the person chose it; else ours takes the place of Hydra's default, with what both have.
    Raises ConfigError for settings that it does not take.
    """
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    name = config.hydra.runtime.choices[f"hydra/{group}"]
    node: Any = OmegaConf.to_container(config.hydra[group])
    if name == "basic" and not chosen:
        name = DEFAULTS[group]
        ours = content(group, name)
        node = {**ours, **{key: value for key, value in node.items() if key in ours and key != "_target_"}}
        OmegaConf.update(config, f"hydra.{group}", OmegaConf.create(node), merge=False)
    if name == "joblib" and node["_target_"] == JOBLIB:
        from .sweep.joblib_launcher import Joblib

        Plugins.instance().class_name_to_class[JOBLIB] = Joblib
    if name not in PARTS[group]:
        return False
    cls = load(group, name)
    Plugins.instance().class_name_to_class[f"{TARGET}{cls.__name__}"] = cls  # type: ignore[assignment]
    problems = list(faults(cls, f"hydra.{group}", node))
    if problems:
        raise ConfigError(problems)
    return True


def faults(cls: type, path: str, node: Any) -> Iterator[str]:
    """Yield which settings have a value that they cannot have."""
    for key, setting in read_settings(cls).items():
        try:
            setting.convert(node[key])
        except SettingError as error:
            yield f"{path}.{key}={node[key]}: {error}"
