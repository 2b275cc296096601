"""Find the problems of an override that do not depend on the rest of the experiment."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from framework.errors import Facts, Problem, did_you_mean, nearest, with_article
from framework.errors.paths import quoted_override

from .hydra_internals import IntervalSweep, Override, plugin_options
from .override_syntax import (
    NAMELESS,
    chosen_names,
    chosen_parts,
    groups,
    is_group,
    name_in,
    of_hydra,
    takes_list,
)
from .sections import HYDRA_PLUGINS
from .spec import IMPORTS, NO_IMPORTS

OVERRIDE_FORM = "expected KEY=VALUE"
QUOTING = (
    "quote a value with spaces, commas, brackets or =, and then the whole argument: 'key=\"a, b\"'"
)
SWEEP_FORMS = "a,b,c or range(3) or range(1,10,step=2) or choice(a,b)"
PLUGIN_GROUPS = ("hydra/launcher", "hydra/sweeper")
SWEEP_SETTING = "is a setting of a sweep: add -m to run a sweep, or remove it"


def syntax_problem(text: str) -> str:
    """Return why an override cannot be parsed."""
    word = text.lstrip("+~")
    if re.search(r"=\s*(range|choice|glob|sort|shuffle|tag|interval)\(", text):
        return f"invalid syntax; write the values of a sweep as {SWEEP_FORMS}"
    if "=" in text:
        return f"{OVERRIDE_FORM}; {QUOTING}"
    if is_group(word):
        return f"{OVERRIDE_FORM}: {word}=NAME"
    meant = []
    for key, registry in groups().items():
        if word in registry:
            meant.append(f"{key}={word}")
    if meant:
        return f"{OVERRIDE_FORM}: {' or '.join(meant)}"
    return OVERRIDE_FORM


def find_problems(
    text: str, override: Override, folders: list[Path], multirun: bool, shows: bool
) -> list[str]:
    """Return the problems of an override.

    Args:
        text: the override as typed.
        override: the parsed override.
        folders: folders with config files.
        multirun: whether the command runs a sweep (-m).
        shows: whether the command only prints the composed config.
    """
    key = override.key_or_group
    if not key:
        return [f"{OVERRIDE_FORM}; the key is missing"]
    if IMPORTS & set(re.split(r"\W+", text)):
        return [NO_IMPORTS]
    problem = sweep_problem(text, override, multirun)
    if problem is None:
        problem = key_problem(text, override, multirun, shows)
    if key in PLUGIN_GROUPS and not override.is_delete():
        # First: a wrong name stays wrong when -m is added.
        problem = plugin_problem(override, folders) or problem
    if problem is not None:
        return [problem]
    if is_group(key):
        return choice_problems(override, folders)
    return []


def sweep_problem(text: str, override: Override, multirun: bool) -> str | None:
    """Return a problem of an override with several values or of a setting of a sweep."""
    key = override.key_or_group
    is_sweep = override.is_sweep_override()
    if key.startswith("sweep."):
        if not multirun:
            return SWEEP_SETTING
        if is_sweep:
            return f"applies to the whole sweep: write {key}=[a,b]"
    if is_sweep and not multirun:
        typed_key, _, value = text.partition("=")
        message = "has several values: add -m to try each"
        if "," in value and "(" not in value:
            message += f"; for one list, write {quoted_override(f'{typed_key}=[{value}]')}"
        return message
    value_range: Any = override.value()
    if override.is_range_sweep() and not list(value_range.range()):
        return "the range has no values"
    return None


def key_problem(text: str, override: Override, multirun: bool, shows: bool) -> str | None:
    """Return the problem of a key that overrides cannot set."""
    key = override.key_or_group
    if override.package is not None:
        advice = quoted_override(f"{key}={text.partition('=')[2]}")
        return f"the package of a part cannot be changed with @: write {advice}"
    if key == "plugins":
        return "use --plugins, or the list `plugins` in the project's conf/config.yaml"
    if key == "hydra.mode":
        return "use -m to run a sweep"
    if key == "hydra.searchpath":
        return "use --config-dir to add a folder of config files"
    group = key.replace(".", "/")
    if key != group and group in PLUGIN_GROUPS and isinstance(override.value(), str):
        return f"write {group}={override.value()}"
    if of_hydra(key) and not multirun and not shows:
        return hydra_fault(key)
    return None


def plugin_problem(override: Override, folders: list[Path]) -> str | None:
    """Return the problem of the choice of a launcher or sweeper."""
    group = override.key_or_group
    kind = group.partition("/")[2]
    value = override.value()
    if not override.is_sweep_override() and not (isinstance(value, str) and value):
        return f"expected the name of a {kind}"
    options = set(plugin_options(group, folders))
    for plugin in HYDRA_PLUGINS.values():
        if plugin.group == kind:
            options.add(plugin.name)
    for name in chosen_names(override):
        if name not in options:
            return not_available(group, name, options)
    return None


def not_available(group: str, name: str, options: Iterable[str]) -> str:
    """Return why a launcher or sweeper is not available; it follows `hydra/launcher=NAME:`."""
    package = f"hydra-{name.replace('_', '-')}-{group.partition('/')[2]}"
    close = nearest(name, options)
    if close is not None:
        return f"not available; did you mean {close!r}? (or is {package} not installed?)"
    return f"not installed ({package}?); available: {', '.join(sorted(options))}"


def hydra_fault(key: str) -> str:
    """Return why a setting of Hydra itself has no effect."""
    if re.match(r"hydra[./](launcher|sweeper)", key):
        return SWEEP_SETTING
    if key.startswith("hydra.run."):
        return "has no effect; set the folder of a run with run.root=DIR and run.name=NAME"
    if key.startswith("hydra.sweep."):
        return "has no effect; set the folder of a sweep with run.root=DIR and sweep.name=NAME"
    return (
        "has no effect; of Hydra's settings, a sweep (-m) uses hydra/launcher, hydra/sweeper "
        "and their settings, and a single run uses none"
    )


def choice_problems(override: Override, folders: list[Path]) -> list[str]:
    """Return the problems of an override that chooses parts or an experiment."""
    key = override.key_or_group
    names = chosen_names(override)
    if isinstance(override.value(), IntervalSweep):
        return [expected_names(key, names)]
    if not override.is_sweep_override() and not override.is_delete():
        if not has_names(override):
            return [expected_names(key, names)]
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice and takes_list(key):
            return [f"{', '.join(twice)} is listed twice"]
    files = set()
    for folder in folders:
        for file in (folder / key).glob("*.yaml"):
            files.add(file.stem)
    problems = []
    for name in names:
        is_part = key in groups() and name in groups()[key]
        if not is_part and name not in files:
            problems.append(unknown_option(key, name, files, folders))
    return problems


def has_names(override: Override) -> bool:
    """Return whether the value of a choice has the right form: a name, or names for a list.

    A mapping without a name is allowed for a single part only: `optimizer={lr: 0.1}` changes the
    default optimizer.
    """
    key = override.key_or_group
    value: Any = override.value()
    if takes_list(key):
        return all(name_in(part) is not NAMELESS for part in chosen_parts(override))
    if isinstance(value, Mapping):
        return key != "experiment"
    return not isinstance(value, list)


def expected_names(key: str, names: list[str]) -> str:
    """Return the form that the value of a choice must have."""
    noun = with_article(groups()[key].kind.name if key in groups() else key)
    message = f"expected the name of {noun}"
    if takes_list(key):
        message += ", or a list of names"
    elif len(names) > 1:
        message += f" (-m {key}=a,b tries each)"
    if key == "experiment":
        return message
    path = f"{key}.NAME" if takes_list(key) else key
    return f"{message}; give settings as {path}.KEY=VALUE or {{name: NAME, KEY: VALUE}}"


def unknown_option(key: str, name: str, files: Iterable[str], folders: Iterable[Path]) -> str:
    """Return the message that a group has no part, or no config file, of this name."""
    if key in groups():
        registry = groups()[key]
        return Problem(registry.unknown(name), registry.unknown_facts(name))
    if list(files):
        facts = Facts(value=name, expected="name of an experiment", suggestion=nearest(name, files))
        return Problem(f"there is no experiment {name!r}; {did_you_mean(name, files)}", facts)
    searched = ", ".join(str(folder / "experiment") for folder in folders)
    return (
        f"there is no experiment {name!r}: no {name}.yaml in {searched} "
        "(--config-dir adds a folder)"
    )
