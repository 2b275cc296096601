"""What a person typed, turned into overrides that Hydra takes without complaint; the checking is ours, all at once.

    optimizer=sgd                    a group: as it is, when the name exists
    optimizer.lr=0.1                 ++optimizer.lr=0.1, so that a key that no part knows reaches our own check
    model.activation=gelu            a part in a part: its name, which settings may follow
    model/activation=gelu            the same
    +callbacks=early_stop            also/callbacks=early_stop: one more in the list
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import did_you_mean, nearest
from .registry import Registry
from .store import ALSO


@dataclass
class Overrides:
    """The arguments for Hydra, what is wrong with what was typed, and which keys were typed."""

    arguments: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    typed: dict[str, str] = field(default_factory=dict)


def rewrite(typed: Iterable[str], folders: Iterable[Path]) -> Overrides:
    """Rewrite the overrides of a command line; `folders` hold config files of the user's and ours."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found, parser, folders = Overrides(), OverridesParser.create(), list(folders)
    nested: list[tuple[int, str]] = []
    for text in typed:
        try:
            override = parser.parse_override(text)
        except HydraException:
            found.problems.append(f"{text}: cannot be read as KEY=VALUE (quote values with spaces, commas or =)")
            continue
        key = override.key_or_group
        found.typed[key.replace("/", ".")] = text
        if "_target_" in text:
            found.problems.append(f"{text}: `_target_` is refused: a config names registered parts")
        elif key.split(".")[0].split("/")[0] == "hydra":
            found.arguments.append(text)
        elif key in groups() or key == "experiment":
            found.problems += unknown_options(text, override, folders)
            found.arguments.append(group_override(override, text))
        elif override.is_delete():
            found.arguments.append(text)
        else:
            nested += [(key.count("/") + key.count("."), each) for each in value_overrides(override, text)]
    found.arguments += [text for _, text in sorted(nested, key=lambda pair: pair[0])]  # a part before its settings
    if found.problems:  # what Hydra would stumble over is reported with the rest, by us
        bad = {problem.split(": ")[0] for problem in found.problems}
        found.arguments = [a for a in found.arguments if a not in bad and a.replace(f"{ALSO}/", "+") not in bad]
    return found


def groups() -> dict[str, Registry]:
    return {registry.kind.key: registry for registry in Registry.every.values()}


def group_override(override: Any, text: str) -> str:
    key, value = override.key_or_group, text.partition("=")[2]
    if override.is_delete():
        return text
    if override.is_add() and key in groups() and groups()[key].kind.many:
        return f"{ALSO}/{key}={value}"
    return f"{key}={value}"


def unknown_options(text: str, override: Any, folders: Iterable[Path]) -> list[str]:
    """Say which chosen names a group does not have: of parts the registered ones, and the user's YAML files."""
    key = override.key_or_group
    files = {file.stem for folder in folders for file in (folder / key).glob("*.yaml")}
    problems = []
    for name in chosen_names(override):
        if name in files or (key in groups() and name in groups()[key]):
            continue
        if key == "experiment":
            problems.append(f"{text}: there is no experiment {name!r}; {did_you_mean(name, files)}")
        else:
            problems.append(f"{text}: {groups()[key].unknown(name)}")
    return problems


def chosen_names(override: Any) -> list[str]:
    """The names in `optimizer=sgd`, in a list of them, or in a sweep over either."""
    if override.is_delete():
        return []
    if override.is_sweep_override():
        values = [re.sub(r"[\[\]'\"\s]", "", each) for each in override.sweep_string_iterator()]
        return [name for each in values for name in each.split(",") if name]
    value = override.value()
    return [str(name) for name in (value if isinstance(value, list) else [value]) if name not in (None, "null", "")]


def value_overrides(override: Any, text: str) -> list[str]:
    """Return the override of a value so that Hydra sets it whether or not the key is there yet."""
    key, value = override.key_or_group.replace("/", "."), text.partition("=")[2]
    names_part = key.rpartition(".")[2] in part_settings() and "." in key
    if not names_part or value in ("null", "") or value[0] in "{[":
        return [f"++{key}={value}"]
    if override.is_sweep_override():
        return [f"++{key}.name={value}"]
    return [f"++{key}={value}", f"++{key}.name={value}"]


def part_settings() -> set[str]:
    """The names of all settings that name a part."""
    registries = Registry.every.values()
    return {n for registry in registries for e in registry for n, s in e.settings.items() if s.part and not s.many}


def nearest_group(key: str) -> str | None:
    return nearest(key, groups())
