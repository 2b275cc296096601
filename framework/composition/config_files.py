"""The config files of an experiment: where they are found, what may stand in them, and in which line a value is.

Hydra would import what a config names in its own settings (callbacks, logging classes, `_target_`) and set environment
variables. So each file is checked when Hydra reads it: it may choose parts and set their settings, and little else.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from framework.errors import ConfigError
from framework.errors.paths import shorter
from framework.registry.registry import Registry
from framework.system.files import check_yaml

from .spec import COMMAND_LINE, IMPORTS, TARGET

SWEEPER: tuple[str, ...] = ("params", "max_batch_size", "n_trials", "n_jobs", "direction", "study_name", "trials")
SWEEPER += ("sampler", "seed", "pruner", "warmup", "parallel", "startup", "patience", "timeout", "target")
HYDRA_KEYS = (("hydra", "launcher", "n_jobs"), *(("hydra", "sweeper", key) for key in SWEEPER))
"""What a config file may say to Hydra itself; the rest is for the command line."""
OWN = "Hydra's own settings are not for a config file: give those that have an effect on the command line"

File = tuple[Path, str]
"""A config file and the package, such as "optimizer" or "", at which its content lies in the experiment."""


class ConfigFolders(SearchPathPlugin):
    """Makes Hydra look in several folders, the last first."""

    folders: ClassVar[list[Path]] = []

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in self.folders:
            search_path.prepend("framework", f"file://{folder}")


class FileConfigSource(file_config_source.FileConfigSource):
    """Reads config files as Hydra does, checks each, and remembers which were read.

    It has the name of the class that it replaces: in a launcher's process Hydra registers that one, and compares names.
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
            result.header["package"] = "_global_"  # an experiment is about the whole, also without Hydra's header
        package = (result.header["package"] or "_group_").replace("_group_", group.replace("/", "."))
        package = package.replace("_name_", config_path.rpartition("/")[2])
        problems = list(check_file(file, config_path, package, OmegaConf.to_container(result.config, resolve=False)))
        if problems:
            raise ConfigError(problems)
        package = package.removeprefix("_global_").strip(".")
        if (file, package) not in self.read:
            self.read.append((file, package))
        if not package and isinstance(result.config, DictConfig):
            content: Any = OmegaConf.to_container(result.config, resolve=False)
            result.config = OmegaConf.create(choose(content))
        return result


@contextmanager
def searching(folders: Iterable[Path]) -> Iterator[list[File]]:
    """Let Hydra read checked config files from these folders, the last first; yields the list of those read."""
    Plugins.instance().register(ConfigFolders)
    types = SourcesRegistry.instance().types
    before = types["file"]
    types["file"], ConfigFolders.folders, FileConfigSource.read = FileConfigSource, list(folders), []
    try:
        yield FileConfigSource.read
    finally:
        types["file"], ConfigFolders.folders = before, []


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
        yield from (f"{shorter(file)}:{line_with(file, text)}: {said}" for text, said in check_entry(entry))
    for key, registry in kinds.items():
        if registry.kind.many and isinstance(content.get(key), list) and (strange := unnamed(content[key])):
            yield f"{shorter(file)}:{line_of(file, (key,))}: {key}: {strange[0]} is no name, nor {{name: ..., ...}}"
    for path in paths(content):
        if IMPORTS & set(path):
            yield f"{'.'.join(path)}: {TARGET} ({shorter(file)}:{line_of(file, path)})"
    foreign = [path for path in paths(content) if path[0] == "hydra" and path[:3] not in HYDRA_KEYS]
    foreign += [path for path in paths(content) if path[:3] in HYDRA_KEYS and says_hydra(".".join(path[3:]))]
    for path in dict.fromkeys(path[:2] for path in foreign):
        yield f"{'.'.join(path)}: {OWN} ({shorter(file)}:{line_of(file, path)})"


