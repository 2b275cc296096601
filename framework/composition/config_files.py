"""The config files of an experiment: what may stand in them, and how they choose parts.

Hydra would import what a config names in its own settings (callbacks, logging classes, `_target_`) and set environment
variables. So each file is checked when Hydra reads it: it may choose parts and set their settings, and little else.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from framework.errors import ConfigError
from framework.errors.paths import shorter
from framework.registry.registry import Registry

from . import hydra_internals
from .sections import HYDRA_PLUGINS, plugin_settings
from .sources import File, line_of, line_with, own_name, read_yaml, unreadable
from .spec import IMPORTS, TARGET

FOREIGN_SETTINGS = {
    "launcher": ("n_jobs",),
    "sweeper": ("n_trials", "n_jobs", "direction", "study_name"),
}
"""Settings of Hydra's joblib launcher and of its own Optuna sweeper that a config file may give, too."""
OWN = "Hydra's own settings are not for a config file: give those that have an effect on the command line"


class FileConfigSource(hydra_internals.FileConfigSource):
    """Reads config files as Hydra does, checks each, and remembers which were read.

    It has the name of the class that it replaces: see `replaced_file_source`.
    """

    read: ClassVar[list[File]] = []

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path) / f"{config_path.removesuffix('.yaml')}.yaml"
        try:
            result = super().load_config(config_path)
        except (yaml.YAMLError, ValueError, OSError) as error:
            raise ConfigError([unreadable(file, error)]) from error
        group = config_path.rpartition("/")[0]
        if group == "experiment" and result.header["package"] is None:
            result.header["package"] = (
                "_global_"  # an experiment is about the whole, also without Hydra's header
            )
        package = (result.header["package"] or "_group_").replace(
            "_group_", group.replace("/", ".")
        )
        package = package.replace("_name_", config_path.rpartition("/")[2])
        problems = list(
            check_file(
                file, config_path, package, OmegaConf.to_container(result.config, resolve=False)
            )
        )
        if problems:
            raise ConfigError(problems)
        package = package.removeprefix("_global_").strip(".")
        if (file, package) not in self.read:
            self.read.append((file, package))
        if not package and isinstance(result.config, DictConfig):
            content: Any = OmegaConf.to_container(result.config, resolve=False)
            result.config = OmegaConf.create(expand_choices(content))
        return result


@contextmanager
def checked_files() -> Iterator[list[File]]:
    """Let Hydra check the config files that it reads. Yields the list of those that were read, which grows."""
    FileConfigSource.read = []
    with hydra_internals.replaced_file_source(FileConfigSource):
        yield FileConfigSource.read


def settings_in_files(group: str) -> set[str]:
    """Return the settings of sweepers, or of launchers, that a config file may give."""
    found = set(FOREIGN_SETTINGS[group])
    for plugin in HYDRA_PLUGINS.values():
        if plugin.group == group and plugin.in_files:
            found |= plugin_settings(plugin).keys()
    return found


def check_file(file: Path, config_path: str, package: str, content: Any) -> Iterator[str]:
    """Yield what may not stand in a config file, with its line."""
    if not isinstance(content, Mapping):
        yield f"{shorter(file)}: should hold `key: value` lines"
        return
    group, _, name = config_path.rpartition("/")
    kinds = Registry.by_key()
    if group in kinds and name in kinds[group]:
        yield f"{shorter(file)}: {name!r} is a registered {kinds[group].kind.name}: give the file another name"
    if "hydra" in (config_path.split("/")[0], *package.split(".")):
        yield f"{shorter(file)}: {OWN}"
    defaults = content.get("defaults")
    for entry in defaults if isinstance(defaults, list) else ():
        yield from (
            f"{shorter(file)}:{line_with(file, text)}: {said}" for text, said in check_entry(entry)
        )
    for key, registry in kinds.items():
        if (
            registry.kind.many
            and isinstance(content.get(key), list)
            and (strange := unnamed(content[key]))
        ):
            yield f"{shorter(file)}:{line_of(file, (key,))}: {key}: {strange[0]} is no name, nor {{name: ..., ...}}"
    for path in paths(content):
        if IMPORTS & set(path):
            yield f"{'.'.join(path)}: {TARGET} ({shorter(file)}:{line_of(file, path)})"
    refused = [
        path[:2] for path in paths(content) if path[0] == "hydra" and not is_for_sweeps(path)
    ]
    for path in dict.fromkeys(refused):
        yield f"{'.'.join(path)}: {OWN} ({shorter(file)}:{line_of(file, path)})"


