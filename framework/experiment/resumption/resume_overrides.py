"""Apply overrides to the config of a run that is resumed."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from framework.errors import ConfigError, did_you_mean

FIXED = ("run", "init_from", "resume", "plugins", "sweep", "hydra")  # sections of a new run only


def apply_overrides(
    tree: Mapping[str, Any], overrides: Sequence[str], fixed: Sequence[str] = FIXED
) -> dict[str, Any]:
    """Return the config of a run with overrides such as trainer.max_epochs=50 applied.

    Args:
        tree: the config.
        overrides: the overrides as typed.
        fixed: the sections that they cannot change.

    Raises:
        ConfigError: an override cannot be read, is a sweep, or has no effect.
    """
    from hydra.errors import HydraException

    from framework.composition.override_syntax import dotted, parse

    changed = copy.deepcopy(dict(tree))  # not through JSON, which turns all keys into strings
    for text in overrides:
        try:
            _, override = parse(text)
            *parents, key = dotted(override.key_or_group).split(".")
            value = override.value()
        except HydraException as error:
            raise ConfigError([f"{text}: cannot be read as KEY=VALUE"]) from error
        if override.is_sweep_override():
            advice = "a run is resumed with one value; a sweep needs new runs"
            if fixed is not FIXED:
                advice = "expected one value; `framework train -m` trains several"
            raise ConfigError([f"{text}: {advice}"])
        section = parents[0] if parents else key
        if section in fixed:
            reason = "a resumed run: it keeps its folder and weights"
            if fixed is not FIXED:
                reason = "the config of an earlier run"
            raise ConfigError([f"{text}: has no effect on {reason}"])
        place = changed
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError([f"{text}: {parent} has no settings"])
        apply_override(place, key, override, value)
    return changed


def apply_override(place: dict[str, Any], key: str, override: Any, value: Any) -> None:
    """Change one key of a config; `+callbacks=ema` and `~callbacks=ema` change a list of parts.

    Raises:
        ConfigError: a part to remove is not in the list.
    """
    parts: dict[str, Any] = place[key] if isinstance(place.get(key), dict) else {"name": None}
    is_list = "name" not in parts and isinstance(value, str | list)
    names = [value] if isinstance(value, str) else value
    if override.is_delete() and is_list:
        for name in names:
            if name not in parts:
                raise ConfigError([f"~{key}={name}: {did_you_mean(str(name), parts)}"])
            del parts[name]
    elif override.is_delete():
        place.pop(key, None)
    elif override.is_add() and is_list:
        for name in names:
            parts.setdefault(name, {})
    else:
        place[key] = value
