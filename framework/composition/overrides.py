"""What a person typed, turned into overrides that Hydra takes without complaint; the checking is ours, all at once.

optimizer=sgd                    a group: as it is, when the name exists
optimizer={name: sgd, lr: 0.1}   optimizer=sgd ++optimizer={name: sgd, lr: 0.1}
callbacks=[progress,{name: checkpoint, every: 7steps}]   the same for each part of a list
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
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra.errors import HydraException

from framework.errors import did_you_mean, with_article
from framework.errors.paths import quoted_override
from framework.registry.registry import Registry

from .hydra_groups import ALSO, NONE
from .hydra_internals import Glob, Override, parse_override, quoted_text
from .spec import IMPORTS, TARGET

FORM = "should be KEY=VALUE"
FOREIGN_WORD = r"([^\s,\[\]{}():='\"\\]*[^\x00-\x7f][^\s,\[\]{}():='\"\\]*)"
"""A word with letters that Hydra's grammar lacks, such as é."""
QUOTE = "quote a value with spaces, commas, brackets or =, and then the whole: 'key=\"a, b\"'"


@dataclass
class Overrides:
    """The arguments for Hydra, what is wrong with what was typed, which keys were typed, and which of them sweep.

    `notes` are about overrides without effect that do no harm.
    """

    arguments: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    typed: dict[str, str] = field(default_factory=dict)
    swept: list[str] = field(default_factory=list)


def rewrite(
    typed: Iterable[str], folders: Iterable[Path], multirun: bool = False, shows: bool = False
) -> Overrides:
    """Rewrite the overrides of a command line; `folders` hold config files of the user's and ours.

    A part comes before its settings, whatever the order in which they were typed. `shows`: Hydra only prints what is
    composed, so that its own settings have an effect.
    """
    found, folders = Overrides(), list(folders)
    kept: dict[str, Kept] = {}  # by what they are about
    inside: dict[
        str, tuple[str, str]
    ] = {}  # by path: a setting in {name: sgd, lr: 0.1}, and that override
    for text in typed:
        try:
            text, override = parse(text)
        except HydraException:
            found.problems.append(f"{text}: {unreadable(text)} (command line)")
            continue
        group = override.key_or_group
        key = group.replace("/", ".")
        found.typed[key] = text
        if key in found.swept:
            found.swept.remove(key)
        if override.is_sweep_override():
            found.swept.append(key)
        problems = faults(text, override, folders, multirun, shows)
        for problem in problems:
            found.problems.append(f"{text}: {problem} (command line)")
        if problems:
            continue
        if of_hydra(key):
            arguments = [text]
        elif group in groups() or group == "experiment":
            arguments = choice_overrides(override, text)
        else:
            arguments = value_overrides(override, text)
        about = subject(override, text)
        before = kept.pop(about, None)
        if before is not None and before.text != text:
            if about.startswith("+"):
                arguments = join_lists(before.arguments, arguments)
            else:
                found.notes.append(f"{before.text} has no effect: {text} follows it")
        kept[about] = Kept(text, depth(group), arguments)
        value: Any = override.value()
        for name in value if isinstance(value, Mapping) else ():
            inside[f"{about}.{name}"] = (name, text)
    for each in sorted(kept.values(), key=attrgetter("depth")):
        found.arguments += each.arguments
    for path in inside.keys() & found.typed.keys():
        name, text = inside[path]
        found.notes.append(f"{name} in {text} has no effect: {found.typed[path]} follows it")
    return found


@dataclass
class Kept:
    """An override as it was typed, how deep in the experiment its key lies, and what Hydra gets for it."""

    text: str
    depth: int
    arguments: list[str]


def depth(override: str) -> int:
    """Return how deep in the experiment an override's key lies: a part comes before its settings."""
    key = override.partition("=")[0].removeprefix(f"{ALSO}/")
    return key.count("/") + key.count(".")


def parse(text: str) -> tuple[str, Override]:
    """Parse an override, quoted where Hydra's grammar cannot read it otherwise, and return both.

    Paths such as ~/data.csv, the rules of sweep.where and words with letters such as é need quotes.

    Raises HydraException.
    """
    key, equals, value = text.partition("=")
    if key == "sweep.where":
        text = f"{key}{equals}{quoted_rules(value)}"
    elif "~" in value and not set(value) & {"'", '"'}:
        text = HOME.sub(lambda path: single(path[0]), text)
    try:
        return text, parse_override(text)
    except HydraException:
        key, equals, value = text.partition("=")
        with_quotes = re.sub(FOREIGN_WORD, r"'\1'", value)
        if with_quotes == value or not equals:
            raise
        return f"{key}={with_quotes}", parse_override(f"{key}={with_quotes}")


def quoted_rules(value: str) -> str:
    """Return the value of `sweep.where`, a rule or a list of rules, with each rule quoted."""
    if not value or value[0] in "'\"":
        return value
    if value[0] == "[" and value[-1] == "]":
        return f"[{','.join(single(rule) for rule in value[1:-1].split(','))}]"
    return single(value)


