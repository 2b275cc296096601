"""Where a value of an experiment was written: on the command line or in a config file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from framework.errors import ConfigError
from framework.errors.paths import shorter
from framework.registry.registry import Registry
from framework.system.files import check_yaml

from .override_syntax import override_paths

COMMAND_LINE = "command line"
KEY_VALUE_LINES = "expected lines of the form `key: value`"
File = tuple[Path, str]
"""A config file and its package: the key, such as "optimizer" or "", at which its content lies."""


@dataclass
class Sources:
    """Finds where the value at a path such as "optimizer.lr" was written.

    Attributes:
        typed: by path, the overrides of the command line.
        files: the config files, in the order in which they were read.
        fallback: the place of a path that is in none of them.
        refused: the paths of parts that were chosen by an unknown name.
        chosen: further paths whose values were chosen for this job: those of a sweep or search.
    """

    typed: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[File] = ()
    fallback: str = ""
    refused: Sequence[str] = ()
    chosen: Sequence[str] = ()

    def __call__(self, path: str) -> str:
        """Return "command line", "conf/experiment/spam.yaml:7", or the fallback for a default."""
        above = []  # overrides of the part or section that the path lies in
        for key, text in self.typed.items():
            if key == path or key.startswith(f"{path}."):
                return COMMAND_LINE
            if path.startswith(f"{key}."):
                above.append(text)
        if any("{" in text for text in above):  # they give settings, not only the part's name
            return COMMAND_LINE
        for file, package in reversed(in_merge_order(self.files)):
            if package and not f"{path}.".startswith(f"{package}."):
                continue
            keys = path.removeprefix(package).strip(".").split(".")
            line = line_of(file, keys)
            if line is not None:
                return f"{shorter(file)}:{line}"
        return COMMAND_LINE if above else self.fallback

    def unused_settings(self, tree: Mapping[str, Any]) -> dict[str, set[str]]:
        """Find the settings in the tree that belong to parts which are not chosen.

        | config file                             | command line           | unused     |
        |-----------------------------------------|------------------------|------------|
        | `optimizer: {name: sgd, momentum: 0.9}` | `optimizer=adamw`      | `momentum` |
        | `callbacks: [{name: ema, decay: 0.5}]`  | `callbacks=[progress]` | `ema`      |

        Hydra merges such settings into the tree, since it does not know the parts.

        Args:
            tree: the composed experiment.

        Returns:
            By config key, the names to remove from `tree[key]`.
        """
        contents = [read_config_file(file) for file, package in self.files if not package]
        paths = list(self.chosen)
        for text in self.typed.values():
            paths += override_paths(text)
        chosen = {tuple(path.split(".")[:2]) for path in paths}
        unused: dict[str, set[str]] = {}
        for key, registry in Registry.by_key().items():
            composed = tree.get(key)
            if not isinstance(composed, Mapping):
                continue
            written = [content[key] for content in contents if key in content]
            if registry.kind.many:
                names = parts_not_chosen(composed, written, registry)
            else:
                names = settings_of_others(composed, written)
            unused[key] = {name for name in names if (key, name) not in chosen}
        return unused


def settings_of_others(composed: Mapping[str, Any], written: Iterable[Any]) -> set[str]:
    """Return the settings that files give only together with the name of another part.

    Args:
        composed: the settings of a part in the composed experiment, with its name.
        written: the values of the key in the config files.
    """
    chosen = composed.get("name")
    own: set[str] = {"name"}
    others: set[str] = set()
    for settings in written:
        if not isinstance(settings, Mapping):
            continue
        if settings.get("name", chosen) == chosen:
            own.update(settings)
        else:
            others.update(settings)
    return others - own


def parts_not_chosen(
    composed: Mapping[str, Any], written: Iterable[Any], registry: Registry
) -> set[str]:
    """Return the parts that files name in a list which another choice has replaced.

    Args:
        composed: the parts of one kind in the composed experiment, by name.
        written: the values of the key in the config files.
        registry: the parts of this kind.
    """
    listed: set[str] = set()
    chosen: set[str] = set()
    for parts in written:
        if isinstance(parts, list):
            listed.update(own_name(part, registry) for part in parts)
        elif isinstance(parts, Mapping):
            chosen.update(parts)
    for name, settings in composed.items():
        # the content of the chosen config group option
        if isinstance(settings, Mapping) and "name" in settings:
            chosen.add(name)
    return listed - chosen


def in_merge_order(files: Sequence[File]) -> list[File]:
    """Return config files in the order in which Hydra merges them; the last one counts.

    Hydra reads an experiment before the experiments that its defaults list names, and merges it
    after them, unless `_self_` stands before them.
    """
    return merge_order(tuple((file, package, changed_at(file)) for file, package in files))


def changed_at(file: Path) -> int:
    """Return the time of the last change of a file in nanoseconds; 0 if there is no file."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=16)
