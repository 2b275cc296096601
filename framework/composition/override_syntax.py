"""Read overrides: the key, the value, and the parts that an override chooses."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from hydra.errors import HydraException

from framework.registry.registry import Registry

from .hydra_internals import Glob, IntervalSweep, Override, parse_override

NON_ASCII_WORD = re.compile(r"([^\s,\[\]{}():='\"\\]*[^\x00-\x7f][^\s,\[\]{}():='\"\\]*)")
"""A word with letters such as é, which Hydra's grammar does not have."""
HOME_PATH = re.compile(r"(?<=[=,\[(: ])~[^\s,=()\[\]{}:'\"]*")
"""A path such as ~/data.csv, alone or in a list."""
NAMELESS = object()
"""The name of settings without a name: `optimizer={lr: 0.1}`."""

groups = Registry.by_key


def takes_list(key: str) -> bool:
    """Return whether an experiment has a list of parts at this key, such as `callbacks`."""
    return key in groups() and groups()[key].kind.many


def is_group(key: str) -> bool:
    """Return whether an override of this key chooses parts or an experiment."""
    return key in groups() or key == "experiment"


def of_hydra(key: str) -> bool:
    """Return whether a key is one of Hydra's own, such as hydra.launcher.n_jobs."""
    return re.split(r"[./]", key)[0] == "hydra"


def dotted(key: str) -> str:
    """Return a key with dots: `model/activation` and `model.activation` are the same key."""
    return key.replace("/", ".")


def override_key(text: str) -> str:
    """Return the key of an override with dots: `model.norm` for `++model/norm=batch`."""
    return dotted(text.partition("=")[0].lstrip("+~"))


def override_paths(text: str) -> list[str]:
    """Return the key of an override, and the paths of the settings in its value.

    For `optimizer={name: sgd, lr: 0.1}` these are `optimizer`, `optimizer.name` and `optimizer.lr`.
    The settings in the values of a sweep are left out: each job has its own overrides.
    """
    key = override_key(text)
    _, override = parse(text)
    if override.is_sweep_override():
        return [key]
    value: Any = override.value()
    if not isinstance(value, Mapping):
        return [key]
    return [key, *(f"{key}.{name}" for name in value)]


def parse(text: str) -> tuple[str, Override]:
    """Parse an override, after quoting values that Hydra's grammar does not accept.

    | typed                           | parsed                              |
    |---------------------------------|-------------------------------------|
    | `data.path=~/data.csv`          | `data.path='~/data.csv'`            |
    | `sweep.where=[depth<3,width>8]` | `sweep.where=['depth<3','width>8']` |
    | `run.root=d/été`                | `run.root='d/été'`                  |

    Returns:
        The override with these quotes, and the parsed override.

    Raises:
        HydraException: for a syntax error.
    """
    key, equals, value = text.partition("=")
    if key == "sweep.where":
        text = f"{key}{equals}{quote_rules(value)}"
    elif "~" in value and "'" not in value and '"' not in value:
        text = HOME_PATH.sub(lambda match: quote(match[0]), text)
    try:
        return text, parse_override(text)
    except HydraException:
        key, equals, value = text.partition("=")
        with_quotes = NON_ASCII_WORD.sub(r"'\1'", value)
        if not equals or with_quotes == value:
            raise
        text = f"{key}={with_quotes}"
        return text, parse_override(text)


def quote_rules(value: str) -> str:
    """Quote each rule in the value of `sweep.where`, which is one rule or a list of rules."""
    if not value or value[0] in "'\"":
        return value
    if value[0] == "[" and value[-1] == "]":
        rules = map(quote, value[1:-1].split(","))
        return f"[{','.join(rules)}]"
    return quote(value)


def quote(text: str) -> str:
    """Return a text between single quotes; unchanged if it has quotes."""
    if text[:1] in ("'", '"'):
        return text
    return "'" + text.strip().replace("'", "\\'") + "'"


@cache
def value_of(override: str) -> Any:
    """Return the parsed value of an override: a number, a text, a list, a mapping."""
    return parse_override(override).value()


def swept_values(override: Override) -> list[Any]:
    """Return the values of a sweep; [] for glob(ada*) and interval(0,1), which have no list."""
    if isinstance(override.value(), Glob | IntervalSweep):
        return []
    key = override.key_or_group
    return [value_of(f"{key}={text}") for text in override.sweep_string_iterator()]


def chosen_parts(override: Override) -> list[Any]:
    """Return the parts that an override chooses, over all values of a sweep.

    `callbacks=[ema,{name: checkpoint, every: 7steps}]` chooses "ema" and the mapping.
    """
    values = swept_values(override) if override.is_sweep_override() else [override.value()]
    parts: list[Any] = []
    for value in values:
        if isinstance(value, list):
            parts += value
        else:
            parts.append(value)
    return parts


def chosen_names(override: Override) -> list[str]:
    """Return the names of the parts that an override chooses, over all values of a sweep."""
    if override.is_delete():
        return []
    names = []
    for part in chosen_parts(override):
        name = name_in(part)
        if name is not None and name is not NAMELESS:
            names.append(str(name))
    return names


def name_in(part: Any) -> Any:
    """Return the name in `sgd` or in `{name: sgd, lr: 0.1}`; NAMELESS for `{lr: 0.1}`."""
    if isinstance(part, Mapping):
        return part.get("name", NAMELESS)
    return part


def has_settings(override: Override) -> bool:
    """Return whether an override gives a part settings: `optimizer={name: sgd, lr: 0.1}`."""
    if override.is_delete():
        return False
    return any(isinstance(part, Mapping) for part in chosen_parts(override))