def check_entry(entry: Any) -> Iterator[tuple[str, str]]:
    """Yield the text and the fault of an entry of a defaults list that would change Hydra itself."""
    (key, value), *_ = entry.items() if isinstance(entry, Mapping) and entry else [(entry, None)]
    group, _, package = re.sub(r"^((override|optional)\s+)+", "", str(key)).partition("@")
    plugin = group.lstrip("/") in ("hydra/launcher", "hydra/sweeper") and not package and str(value).isidentifier()
    hidden = "$" in package or "_name_" in package  # it could come to say hydra
    if not plugin and (hidden or says_hydra(package) or says_hydra(group.lstrip("/").split("/")[0])):
        yield str(key), f"{key}: {OWN}"


def choose(content: dict[str, Any]) -> dict[str, Any]:
    """Turn `optimizer: sgd`, `optimizer: {name: sgd, lr: 0.1}`, `metrics: [f1, {name: top_k, k: 3}]` into choices.

    In the defaults list the command line can choose otherwise; the settings of what was chosen before do not linger.
    """
    defaults, rest = list(content.get("defaults") or ()), dict(content)
    chosen: list[dict[str, Any]] = []
    listed = {str(key).split("/")[-1] for entry in defaults if isinstance(entry, Mapping) for key in entry}
    for registry in Registry.every.values():
        kind, key, value = registry.kind, registry.kind.key, rest.get(registry.kind.key, {})
        if kind.many:
            if isinstance(value, list) and key not in listed and not unnamed(value):
                parts = [dict(one) if isinstance(one, Mapping) else {"name": one} for one in rest.pop(key)]
                names = [own_name(part.pop("name"), registry) for part in parts]
                chosen.append({f"override /{key}": names})
                settings = {name: part for name, part in zip(names, parts, strict=True) if part}
                rest.update({key: settings} if settings else {})
            continue
        settings = dict(value) if isinstance(value, Mapping) else {"name": value}
        if "name" in settings and key not in listed:
            chosen.append({f"override /{key}": settings.pop("name")})
            rest = {k: v for k, v in rest.items() if k != key} | ({key: settings} if settings else {})
    if chosen and "_self_" not in defaults:
        first_override = next((n for n, entry in enumerate(defaults) if "override " in str(entry)), len(defaults))
        defaults.insert(first_override, "_self_")
    return rest | {"defaults": [*defaults, *chosen]} if chosen else content


def own_name(part: Any, registry: Registry) -> str:
    """Return the name of a part of a list, its own where that is an alias."""
    name = str(part["name"] if isinstance(part, Mapping) else part)
    return registry.get(name).name if name in registry else name


def unnamed(parts: Sequence[Any]) -> list[Any]:
    """Return what in a list of parts is neither a name nor settings with one."""
    return [part for part in parts if not isinstance(part.get("name") if isinstance(part, Mapping) else part, str)]


def experiments_in(folders: Iterable[Path]) -> list[str]:
    """Return the names for `experiment=NAME`."""
    return sorted({file.stem for folder in folders for file in (folder / "experiment").glob("*.yaml")})


def chosen_in(folders: Iterable[Path]) -> dict[str, Any]:
    """Return what the defaults list of the main config chooses: {"optimizer": "adamw", "metrics": ["accuracy"]}."""
    files = [folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()]
    chosen: dict[str, Any] = {}
    for entry in [entry for file in files for entry in read_yaml(file).get("defaults") or ()]:
        if isinstance(entry, Mapping):
            chosen |= {str(key).removeprefix("override ").lstrip("/"): value for key, value in entry.items()}
    return {key: value for key, value in chosen.items() if value}


def says_hydra(text: str) -> bool:
    return "hydra" in re.split(r"\W+", text)


