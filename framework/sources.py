"""The config files of an experiment: where they are found, what may stand in one, and in which line a value was written.

Hydra would import what a config names in its own settings (callbacks, logging classes, `_target_`) and set environment
variables. So each file is checked when Hydra reads it: it may choose parts and set their settings, and little else.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from .errors import ConfigError
from .registry import Registry
from .spec import IMPORTS, TARGET

SWEEPER = ("params", "max_batch_size", "n_trials", "n_jobs", "direction", "study_name")
HYDRA_KEYS = (("hydra", "launcher", "n_jobs"), *(("hydra", "sweeper", key) for key in SWEEPER))
"""What a config file may say to Hydra itself; the rest is for the command line."""

File = tuple[Path, str]
"""A config file and the package, such as "optimizer" or "", at which its content lies in the experiment."""


class ConfigFolders(SearchPathPlugin):
    """Makes Hydra look in several folders, the last first."""

    folders: ClassVar[list[Path]] = []

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in self.folders:
            search_path.prepend("framework", f"file://{folder}")


class CheckedFiles(FileConfigSource):
    """Reads config files as Hydra does, checks each, and remembers which were read."""

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
        package = (result.header["package"] or group.replace("/", ".")).replace("_group_", group.replace("/", "."))
        content = OmegaConf.to_container(result.config, resolve=False)
        problems = list(check_file(file, config_path, package, content if isinstance(content, dict) else {}))
        if problems:
            raise ConfigError(problems)
        if (file, package) not in self.read:
            self.read.append((file, package.removeprefix("_global_").strip(".")))
        return result


@contextmanager
def searching(folders: Iterable[Path]) -> Iterator[list[File]]:
    """Let Hydra read checked config files from these folders, the last first; yields the list of those read."""
    Plugins.instance().register(ConfigFolders)
    types = SourcesRegistry.instance().types
    before = types["file"]
    types["file"], ConfigFolders.folders, CheckedFiles.read = CheckedFiles, list(folders), []
    try:
        yield CheckedFiles.read
    finally:
        types["file"], ConfigFolders.folders = before, []


def check_file(file: Path, config_path: str, package: str, content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what may not stand in a config file, with its line."""
    group, _, name = config_path.rpartition("/")
    kinds = {registry.kind.key: registry for registry in Registry.every.values()}
    if group in kinds and name in kinds[group]:
        yield f"{shorter(file)}: {name!r} is a registered {kinds[group].kind.name}: give the file another name"
    if "hydra" in (config_path.split("/")[0], *package.split(".")):
        yield f"{shorter(file)}: Hydra's own settings are not read from a config folder: give them on the command line"
    for entry in content.get("defaults") or ():
        yield from (f"{shorter(file)}:{line_with(file, text)}: {said}" for text, said in check_entry(entry))
    for path in paths(content):
        key = ".".join(path)
        if IMPORTS & set(path):
            yield f"{key} {TARGET} ({shorter(file)}:{line_of(file, path)})"
        elif path[0] == "hydra" and not (path[:3] in HYDRA_KEYS and not says_hydra(".".join(path[3:]))):
            yield f"{key}: is Hydra's own: give it on the command line ({shorter(file)}:{line_of(file, path)})"


def check_entry(entry: Any) -> Iterator[tuple[str, str]]:
    """Yield the text and the fault of an entry of a defaults list that would change Hydra itself."""
    (key, value), *_ = entry.items() if isinstance(entry, Mapping) and entry else [(entry, None)]
    group, _, package = str(key).split()[-1].partition("@") if str(key).strip() else ("", "", "")
    plugin = group.lstrip("/") in ("hydra/launcher", "hydra/sweeper") and not package and str(value).isidentifier()
    if not plugin and (says_hydra(group.lstrip("/").split("/")[0]) or says_hydra(package) or "$" in package):
        yield str(key), "Hydra's own settings are not for a config file: give them on the command line"


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
        if any(path == key or path.startswith(f"{key}.") or key.startswith(f"{path}.") for key in self.typed):
            return "command line"
        for file, package in reversed(self.files):
            if f"{path}.".startswith(f"{package}." if package else ""):
                line = line_of(file, path.removeprefix(package).strip(".").split("."))
                if line is not None:
                    return f"{shorter(file)}:{line}"
        return ""


def line_of(file: Path, keys: Iterable[str]) -> int | None:
    """Return the line of a YAML file where a nested key, or item of a list, stands, or None."""
    try:
        node: Any = yaml.compose(file.read_text(), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    line = None
    for key in keys:
        if isinstance(node, yaml.SequenceNode) and key.isdigit() and int(key) < len(node.value):
            node = node.value[int(key)]
            line = node.start_mark.line + 1
            continue
        pair = next((p for p in getattr(node, "value", ()) if is_key(p, key)), None)
        if pair is None:
            return None
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


def is_key(pair: Any, key: str) -> bool:
    return isinstance(pair, tuple) and pair[0].value == key


def line_with(file: Path, text: str) -> int:
    """Return the first line of a file that holds a text; 1 when none does."""
    lines = file.read_text().splitlines()
    return next((number for number, line in enumerate(lines, 1) if text in line), 1)


def unreadable(file: Path, error: Exception) -> str:
    """Say in which line a YAML file cannot be read, and why."""
    mark = getattr(error, "problem_mark", None)
    place = f"{shorter(file)}:{mark.line + 1}" if mark is not None else shorter(file)
    why = getattr(error, "problem", None) or getattr(error, "strerror", None) or str(error).splitlines()[0]
    return f"{place}: cannot be read as YAML: {why}"


def shorter(file: Path) -> str:
    """Return the path as from the working folder, when it is below it."""
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
