"""Where a value of an experiment was written: on the command line, or in which line of a config file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from framework.errors import ConfigError
from framework.errors.paths import shorter
from framework.registry.registry import Registry
from framework.system.files import check_yaml

COMMAND_LINE = "command line"
File = tuple[Path, str]
"""A config file and the package, such as "optimizer" or "", at which its content lies in the experiment."""


@dataclass
class Sources:
    """Looks a path such as "optimizer.lr" up in what was typed, then in the config files, the last first.

    Attributes:
        typed: the overrides of the command line, by path.
        files: in the order in which they were read.
        fallback: what is said of a path that is in none of them.
    """

    typed: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[File] = ()
    fallback: str = ""

    def __call__(self, path: str) -> str:
        """Return "command line", "conf/experiment/spam.yaml:7", or the fallback for a default."""
        if any(path == key or key.startswith(f"{path}.") for key in self.typed):
            return COMMAND_LINE
        above = {key: text for key, text in self.typed.items() if path.startswith(f"{key}.")}
        if any(
            "{" in text for text in above.values()
        ):  # the settings themselves; otherwise only whose they are
            return COMMAND_LINE
        for file, package in reversed(self.files):
            if f"{path}.".startswith(f"{package}." if package else ""):
                line = line_of(file, path.removeprefix(package).strip(".").split("."))
                if line is not None:
                    return f"{shorter(file)}:{line}"
        return COMMAND_LINE if above else self.fallback

    def of_others(self, tree: Mapping[str, Any]) -> dict[str, set[str]]:
        """Return by key the settings that files give beside the name of another part than the one in the tree, and
        the parts that they give settings in a list that is not the one chosen.

        `optimizer: {name: sgd, momentum: 0.9}` in an experiment says nothing of adamw, when that is chosen instead.
        """
        contents = [read_yaml(file) for file, package in self.files if not package]
        typed = {tuple(key.split(".")[:2]) for key in self.typed}
        found: dict[str, set[str]] = {}
        for key in [
            registry.kind.key for registry in Registry.every.values() if not registry.kind.many
        ]:
            chosen = tree.get(key)
            given = [content[key] for content in contents if isinstance(content.get(key), Mapping)]
            if isinstance(chosen, Mapping) and given:
                others = [
                    each
                    for each in given
                    if each.get("name", chosen.get("name")) != chosen.get("name")
                ]
                own = {name for each in given if each not in others for name in each}
                found[key] = (
                    {name for each in others for name in each if (key, name) not in typed}
                    - own
                    - {"name"}
                )
        for registry in [registry for registry in Registry.every.values() if registry.kind.many]:
            key, parts = registry.kind.key, tree.get(registry.kind.key)
            if isinstance(parts, Mapping):
                given = [content.get(key) for content in contents]
                listed = {
                    own_name(part, registry)
                    for each in given
                    if isinstance(each, list)
                    for part in each
                }
                added = {name for each in given if isinstance(each, Mapping) for name in each}
                added |= {
                    name for name, settings in parts.items() if "name" in (settings or ())
                }  # they are chosen
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
    why = (
        getattr(error, "problem", None)
        or getattr(error, "strerror", None)
        or str(error).splitlines()[0]
    )
    return f"{place}: cannot be read as YAML: {why}"


def own_name(part: Any, registry: Registry) -> str:
    """Return the name of a part of a list, its own where that is an alias."""
    name = str(part["name"] if isinstance(part, Mapping) else part)
    return registry.get(name).name if name in registry else name
