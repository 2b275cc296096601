"""What a person typed, turned into overrides that Hydra takes without complaint; the checking is ours, all at once.

optimizer=sgd                    a group: as it is, when the name exists
optimizer.lr=0.1                 ++optimizer.lr=0.1, so that a key that no part knows reaches our own check
model.activation=gelu            a part in a part: its name, which settings may follow
model/activation=gelu            the same
+callbacks=early_stop            also/callbacks=early_stop: one more in the list
~callbacks=progress              ~callbacks.progress: one less
scheduler=null, ~scheduler       an option without content
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from .errors import did_you_mean
from .registry import Registry, with_article
from .spec import IMPORTS, TARGET
from .store import ALSO, NONE

FORM = "should be KEY=VALUE"
QUOTE = "quote a value with spaces, commas, brackets or =, and then the whole: 'key=\"a, b\"'"


@dataclass
class Overrides:
    """The arguments for Hydra, what is wrong with what was typed, which keys were typed, and which of them sweep."""

    arguments: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    typed: dict[str, str] = field(default_factory=dict)
    swept: list[str] = field(default_factory=list)


def rewrite(typed: Iterable[str], folders: Iterable[Path], multirun: bool = False) -> Overrides:
    """Rewrite the overrides of a command line; `folders` hold config files of the user's and ours.

    A part comes before its settings, whatever the order in which they were typed.
    """
    found, parser, folders = Overrides(), OverridesParser.create(), list(folders)
    nested: list[tuple[int, str]] = []
    for text in map(quoted, typed):
        try:
            override = parser.parse_override(text)
        except HydraException:
            found.problems.append(f"{text}: {unreadable(text)} (command line)")
            continue
        key = override.key_or_group
        found.typed[key.replace("/", ".")] = text
        found.swept += [key.replace("/", ".")] if override.is_sweep_override() else []
        problems = faults(text, override, folders, multirun)
        found.problems += [f"{text}: {problem} (command line)" for problem in problems]
        if not problems:
            nested += [(key.count("/") + key.count("."), each) for each in rewritten(override, text)]
    found.arguments = [text for _, text in sorted(nested, key=lambda pair: pair[0])]
    return found


groups = Registry.by_key


HOME = re.compile(r"(?<=[=,\[(: ])~[^\s,=()\[\]{}:'\"]*")  # ~/data.csv, alone or in a list


def quoted(text: str) -> str:
    """Quote what Hydra's grammar cannot read: paths such as ~/data.csv, rules of sweep.where."""
    key, _, value = text.partition("=")
    if key != "sweep.where" and "~" in value and not set(value) & {"'", '"'}:
        return HOME.sub(lambda path: single(path[0]), text)
    if key != "sweep.where" or not value or value[0] in "'\"":
        return text
    if value[0] == "[" and value[-1] == "]":
        return f"{key}=[{','.join(single(rule) for rule in value[1:-1].split(','))}]"
    return f"{key}={single(value)}"


def single(text: str) -> str:
    return text if text[:1] in ("'", '"') else "'" + text.strip().replace("'", "\\'") + "'"


def unreadable(text: str) -> str:
    """Say why an override cannot be parsed."""
    word = text.lstrip("+~")
    if re.search(r"=\s*(range|choice|glob|sort|shuffle|tag|interval)\(", text):
        return "cannot be read; sweeps are written a,b,c or range(3) or range(1,10,step=2) or choice(a,b)"
    if "=" in text:
        return f"{FORM}; {QUOTE}"
    if word in (*groups(), "experiment"):
        return f"{FORM}: {word}=NAME"
    meant = [f"{registry.kind.key}={word}" for registry in groups().values() if word in registry]
    return f"{FORM}" + (f": {' or '.join(meant)}" if meant else "")


def faults(text: str, override: Override, folders: list[Path], multirun: bool) -> list[str]:
    """Return what is wrong with an override in itself, whatever the experiment is."""
    key = override.key_or_group
    if not key:
        return [f"{FORM}; the key is missing"]
    if IMPORTS & set(re.split(r"\W+", text)):
        return [TARGET]
    if key.startswith("sweep.") and (not multirun or override.is_sweep_override()):
        return ["is about a whole sweep: " + (f"write {key}=[a,b]" if multirun else "add -m for one, or leave it out")]
    if override.is_sweep_override() and not multirun:
        key, _, value = text.partition("=")
        listed = f"; as one list, write {key}=[{value}]" if "," in value and "(" not in value else ""
        return [f"has several values: add -m to try each{listed}"]
    if override.package is not None:
        return [f"each part has its place: write {key}={text.partition('=')[2]}"]
    if key == "plugins":
        return ["plugins are given with --plugins, or in the project's conf/config.yaml"]
    if key == "hydra.mode":
        return ["a sweep is asked for with -m"]
    if key == "hydra.searchpath":
        return ["config folders are given with --config-dir"]
    if key in groups() or key == "experiment":
        return option_faults(override, folders)
    return []