def is_for_sweeps(path: Sequence[str]) -> bool:
    """Whether the path of a value below the key `hydra` is one that a config file may give."""
    group, setting = (*path, "", "")[1:3]
    return (
        group in FOREIGN_SETTINGS
        and setting in settings_in_files(group)
        and not says_hydra(".".join(path[3:]))
    )


def check_entry(entry: Any) -> Iterator[tuple[str, str]]:
    """Yield the text and the fault of an entry of a defaults list that would change Hydra itself."""
    (key, value), *_ = entry.items() if isinstance(entry, Mapping) and entry else [(entry, None)]
    group, _, package = re.sub(r"^((override|optional)\s+)+", "", str(key)).partition("@")
    plugin = (
        group.lstrip("/") in ("hydra/launcher", "hydra/sweeper")
        and not package
        and str(value).isidentifier()
    )
    hidden = "$" in package or "_name_" in package  # it could come to say hydra
    if not plugin and (
        hidden or says_hydra(package) or says_hydra(group.lstrip("/").split("/")[0])
    ):
        yield str(key), f"{key}: {OWN}"


def expand_choices(content: dict[str, Any]) -> dict[str, Any]:
    """Turn `optimizer: sgd`, `optimizer: {name: sgd, lr: 0.1}`, `metrics: [f1, {name: top_k, k: 3}]` into choices.

    In the defaults list the command line can choose otherwise; the settings of what was chosen before do not linger.
    """
    defaults, rest = list(content.get("defaults") or ()), dict(content)
    chosen: list[dict[str, Any]] = []
    listed = {
        str(key).split("/")[-1] for entry in defaults if isinstance(entry, Mapping) for key in entry
    }
    for registry in Registry.every.values():
        kind, key, value = registry.kind, registry.kind.key, rest.get(registry.kind.key, {})
        if kind.many:
            if isinstance(value, list) and key not in listed and not unnamed(value):
                parts = [
                    dict(one) if isinstance(one, Mapping) else {"name": one}
                    for one in rest.pop(key)
                ]
                names = [own_name(part.pop("name"), registry) for part in parts]
                chosen.append({f"override /{key}": names})
                settings = {name: part for name, part in zip(names, parts, strict=True) if part}
                rest.update({key: settings} if settings else {})
            continue
        settings = dict(value) if isinstance(value, Mapping) else {"name": value}
        if "name" in settings and key not in listed:
            chosen.append({f"override /{key}": settings.pop("name")})
            rest = {k: v for k, v in rest.items() if k != key} | (
                {key: settings} if settings else {}
            )
    if chosen and "_self_" not in defaults:
        first_override = next(
            (n for n, entry in enumerate(defaults) if "override " in str(entry)), len(defaults)
        )
        defaults.insert(first_override, "_self_")
    return rest | {"defaults": [*defaults, *chosen]} if chosen else content


def unnamed(parts: Sequence[Any]) -> list[Any]:
    """Return what in a list of parts is neither a name nor settings with one."""
    return [
        part
        for part in parts
        if not isinstance(part.get("name") if isinstance(part, Mapping) else part, str)
    ]


def experiments_in(folders: Iterable[Path]) -> list[str]:
    """Return the names for `experiment=NAME`."""
    return sorted(
        {file.stem for folder in folders for file in (folder / "experiment").glob("*.yaml")}
    )


def chosen_in(folders: Iterable[Path]) -> dict[str, Any]:
    """Return what the defaults list of the main config chooses: {"optimizer": "adamw", "metrics": ["accuracy"]}."""
    files = [folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()]
    chosen: dict[str, Any] = {}
    for entry in [entry for file in files for entry in read_yaml(file).get("defaults") or ()]:
        if isinstance(entry, Mapping):
            chosen |= {
                str(key).removeprefix("override ").lstrip("/"): value
                for key, value in entry.items()
            }
    return {key: value for key, value in chosen.items() if value}


def says_hydra(text: str) -> bool:
    return "hydra" in re.split(r"\W+", text)


def paths(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every leaf of a tree."""
    items = (
        tree.items()
        if isinstance(tree, Mapping)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    below = [deeper for key, value in items for deeper in paths(value, (*path, str(key)))]
    yield from below or ([path] if path else [])