def merge_order(files: tuple[tuple[Path, str, int], ...]) -> list[File]:
    """Return `in_merge_order` of files with the time of their last change."""
    ordered: list[File] = []
    main: list[File] = []
    experiments: dict[str, File] = {}
    for file, package, _ in files:
        each = (file, package)
        if not package and file.parent.name == "experiment":
            experiments[file.stem] = each
        elif not package and file.name == "config.yaml":
            main.append(each)
        else:
            ordered.append(each)
    merged: list[File] = []
    placed: set[str] = set()
    for name in experiments:
        place_file(name, experiments, placed, merged)
    if main and builds_on_framework(main[0][0]):
        merged = [(framework_config_file(), ""), *merged]  # its last entry is the experiment
        first = is_merged_first(main[0][0], "framework")
    else:
        first = bool(main) and is_merged_first(main[0][0], "experiment")
    return [*ordered, *main, *merged] if first else [*ordered, *merged, *main]


def builds_on_framework(file: Path) -> bool:
    """Return whether the defaults list of a project's config.yaml names that of the framework."""
    return "framework" in (read_config_file(file).get("defaults") or ())


def framework_config_file() -> Path:
    """Return the config.yaml of the framework."""
    import framework_conf  # not at the top: it holds data only

    return Path(framework_conf.__path__[0]) / "config.yaml"


def place_file(name: str, files: Mapping[str, File], placed: set[str], ordered: list[File]) -> None:
    """Append an experiment and those that it builds on in the order in which they are merged."""
    if name in placed or name not in files:
        return
    placed.add(name)
    file = files[name][0]
    defaults = read_config_file(file).get("defaults") or ()
    bases = [entry for entry in defaults if isinstance(entry, str) and entry != "_self_"]
    before = [base for base in bases if not is_merged_first(file, base)]
    for base in before:
        place_file(base, files, placed, ordered)
    ordered.append(files[name])
    for base in bases:
        place_file(base, files, placed, ordered)


def is_merged_first(file: Path, key: str) -> bool:
    """Return whether `_self_` stands before an entry of the defaults list of a file."""
    for entry in read_config_file(file).get("defaults") or ():
        if entry == "_self_":
            return True
        if entry == key or (isinstance(entry, Mapping) and key in entry):
            return False
    return False


def line_of(file: Path, keys: Iterable[str]) -> int | None:
    """Return the line of a nested key or list item in a YAML file, or None."""
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
        for key_node, value_node in pairs:
            if key_node.value == key:
                line = key_node.start_mark.line + 1
                node = value_node
                break
        else:
            return None
    return line


def line_with(file: Path, text: str) -> int:
    """Return the first line of a file that contains a text; 1 if no line does."""
    lines = file.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if text in line:
            return number
    return 1


def read_config_file(file: Path) -> dict[str, Any]:
    """Return the content of a YAML file.

    Raises:
        ConfigError: the file cannot be read, or is not a mapping; with the line of a syntax error.
    """
    try:
        text = file.read_text(encoding="utf-8")
        check_yaml(yaml.parse(text, Loader=yaml.SafeLoader), file)
        content = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError([unreadable(file, error)]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{shorter(file)}: {KEY_VALUE_LINES}"])
    return content


def unreadable(file: Path, error: Exception) -> str:
    """Return why a YAML file cannot be read, and in which line."""
    mark = getattr(error, "problem_mark", None)
    place = shorter(file) if mark is None else f"{shorter(file)}:{mark.line + 1}"
    reason = getattr(error, "problem", None) or getattr(error, "strerror", None)
    if not reason:
        reason = str(error).splitlines()[0]
    return f"{place}: cannot be read as YAML: {reason}"


def own_name(part: Any, registry: Registry) -> str:
    """Return the name of a list item, `ema` or `{name: ema, ...}`; an alias becomes the name."""
    name = str(part["name"] if isinstance(part, Mapping) else part)
    return registry.get(name).name if name in registry else name