def single(text: str) -> str:
    return text if text[:1] in ("'", '"') else "'" + text.strip().replace("'", "\\'") + "'"


def subject(override: Override, text: str) -> str:
    """Return what an override is about; of two about the same thing only the last counts.

    An override such as +callbacks=early_stop adds to a list of parts: two of them count both. Theirs begins with "+".
    """
    key = override.key_or_group.replace("/", ".")
    if override.is_delete() and "=" in text:
        return f"~{key}.{text.partition('=')[2]}"  # one part of a list
    if override.is_delete() and "." in key:
        return f"~{key}"
    many = key in groups() and groups()[key].kind.many
    adds_part = override.is_add() and many and not override.is_sweep_override()
    return f"+{key}" if adds_part else key


def join_lists(before: list[str], added: list[str]) -> list[str]:
    """Return the overrides that add the parts of two others, each of which begins with names."""
    key, _, names = before[0].partition("=")
    more = added[0].partition("=")[2]
    listed = ",".join(text.strip("[]") for text in (names, more))
    return [f"{key}=[{listed}]", *before[1:], *added[1:]]


groups = Registry.by_key


HOME = re.compile(r"(?<=[=,\[(: ])~[^\s,=()\[\]{}:'\"]*")  # ~/data.csv, alone or in a list


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


def faults(
    text: str, override: Override, folders: list[Path], multirun: bool, shows: bool
) -> list[str]:
    """Return what is wrong with an override in itself, whatever the experiment is."""
    key = override.key_or_group
    if not key:
        return [f"{FORM}; the key is missing"]
    if IMPORTS & set(re.split(r"\W+", text)):
        return [TARGET]
    if key.startswith("sweep.") and (not multirun or override.is_sweep_override()):
        return [
            "is about a whole sweep: "
            + (f"write {key}=[a,b]" if multirun else "add -m for one, or leave it out")
        ]
    if override.is_sweep_override() and not multirun:
        key, _, value = text.partition("=")
        advice = quoted_override(f"{key}=[{value}]")
        listed = f"; as one list, write {advice}" if "," in value and "(" not in value else ""
        return [f"has several values: add -m to try each{listed}"]
    given: Any = override.value()
    if override.is_range_sweep() and not list(given.range()):
        return ["there is no value in this range"]
    if override.package is not None:
        advice = quoted_override(f"{key}={text.partition('=')[2]}")
        return [f"each part has its place: write {advice}"]
    if key == "plugins":
        return ["plugins are given with --plugins, or in the project's conf/config.yaml"]
    if key == "hydra.mode":
        return ["a sweep is asked for with -m"]
    if key == "hydra.searchpath":
        return ["config folders are given with --config-dir"]
    if of_hydra(key) and not multirun and not shows:
        return [hydra_fault(key, multirun)]
    if key in groups() or key == "experiment":
        return option_faults(override, folders)
    return []


def of_hydra(key: str) -> bool:
    return re.split(r"[./]", key)[0] == "hydra"


def hydra_fault(key: str, multirun: bool) -> str:
    """Say why a setting of Hydra itself has no effect."""
    if re.match(r"hydra[./](launcher|sweeper)", key):
        return "is about a whole sweep: add -m for one, or leave it out"
    if key.startswith("hydra.run."):
        return "has no effect: run.root=DIR and run.name=NAME say where a run lies"
    if key.startswith("hydra.sweep."):
        return "has no effect: run.root=DIR and sweep.name=NAME say where a sweep lies"
    used = "hydra/launcher, hydra/sweeper and their settings"
    return f"has no effect: of Hydra's own settings a sweep (-m) uses {used}, and a single run none"


def option_faults(override: Override, folders: list[Path]) -> list[str]:
    """Say which chosen names a group does not have: of parts the registered ones, and the user's YAML files."""
    key = override.key_or_group
    many = key in groups() and groups()[key].kind.many
    names = chosen_names(override)
    if not override.is_sweep_override() and not override.is_delete():
        value = override.value()
        nameless = isinstance(value, Mapping) and key == "experiment"
        if many:
            nameless = any(name_in(part) is NAMELESS for part in chosen_parts(override))
        if nameless or (isinstance(value, list) and not many):
            noun = with_article(groups()[key].kind.name if key in groups() else key)
            more = (
                ", or a list of names"
                if many
                else f" (-m {key}=a,b tries each)"
                if len(names) > 1
                else ""
            )
            settings = ""
            if key != "experiment":
                settings = f"; settings follow as {key}{'.NAME' * many}.KEY=VALUE, or {{name: NAME, KEY: VALUE}}"
            return [f"should be the name of {noun}{more}{settings}"]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if many and twice and not override.is_sweep_override():
        return [f"{', '.join(twice)} is there twice"]
    files = {file.stem for folder in folders for file in (folder / key).glob("*.yaml")}
    unknown = [
        name
        for name in names
        if name not in files and not (key in groups() and name in groups()[key])
    ]
    return [no_option(key, name, files, folders) for name in unknown]


