"""The settings of a search, `hydra.sweeper` with hydra/sweeper=optuna. They are read without importing Optuna."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from framework.contracts.state import SECONDS
from framework.errors import ConfigError, SettingError, did_you_mean
from framework.registry.annotations import NonNegativeInt, Pattern, PositiveInt
from framework.registry.schema import read_settings

SECTION = "hydra.sweeper"
DURATION = r"(\d+(?:\.\d+)?)\s*(s|sec|min|h)"
Pruner = Literal["none", "median", "halving", "hyperband"]


@dataclass
class Search:
    """The settings of a search: `hydra.sweeper.trials=40`.

    Args:
        trials: how many in all, those before a resume and those that failed included.
        sampler: who chooses; auto: tpe, and nsga2 for several metrics.
        seed: of the sampler; with it, and one trial at a time, the same search can be had again.
        pruner: what ends bad trials while they train.
        warmup: validations of a trial before it may be ended.
        parallel: trials that a launcher gets at once; they are chosen without knowing of each other's results.
            null: 8 for one that trains them as one, else 1.
        startup: trials at random before the sampler learns.
        patience: trials without a better one, after which the search ends; null for no such end.
        timeout: how long the search may take, all resumed parts of it together; null for no limit.
        target: a value that is good enough to end the search; null for none.
        params: the space, key by key, as an experiment file has it.
    """

    trials: PositiveInt = 20
    sampler: Literal["auto", "tpe", "cma_es", "random", "nsga2"] = "auto"
    seed: NonNegativeInt = 0
    pruner: Pruner = "none"
    warmup: NonNegativeInt = 2
    parallel: PositiveInt | None = None
    startup: PositiveInt = 10
    patience: PositiveInt | None = None
    timeout: Annotated[str, Pattern(DURATION, "a duration like 90s, 30min or 1.5h")] | None = None
    target: float | None = None
    params: dict[str, Any] | None = None


def read_search(given: dict[str, Any], metrics: Sequence[str]) -> Search:
    """Check the settings of a search for some metrics. Raises ConfigError with all that is wrong."""
    known, values, problems = read_settings(Search), {}, []
    for name, value in given.items():
        if name not in known:
            problems.append(
                f"{SECTION}.{name}: there is no such setting; {did_you_mean(name, known)}"
            )
            continue
        try:
            values[name] = known[name].convert(value)
        except SettingError as error:
            problems.append(f"{SECTION}.{name}={value}: {error}")
    search = Search(**values) if not problems else Search()
    if len(metrics) > 1:
        one = [name for name in ("patience", "target") if getattr(search, name) is not None]
        one += ["pruner"] if search.pruner != "none" else []
        problems += [
            f"{SECTION}.{name}: goes with one sweep.metric, not with {len(metrics)}" for name in one
        ]
        problems += (
            [f"{SECTION}.sampler=cma_es: takes one sweep.metric"]
            if search.sampler == "cma_es"
            else []
        )
    if search.pruner != "none" and metrics[0].startswith("test/"):
        advice = "choose one of val/..., or pruner=none"
        problems.append(
            f"{SECTION}.pruner={search.pruner}: {metrics[0]} is measured when a trial is over; {advice}"
        )
    if search.sampler == "cma_es" and find_spec("cmaes") is None:
        problems.append(f"{SECTION}.sampler=cma_es: needs cmaes: pip install 'framework[tuning]'")
    if problems:
        raise ConfigError(problems)
    if search.sampler == "auto":
        search = replace(search, sampler="nsga2" if len(metrics) > 1 else "tpe")
    return search


def seconds_of(duration: str) -> float:
    match = re.fullmatch(DURATION, duration)
    assert match is not None  # it has been checked
    return float(match[1]) * SECONDS[match[2]]
