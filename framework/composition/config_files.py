"""The config files of an experiment: what they may contain, and how they choose parts.

Hydra imports what a config names in Hydra's own settings (callbacks, logging classes, `_target_`)
and sets environment variables. Each file is therefore checked when Hydra reads it: it may choose
parts and set their settings, and little else.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from framework.errors import ConfigError, Facts, Problem, RunError
from framework.errors.paths import shorter
from framework.registry.registry import Registry
from framework.system.files import read_bytes

from . import hydra_internals
from .sections import HYDRA_PLUGINS, plugin_settings
from .sources import (
    KEY_VALUE_LINES,
    File,
    line_of,
    line_with,
    own_name,
    read_config_file,
    unreadable,
)
from .spec import IMPORTS, NO_IMPORTS

FOREIGN_SETTINGS = {
    "launcher": ("n_jobs",),
    "sweeper": ("n_trials", "n_jobs", "direction", "study_name"),
}
"""Settings of Hydra's joblib launcher and Optuna sweeper that a config file may also contain."""
NO_HYDRA_SETTINGS = (
    "a config file cannot change this setting of Hydra; give it on the command line "
    "if it has an effect there"
)


class FileConfigSource(hydra_internals.FileConfigSource):
    """Reads config files like Hydra's class, checks each one, and remembers which were read.

    It has the same name as the class that it replaces: see `replaced_file_source`.
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
            # an experiment file sets any key, also without Hydra's header
            result.header["package"] = "_global_"
        package = config_package(config_path, result.header["package"])
        content: Any = OmegaConf.to_container(result.config, resolve=False)
        problems = list(check_file(file, config_path, package, content))
        if problems:
            raise ConfigError(problems)
        package = package.removeprefix("_global_").strip(".")
        if (file, package) not in self.read:
            self.read.append((file, package))
        if not package and isinstance(result.config, DictConfig):
            result.config = OmegaConf.create(expand_choices(content))
        return result


def config_package(config_path: str, header: str | None) -> str:
    """Return the key at which the content of a config file lies in the experiment.

    Args:
        config_path: the file, such as "optimizer/mine".
        header: the package in the file's header, such as "_global_"; None without a header.
    """
    group, _, name = config_path.rpartition("/")
    package = header or "_group_"
    return package.replace("_group_", group.replace("/", ".")).replace("_name_", name)


@contextmanager
def checked_files() -> Iterator[list[File]]:
    """Check the config files that Hydra reads. Yields the list of files read so far."""
    FileConfigSource.read = []
    with hydra_internals.replaced_file_source(FileConfigSource):
        yield FileConfigSource.read


# checks


def check_file(file: Path, config_path: str, package: str, content: Any) -> Iterator[str]:
    """Yield the problems of a config file, each with its line.

    Args:
        config_path: its name for Hydra, such as "experiment/spam".
        package: the key at which its content lies in the experiment.
        content: the parsed content.
    """
    if not isinstance(content, Mapping):
        yield f"{shorter(file)}: {KEY_VALUE_LINES}"
        return
    group, _, name = config_path.rpartition("/")
    registry = Registry.by_key().get(group)
    if registry is not None and name in registry:
        kind = registry.kind.name
        yield f"{shorter(file)}: {name!r} is a registered {kind}; give the file another name"
    if config_path.split("/")[0] == "hydra" or "hydra" in package.split("."):
        yield f"{shorter(file)}: {NO_HYDRA_SETTINGS}"
    yield from check_defaults(file, content.get("defaults"))
    yield from check_lists(file, content)
    yield from check_keys(file, content)


def check_defaults(file: Path, defaults: Any) -> Iterator[str]:
    """Yield the entries of a defaults list that would change Hydra itself."""
    if not isinstance(defaults, list):
        return
    for entry in defaults:
        text = str(entry)
        value = None
        if isinstance(entry, Mapping) and entry:
            text, value = next(iter(entry.items()))
        if changes_hydra(str(text), value):
            yield f"{shorter(file)}:{line_with(file, str(text))}: {text}: {NO_HYDRA_SETTINGS}"


def changes_hydra(key: str, value: Any) -> bool:
    """Return whether an entry of a defaults list changes Hydra other than by a sweeper or launcher.

    Args:
        key: such as "override /hydra/launcher", or "optimizer@_global_.hydra".
        value: the option; None for an entry without one.
    """
    group, _, package = re.sub(r"^((override|optional)\s+)+", "", key).partition("@")
    group = group.lstrip("/")
    for_sweeps = group in ("hydra/launcher", "hydra/sweeper")
    if for_sweeps and not package and str(value).isidentifier():
        return False
    if "$" in package or "_name_" in package:  # may become hydra
        return True
    return mentions_hydra(package) or mentions_hydra(group.split("/")[0])


def check_lists(file: Path, content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the items of lists of parts that are neither a name nor settings with a name."""
    for key, registry in Registry.by_key().items():
        parts = content.get(key)
        if registry.kind.many and isinstance(parts, list):
            items = without_name(parts)
            if items:
                place = f"{shorter(file)}:{line_of(file, (key,))}"
                expected = "a name or {name: ..., ...}"
                message = f"{place}: {key}: expected {expected}, got {items[0]}"
                yield Problem(message, Facts(key, items[0], expected, place))