def option_faults(override: Override, folders: list[Path]) -> list[str]:
    """Say which chosen names a group does not have: of parts the registered ones, and the user's YAML files."""
    key = override.key_or_group
    many = key in groups() and groups()[key].kind.many
    names = chosen_names(override)
    if not override.is_sweep_override() and not override.is_delete():
        value = override.value()
        if isinstance(value, Mapping) or (isinstance(value, list) and not many):
            noun = with_article(groups()[key].kind.name if key in groups() else key)
            more = ", or a list of names" if many else f" (-m {key}=a,b tries each)" if len(names) > 1 else ""
            settings = "" if key == "experiment" else f"; settings follow as {key}{'.NAME' * many}.KEY=VALUE"
            return [f"should be the name of {noun}{more}{settings}"]
    files = {file.stem for folder in folders for file in (folder / key).glob("*.yaml")}
    unknown = [name for name in names if name not in files and not (key in groups() and name in groups()[key])]
    return [no_option(key, name, files, folders) for name in unknown]


def no_option(key: str, name: str, files: Iterable[str], folders: Iterable[Path]) -> str:
    if key in groups():
        return groups()[key].unknown(name)
    if list(files):
        return f"there is no experiment {name!r}; {did_you_mean(name, files)}"
    looked = ", ".join(str(folder / "experiment") for folder in folders)
    return f"there is no experiment {name!r}: no {name}.yaml in {looked} (--config-dir adds a folder)"


def chosen_names(override: Override) -> list[str]:
    """The names in `optimizer=sgd`, in a list of them, or in a sweep over either."""
    if override.is_delete():
        return []
    if override.is_sweep_override():
        if isinstance(override.value(), Glob):
            return []  # glob(ada*): Hydra matches it with what there is
        values = [re.sub(r"[\[\]'\"\s]", "", each) for each in override.sweep_string_iterator()]
        return [name for each in values for name in each.split(",") if name != "null"]
    value = override.value()
    return [str(name) for name in (value if isinstance(value, list) else [value]) if name is not None]


def rewritten(override: Override, text: str) -> list[str]:
    """Return what Hydra gets for an override that has no fault in itself."""
    key, value = override.key_or_group, text.partition("=")[2]
    if key.split(".")[0].split("/")[0] == "hydra":
        return [text]
    if key not in groups() and key != "experiment":
        return [text] if override.is_delete() else value_overrides(override, key.replace("/", "."), value)
    many = key in groups() and groups()[key].kind.many
    if override.is_sweep_override() and not many and "null" in re.split(r"\W", value):
        value = re.sub(r"\bnull\b", NONE, value)
        return [f"{key}={value}"]
    if override.is_delete() and many and value:
        return [f"~{key}.{value}"]
    if override.is_delete() or value in ("null", ""):
        return [f"{key}=[]"] if many else [] if key == "experiment" else [f"{key}={NONE}"]
    return [f"{ALSO}/{key}={value}"] if override.is_add() and many else [f"{key}={value}"]


def value_overrides(override: Override, key: str, value: str) -> list[str]:
    """Return the override of a value so that Hydra sets it whether or not the key is there yet."""
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


def as_typed(override: str) -> str:
    """Return an override of a job of a sweep as a person would have typed it."""
    key, _, value = override.lstrip("+").partition("=")
    mark = "+" if key.startswith(f"{ALSO}/") else ""
    if key.endswith(".name") and key.split(".")[-2] in part_settings():
        key = key.removesuffix(".name")
    key = key.removeprefix(f"{ALSO}/")
    value = "null" if value == NONE else re.sub(r"\\(?=[{}])", "", value)  # Hydra writes $\{seed\}
    return f"{mark}{key}={value}"


def own_settings(overrides: Iterable[str], all_typed: Overrides) -> dict[str, Any]:
    """Return what a job of a sweep has of its own, by key as typed: all but what was typed with a single value."""
    shared = all_typed.typed.keys() - set(all_typed.swept)
    found: dict[str, Any] = {}
    for text in overrides:
        key = as_typed(text).lstrip("+").partition("=")[0].replace("/", ".")
        if not text.startswith("~") and key not in shared:
            value = value_of(text)
            found[key] = None if value == NONE else value
    order = {key: number for number, key in enumerate(all_typed.swept)}  # they come sorted by depth
    return dict(sorted(found.items(), key=lambda pair: order.get(pair[0], len(order))))


@cache
def value_of(override: str) -> Any:
    """Return the value in an override: a number, a text, a list ..."""
    return OverridesParser.create().parse_override(override).value()