def no_option(key: str, name: str, files: Iterable[str], folders: Iterable[Path]) -> str:
    if key in groups():
        return groups()[key].unknown(name)
    if list(files):
        return f"there is no experiment {name!r}; {did_you_mean(name, files)}"
    looked = ", ".join(str(folder / "experiment") for folder in folders)
    return (
        f"there is no experiment {name!r}: no {name}.yaml in {looked} (--config-dir adds a folder)"
    )


def chosen_names(override: Override) -> list[str]:
    """The names in `optimizer=sgd`, in a list of them, or in a sweep over either."""
    if override.is_delete():
        return []
    names = map(name_in, chosen_parts(override))
    return [str(name) for name in names if name is not None and name is not NAMELESS]


def chosen_parts(override: Override) -> list[Any]:
    """Return what a group is given: names, and mappings with a name and settings."""
    value: Any = override.value()
    parts: list[Any] = []
    for each in several_values(override) if override.is_sweep_override() else [value]:
        parts += each if isinstance(each, list) else [each]
    return parts


NAMELESS = object()  # settings without a name: of the part that is chosen elsewhere


def name_in(part: Any) -> Any:
    """Return the name in `sgd`, or in `{name: sgd, lr: 0.1}`."""
    return part.get("name", NAMELESS) if isinstance(part, Mapping) else part


def several_values(override: Override) -> list[Any]:
    """Return the values that a sweep gives a key; none of glob(ada*), which Hydra matches with what there is."""
    if isinstance(override.value(), Glob):
        return []
    texts = list(override.sweep_string_iterator())
    return [value_of(f"{override.key_or_group}={text}") for text in texts]


def choice_overrides(override: Override, text: str) -> list[str]:
    """Return what Hydra gets for an override that chooses parts or an experiment, and has no fault in itself."""
    key, value = override.key_or_group, text.partition("=")[2]
    many = key in groups() and groups()[key].kind.many
    if key in groups() and has_settings(override):
        return [text] if override.is_sweep_override() else with_settings(override)
    if override.is_sweep_override() and not many and "null" in re.split(r"\W", value):
        value = re.sub(r"\bnull\b", NONE, value)
        return [f"{key}={value}"]
    if override.is_delete() and many and value:
        return [f"~{key}.{value}"]
    if override.is_delete() or value in ("null", ""):
        return [f"{key}=[]"] if many else [] if key == "experiment" else [f"{key}={NONE}"]
    return [f"{ALSO}/{key}={value}"] if override.is_add() and many else [f"{key}={value}"]


def has_settings(override: Override) -> bool:
    """Whether a part, or one of a list or a sweep, is given with settings: {name: sgd, lr: 0.1}."""
    return not override.is_delete() and any(
        isinstance(part, Mapping) for part in chosen_parts(override)
    )


def with_settings(override: Override) -> list[str]:
    """Return the override that chooses parts by their names, and those that give them settings."""
    key = override.key_or_group
    value: Any = override.value()
    if not groups()[key].kind.many:
        chosen = [f"{key}={value['name']}"] if "name" in value else []
        return [*chosen, f"++{key}={as_text(value)}"]
    names: list[str] = []
    settings: list[str] = []
    for part in value if isinstance(value, list) else [value]:
        own = groups()[key].get(str(name_in(part))).name
        names.append(own)
        if isinstance(part, Mapping):
            settings.append(f"++{key}.{own}={as_text({**part, 'name': own})}")
    group = f"{ALSO}/{key}" if override.is_add() else key
    return [f"{group}=[{','.join(names)}]", *settings]


def as_text(value: Any) -> str:
    """Write a value as an override has it: {name: sgd, lr: 0.1}. A text is quoted, whatever it looks like."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{as_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_text, value)) + "]"
    if isinstance(value, str):
        return quoted_text(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def expand_job(override: str) -> list[str]:
    """Return the overrides of one job of a sweep that stand for one with a part and its settings."""
    if override.startswith("++") or override.partition("=")[0].lstrip("+") not in groups():
        return [override]
    return choice_overrides(parse_override(override), override)


def value_overrides(override: Override, text: str) -> list[str]:
    """Return the override of a value so that Hydra sets it whether or not the key is there yet."""
    if override.is_delete():
        return [text]
    key, value = override.key_or_group.replace("/", "."), text.partition("=")[2]
    names_part = key.rpartition(".")[2] in part_settings() and "." in key
    if not names_part or value in ("null", "") or value[0] in "{[" or has_settings(override):
        return [f"++{key}={value}"]
    if override.is_sweep_override():
        return [f"++{key}.name={value}"]
    return [f"++{key}={value}", f"++{key}.name={value}"]


def part_settings() -> set[str]:
    """The names of all settings that name a part."""
    registries = Registry.every.values()
    return {
        n
        for registry in registries
        for e in registry
        for n, s in e.settings.items()
        if s.part and not s.many
    }


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
    return parse_override(override).value()