def check_keys(file: Path, content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys that would import code or change Hydra itself."""
    hydra_paths: dict[tuple[str, ...], None] = {}
    for path in leaf_keys(content):
        if IMPORTS & set(path):
            place = f"{shorter(file)}:{line_of(file, path)}"
            key = ".".join(path)
            yield Problem(f"{key}: {NO_IMPORTS} ({place})", Facts(key, source=place))
        if path[0] == "hydra" and not is_for_sweeps(path):
            hydra_paths[path[:2]] = None
    for path in hydra_paths:
        place = f"{shorter(file)}:{line_of(file, path)}"
        key = ".".join(path)
        yield Problem(f"{key}: {NO_HYDRA_SETTINGS} ({place})", Facts(key, source=place))


def is_for_sweeps(path: Sequence[str]) -> bool:
    """Return whether a config file may contain a path below the key `hydra`.

    It may contain settings of sweepers and launchers: ("hydra", "sweeper", "n_trials").
    """
    group, setting = (*path, "", "")[1:3]
    if group not in FOREIGN_SETTINGS or setting not in settings_in_files(group):
        return False
    return not mentions_hydra(".".join(path[3:]))


def settings_in_files(group: str) -> set[str]:
    """Return the settings of sweepers, or of launchers, that a config file may contain."""
    found = set(FOREIGN_SETTINGS[group])
    for plugin in HYDRA_PLUGINS.values():
        if plugin.group == group and plugin.in_files:
            found |= plugin_settings(plugin).keys()
    return found


def mentions_hydra(text: str) -> bool:
    """Return whether a text contains the word "hydra"."""
    return "hydra" in re.split(r"\W+", text)


def without_name(parts: Iterable[Any]) -> list[Any]:
    """Return the items of a list of parts that have no name."""
    found = []
    for part in parts:
        name = part.get("name") if isinstance(part, Mapping) else part
        if not isinstance(name, str):
            found.append(part)
    return found


def leaf_keys(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every leaf of a tree; an empty mapping or list is a leaf."""
    items: list[tuple[Any, Any]] = []
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    for key, value in items:
        yield from leaf_keys(value, (*path, str(key)))
    if path and not items:
        yield path


# choices of parts


def expand_choices(content: dict[str, Any]) -> dict[str, Any]:
    """Move the choices of parts in a config file to its defaults list.

    Before:

        optimizer: {name: sgd, lr: 0.1}
        metrics: [f1, {name: top_k, k: 3}]
        seed: 1

    After:

        defaults: [_self_, {override /optimizer: sgd}, {override /metrics: [f1, top_k]}]
        optimizer: {lr: 0.1}
        metrics: {top_k: {k: 3}}
        seed: 1

    Hydra replaces the options of the defaults list, with all their settings, when the command line
    or another file chooses other parts.
    """
    defaults = list(content.get("defaults") or ())
    in_defaults: set[str] = set()
    for entry in defaults:
        if isinstance(entry, Mapping):
            in_defaults.update(str(key).split("/")[-1] for key in entry)
    rest = dict(content)
    choices: list[dict[str, Any]] = []
    for key, registry in Registry.by_key().items():
        if key not in rest or key in in_defaults:
            continue
        choice = split_choice(rest[key], registry)
        if choice is None:
            continue
        names, settings = choice
        choices.append({f"override /{key}": names})
        del rest[key]
        if settings:
            rest[key] = settings
    if not choices:
        return content
    if "_self_" not in defaults:
        defaults.insert(first_override(defaults), "_self_")
    rest["defaults"] = [*defaults, *choices]
    return rest


def split_choice(value: Any, registry: Registry) -> tuple[Any, dict[str, Any]] | None:
    """Split the value of a config key into the names of the chosen parts and their settings.

    `{name: sgd, lr: 0.1}` becomes `sgd` and `{lr: 0.1}`. Returns None if the value chooses no part.
    """
    if registry.kind.many:
        return split_list(value, registry)
    if not isinstance(value, Mapping):
        return value, {}
    if "name" not in value:
        return None
    settings = dict(value)
    name = settings.pop("name")
    return name, settings


def split_list(value: Any, registry: Registry) -> tuple[list[str], dict[str, Any]] | None:
    """Split the parts of a list into their names and, by name, their settings.

    `[f1, {name: top_k, k: 3}]` becomes `[f1, top_k]` and `{top_k: {k: 3}}`. Returns None for a
    mapping, which gives parts settings without choosing them.
    """
    if not isinstance(value, list) or without_name(value):
        return None
    names = []
    settings = {}
    for part in value:
        name = own_name(part, registry)
        names.append(name)
        if isinstance(part, Mapping) and len(part) > 1:
            settings[name] = {key: item for key, item in part.items() if key != "name"}
    return names, settings


def first_override(defaults: Sequence[Any]) -> int:
    """Return the index of the first override in a defaults list, or its length."""
    for index, entry in enumerate(defaults):
        if "override " in str(entry):
            return index
    return len(defaults)


# for completion


def experiments_in(folders: Iterable[Path]) -> list[str]:
    """Return the names for `experiment=NAME`."""
    names: set[str] = set()
    for folder in folders:
        names.update(file.stem for file in (folder / "experiment").glob("*.yaml"))
    return sorted(names)


def describe_experiments(folders: Iterable[Path]) -> Iterator[dict[str, str]]:
    """Yield name, summary and folder of each experiment, sorted by name.

    The summary is the first line of the comment at the beginning of the file, "" without one. Of
    files with one name the first one counts, as in a composition.
    """
    files: dict[str, Path] = {}
    for folder in folders:
        for file in (folder / "experiment").glob("*.yaml"):
            files.setdefault(file.stem, file)
    for name in sorted(files):
        summary = ""
        with suppress(OSError, RunError, UnicodeDecodeError):
            content = read_bytes(files[name].parent, files[name].name).decode()
            first = content.partition("\n")[0]
            if first.startswith("#"):
                summary = first.lstrip("# ").rstrip()
        yield {"name": name, "summary": summary, "folder": str(files[name].parent)}


def chosen_in(folders: Iterable[Path]) -> dict[str, Any]:
    """Return the choices in the defaults lists of the main config files.

    For example {"optimizer": "adamw", "metrics": ["accuracy"]}.
    """
    chosen: dict[str, Any] = {}
    for folder in folders:
        file = folder / "config.yaml"
        entries = (read_config_file(file).get("defaults") or ()) if file.is_file() else ()
        for entry in entries:
            if isinstance(entry, Mapping):
                for key, value in entry.items():
                    chosen[str(key).removeprefix("override ").lstrip("/")] = value
    return {key: value for key, value in chosen.items() if value}
