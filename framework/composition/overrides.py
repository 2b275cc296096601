"""Rewrite the overrides of a command line so that Hydra accepts them and our checks see them.

Hydra stops at the first error. The rewritten overrides set a key whether or not it exists, so that
unknown keys reach `spec.Reader`, which reports all problems at once.

| typed                               | for Hydra                                              |
|-------------------------------------|--------------------------------------------------------|
| `optimizer=sgd`                     | `optimizer=sgd`                                        |
| `optimizer={name: sgd, lr: 0.1}`    | `optimizer=sgd ++optimizer={name:'sgd',lr:0.1}`        |
| `metrics=[f1,{name: top_k, k: 3}]`  | `metrics=[f1,top_k] ++metrics.top_k={...}`             |
| `optimizer.lr=0.1`                  | `++optimizer.lr=0.1`                                   |
| `model.activation=gelu`             | `++model.activation=gelu ++model.activation.name=gelu` |
| `model/activation=gelu`             | the same                                               |
| `+callbacks=ema`                    | `also/callbacks=ema` (adds to the list)                |
| `~callbacks=ema`                    | `~callbacks.ema` (removes from the list)               |
| `scheduler=null`, `~scheduler`      | `scheduler=_none_` (an option without content)         |
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from hydra.errors import HydraException

from framework.errors import Facts, Problem
from framework.registry.registry import Registry

from .hydra_groups import ALSO, NONE
from .hydra_internals import Override, parse_override, quoted_text
from .override_checks import find_problems, syntax_problem
from .override_syntax import (
    chosen_names,
    dotted,
    groups,
    has_settings,
    is_group,
    name_in,
    of_hydra,
    override_key,
    parse,
    takes_list,
    value_of,
)
from .sources import COMMAND_LINE


@dataclass
class Overrides:
    """The overrides of a command line, rewritten for Hydra.

    Attributes:
        arguments: the overrides for Hydra.
        problems: the problems found in single overrides.
        notes: overrides that have no effect and do no harm.
        typed: by key, the override as typed.
        swept: the keys with several values.
        refused: the paths of parts that were chosen by an unknown name.
    """

    arguments: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    typed: dict[str, str] = field(default_factory=dict)
    swept: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@dataclass
class Rewritten:
    """One override: as typed, its depth in the experiment, and the overrides for Hydra."""

    text: str
    depth: int
    arguments: list[str]


def rewrite(
    typed: Iterable[str], folders: Iterable[Path], multirun: bool = False, shows: bool = False
) -> Overrides:
    """Rewrite the overrides of a command line for Hydra.

    The choice of a part comes before its settings, whatever the typed order is.

    Args:
        typed: the overrides as typed.
        folders: folders with config files.
        multirun: whether the command runs a sweep (-m).
        shows: whether the command only prints the composed config, so that settings of Hydra
            itself have an effect.
    """
    found = Overrides()
    folders = list(folders)
    kept: dict[str, Rewritten] = {}  # by target, see `override_target`
    inner: dict[str, tuple[str, str]] = {}  # path -> (lr, optimizer={name: sgd, lr: 0.1})
    for argument in typed:
        try:
            text, override = parse(argument)
        except HydraException:
            message = f"{argument}: {syntax_problem(argument)} ({COMMAND_LINE})"
            facts = Facts(value=argument, expected="KEY=VALUE", source=COMMAND_LINE)
            found.problems.append(Problem(message, facts))
            continue
        record_override(found, text, override)
        problems = find_problems(text, override, folders, multirun, shows)
        for problem in problems:
            found.problems.append(typed_problem(text, override, problem))
        if problems:
            found.refused += refused_paths(override)
            continue
        target = override_target(override, text)
        arguments = arguments_for(override, text)
        before = kept.pop(target, None)
        if before is not None and before.text != text:
            if target.startswith("+"):
                arguments = join_lists(before.arguments, arguments)
            else:
                found.notes.append(f"{before.text} has no effect: {text} overrides it")
        kept[target] = Rewritten(text, depth(override.key_or_group), arguments)
        value: Any = override.value()
        if isinstance(value, Mapping):
            for name in value:
                inner[f"{target}.{name}"] = (name, text)
    for rewritten in sorted(kept.values(), key=attrgetter("depth")):
        found.arguments += rewritten.arguments
    for path, (name, text) in inner.items():
        if path in found.typed:
            found.notes.append(f"{name} in {text} has no effect: {found.typed[path]} overrides it")
    return found


def typed_problem(text: str, override: Override, problem: str) -> Problem:
    """Return a problem of an override with its facts.

    Args:
        text: the override as typed.
        override: the parsed override.
        problem: what is wrong with it; a Problem may have further facts.
    """
    facts = problem.facts if isinstance(problem, Problem) else Facts()
    key = dotted(override.key_or_group)
    value = text.partition("=")[2] if facts.value is None else facts.value
    known = replace(facts, setting=key, value=value, source=COMMAND_LINE)
    return Problem(f"{text}: {problem} ({COMMAND_LINE})", known)


def record_override(found: Overrides, text: str, override: Override) -> None:
    """Record the key of an override, and whether it sweeps; a later override replaces a sweep."""
    key = dotted(override.key_or_group)
    found.typed[key] = text
    if key in found.swept:
        found.swept.remove(key)
    if override.is_sweep_override():
        found.swept.append(key)


def refused_paths(override: Override) -> list[str]:
    """Return the paths of the unknown parts that an override with problems chooses.

    | override                  | path                  |
    |---------------------------|-----------------------|
    | `data=images`             | `data`                |
    | `callbacks=[ema,stopp]`   | `callbacks.stopp`     |
    """
    key = override.key_or_group
    if key not in groups():
        return []
    unknown = [name for name in chosen_names(override) if name not in groups()[key]]
    if takes_list(key):
        return [f"{key}.{name}" for name in unknown]
    return [key] if unknown else []


def depth(override: str) -> int:
    """Return how deep the key of an override lies in the experiment: 0 for a part, 1 for lr."""
    key = override.partition("=")[0].removeprefix(f"{ALSO}/")
    return key.count("/") + key.count(".")


def override_target(override: Override, text: str) -> str:
    """Return what an override changes; of two overrides with one target, the last one counts.

    | override             | target                | two of them           |
    |----------------------|-----------------------|-----------------------|
    | `model/norm=batch`   | `model.norm`          | the last one counts   |
    | `~callbacks=ema`     | `~callbacks.ema`      | both count            |
    | `+callbacks=ema`     | `+callbacks`          | are joined            |
    """
    key = dotted(override.key_or_group)
    if override.is_delete() and "=" in text:
        return f"~{key}.{text.partition('=')[2]}"
    if override.is_delete() and "." in key:
        return f"~{key}"
    if override.is_add() and takes_list(key) and not override.is_sweep_override():
        return f"+{key}"
    return key


def join_lists(before: list[str], added: list[str]) -> list[str]:
    """Join the rewritten overrides of two that add parts to one list.

    `also/callbacks=ema` and `also/callbacks=[progress]` become `also/callbacks=[ema,progress]`.
    """
    key, _, first = before[0].partition("=")
    second = added[0].partition("=")[2]
    names = f"{first.strip('[]')},{second.strip('[]')}"
    return [f"{key}=[{names}]", *before[1:], *added[1:]]


# rewriting one override


def arguments_for(override: Override, text: str) -> list[str]:
    """Return the overrides for Hydra that stand for one without problems."""
    if of_hydra(override.key_or_group):
        return [text]
    if is_group(override.key_or_group):
        return choice_overrides(override, text)
    return value_overrides(override, text)


def choice_overrides(override: Override, text: str) -> list[str]:
    """Rewrite an override that chooses parts or an experiment; see the table of the module."""
    key = override.key_or_group
    value = text.partition("=")[2]
    many = takes_list(key)
    if key in groups() and has_settings(override):
        if override.is_sweep_override():
            return [text]  # `expand_job` rewrites it for each job
        return with_settings(override)
    if override.is_sweep_override() and not many and "null" in re.split(r"\W", value):
        options = re.sub(r"\bnull\b", NONE, value)
        return [f"{key}={options}"]
    if override.is_delete() and many and value:
        return [f"~{key}.{value}"]
    if override.is_delete() or value in ("null", ""):
        if many:
            return [f"{key}=[]"]
        return [] if key == "experiment" else [f"{key}={NONE}"]
    if override.is_add() and many:
        return [f"{ALSO}/{key}={value}"]
    return [f"{key}={value}"]


def with_settings(override: Override) -> list[str]:
    """Rewrite the choice of parts with settings: first the names, then the settings.

    `optimizer={name: sgd, lr: 0.1}` becomes `optimizer=sgd` and
    `++optimizer={name:'sgd',lr:0.1}`.
    """
    key = override.key_or_group
    value: Any = override.value()
    if not takes_list(key):
        settings = f"++{key}={as_text(value)}"
        return [f"{key}={value['name']}", settings] if "name" in value else [settings]
    names: list[str] = []
    all_settings: list[str] = []
    for part in value if isinstance(value, list) else [value]:
        name = groups()[key].get(str(name_in(part))).name  # the name of an alias
        names.append(name)
        if isinstance(part, Mapping):
            all_settings.append(f"++{key}.{name}={as_text({**part, 'name': name})}")
    group = f"{ALSO}/{key}" if override.is_add() else key
    return [f"{group}=[{','.join(names)}]", *all_settings]


def value_overrides(override: Override, text: str) -> list[str]:
    """Rewrite an override of a setting so that Hydra sets it whether or not the key exists.

    Where the setting names a part, a second override sets only the name, so that further
    overrides can give that part settings: `model.activation=elu model.activation.alpha=2`.
    """
    if override.is_delete():
        return [text]
    key = dotted(override.key_or_group)
    value = text.partition("=")[2]
    names_part = "." in key and key.rpartition(".")[2] in part_settings()
    if not names_part or value in ("null", "") or value[0] in "{[" or has_settings(override):
        return [f"++{key}={value}"]
    if override.is_sweep_override():
        return [f"++{key}.name={value}"]
    return [f"++{key}={value}", f"++{key}.name={value}"]


def part_settings() -> set[str]:
    """Return the names of all settings that name one part, such as `activation`."""
    names = set()
    for registry in Registry.every.values():
        for entry in registry:
            for name, setting in entry.settings.items():
                if setting.part and not setting.many:
                    names.add(name)
    return names


def as_text(value: Any) -> str:
    """Write a value in the syntax of overrides: {name:'sgd',lr:0.1}. Texts are always quoted."""
    if isinstance(value, Mapping):
        items = [f"{key}:{as_text(item)}" for key, item in value.items()]
        return "{" + ",".join(items) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_text, value)) + "]"
    if isinstance(value, str):
        return quoted_text(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


# the overrides of one job of a sweep


def expand_job(override: str) -> list[str]:
    """Rewrite an override of one job that gives a part settings; return others unchanged."""
    key = override.partition("=")[0]
    if key.startswith("++") or key.lstrip("+") not in groups():
        return [override]
    return choice_overrides(parse_override(override), override)


def as_typed(override: str) -> str:
    """Return an override of one job in the form that a user would type."""
    key, _, value = override.lstrip("+").partition("=")
    mark = "+" if key.startswith(f"{ALSO}/") else ""
    if key.endswith(".name") and key.split(".")[-2] in part_settings():
        key = key.removesuffix(".name")
    key = key.removeprefix(f"{ALSO}/")
    if value == NONE:
        return f"{mark}{key}=null"
    value = re.sub(r"\\(?=[{}])", "", value)  # Hydra writes $\{seed\}
    return f"{mark}{key}={value}"


def own_settings(overrides: Iterable[str], sweep_overrides: Overrides) -> dict[str, Any]:
    """Return the settings of one job of a sweep, without those that all jobs share.

    Args:
        overrides: the overrides of the job.
        sweep_overrides: the overrides of the sweep; a key with a single value is shared.

    Returns:
        The values by key, in the order in which the sweep was typed.
    """
    shared = sweep_overrides.typed.keys() - set(sweep_overrides.swept)
    found: dict[str, Any] = {}
    for text in overrides:
        key = override_key(as_typed(text))
        if not text.startswith("~") and key not in shared:
            value = value_of(text)
            found[key] = None if value == NONE else value
    first = [key for key in sweep_overrides.swept if key in found]
    rest = [key for key in found if key not in first]
    return {key: found[key] for key in (*first, *rest)}