def paths(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every leaf of a tree."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    below = [deeper for key, value in items for deeper in paths(value, (*path, str(key)))]
    yield from below or ([path] if path else [])


class Sources:
    """Looks a path such as "optimizer.lr" up in what was typed, then in the config files, the last first."""

    def __init__(self, typed: Mapping[str, str], files: Iterable[File]):
        self.typed, self.files = dict(typed), list(files)

    def __call__(self, path: str) -> str:
        """Return "command line", "conf/experiment/spam.yaml:7", or "" for a default."""
        if any(path == key or key.startswith(f"{path}.") for key in self.typed):
            return COMMAND_LINE
        above = {key: text for key, text in self.typed.items() if path.startswith(f"{key}.")}
        if any("{" in text for text in above.values()):  # the settings themselves; otherwise only whose they are
            return COMMAND_LINE
        for file, package in reversed(self.files):
            if f"{path}.".startswith(f"{package}." if package else ""):
                line = line_of(file, path.removeprefix(package).strip(".").split("."))
                if line is not None:
                    return f"{shorter(file)}:{line}"
        return COMMAND_LINE if above else ""

    def of_others(self, tree: Mapping[str, Any]) -> dict[str, set[str]]:
        """Return by key the settings that files give beside the name of another part than the one in the tree, and
        the parts that they give settings in a list that is not the one chosen.

        `optimizer: {name: sgd, momentum: 0.9}` in an experiment says nothing of adamw, when that is chosen instead.
        """
        contents = [read_yaml(file) for file, package in self.files if not package]
        typed = {tuple(key.split(".")[:2]) for key in self.typed}
        found: dict[str, set[str]] = {}
        for key in [registry.kind.key for registry in Registry.every.values() if not registry.kind.many]:
            chosen = tree.get(key)
            given = [content[key] for content in contents if isinstance(content.get(key), Mapping)]
            if isinstance(chosen, Mapping) and given:
                others = [each for each in given if each.get("name", chosen.get("name")) != chosen.get("name")]
                own = {name for each in given if each not in others for name in each}
                found[key] = {name for each in others for name in each if (key, name) not in typed} - own - {"name"}
        for registry in [registry for registry in Registry.every.values() if registry.kind.many]:
            key, parts = registry.kind.key, tree.get(registry.kind.key)
            if isinstance(parts, Mapping):
                given = [content.get(key) for content in contents]
                listed = {own_name(part, registry) for each in given if isinstance(each, list) for part in each}
                added = {name for each in given if isinstance(each, Mapping) for name in each}
                added |= {name for name, settings in parts.items() if "name" in (settings or ())}  # they are chosen
                found[key] = {name for name in listed - added if (key, name) not in typed}
        return found


def line_of(file: Path, keys: Iterable[str]) -> int | None:
    """Return the line of a YAML file where a nested key, or item of a list, stands, or None."""
    try:
        node: Any = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    line = None
    for key in keys:
        if isinstance(node, yaml.SequenceNode) and key.isdigit() and int(key) < len(node.value):
            node = node.value[int(key)]
            line = node.start_mark.line + 1
            continue
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        pair = next((pair for pair in pairs if pair[0].value == key), None)
        if pair is None:
            return None
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


def line_with(file: Path, text: str) -> int:
    """Return the first line of a file that holds a text; 1 when none does."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((number for number, line in enumerate(lines, 1) if text in line), 1)


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the content of a YAML file. Raises ConfigError with the line that cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
        check_yaml(yaml.parse(text, Loader=yaml.SafeLoader), file)
        content = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError([unreadable(file, error)]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{shorter(file)}: should hold `key: value` lines"])
    return content


def unreadable(file: Path, error: Exception) -> str:
    """Say in which line a YAML file cannot be read, and why."""
    mark = getattr(error, "problem_mark", None)
    place = f"{shorter(file)}:{mark.line + 1}" if mark is not None else shorter(file)
    why = getattr(error, "problem", None) or getattr(error, "strerror", None) or str(error).splitlines()[0]
    return f"{place}: cannot be read as YAML: {why}"
