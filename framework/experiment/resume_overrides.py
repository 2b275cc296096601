"""Apply overrides to the config of a run that is resumed."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from framework.errors import ConfigError

NOT_OF_A_RESUMED_RUN = ("run", "init_from", "resume", "plugins", "sweep", "hydra")


def altered(tree: Mapping[str, Any], typed: Sequence[str]) -> dict[str, Any]:
    """Return a run's config with overrides such as trainer.max_epochs=50 put in. Raises ConfigError for no override."""
    from hydra.errors import HydraException

    from framework.composition.overrides import parse

    changed = copy.deepcopy(
        dict(tree)
    )  # not through JSON, in which the keys of all dicts are texts
    for text in typed:
        try:
            _, override = parse(text)
            *parents, key = override.key_or_group.replace("/", ".").split(".")
            value = override.value()
        except HydraException as error:
            raise ConfigError([f"{text}: cannot be read as KEY=VALUE"]) from error
        if override.is_sweep_override():
            raise ConfigError([f"{text}: a run goes on with one value; a sweep is for new ones"])
        if (parents or [key])[0] in NOT_OF_A_RESUMED_RUN:
            raise ConfigError(
                [f"{text}: has no effect on a run that goes on: it keeps its folder and weights"]
            )
        place = changed
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError([f"{text}: {parent} has no settings"])
        if override.is_delete():
            place.pop(key, None)
        else:
            place[key] = value
    return changed
