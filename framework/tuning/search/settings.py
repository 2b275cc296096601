"""The settings of a search: `hydra.sweeper` with hydra/sweeper=optuna. Optuna is not imported."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

from framework.contracts.duration import Duration
from framework.errors import ConfigError, SettingError, did_you_mean
from framework.registry.annotations import NonNegativeInt, PositiveInt
from framework.registry.schema import read_settings

SECTION = "hydra.sweeper"
Pruner = Literal["none", "median", "halving", "hyperband"]


@dataclass
class Search:
    """The settings of a search: `hydra.sweeper.trials=40`.

    Args:
        trials: total number of trials, including failed ones and those before a resume.
        sampler: the sampler; auto: tpe, or nsga2 for several metrics.
        seed: seed of the sampler; the same seed with parallel=1 gives the same search again.
        pruner: ends bad trials during training.
        warmup: validations of a trial before it may be pruned.
        parallel: trials that are proposed at once, without knowledge of each other's results.
            null: 8 for a launcher that trains trials as one stacked model, else 1.
        startup: random trials before the sampler learns.
        patience: trials without improvement after which the search ends; null for no such limit.
        timeout: total duration of the search, including resumed parts; null for no limit.
        target: metric value at which the search ends; null for none.
        params: the search space by key, as in an experiment file.
    """

    trials: PositiveInt = 20
    sampler: Literal["auto", "tpe", "cma_es", "random", "nsga2"] = "auto"
    seed: NonNegativeInt = 0
    pruner: Pruner = "none"
    warmup: NonNegativeInt = 2
    parallel: PositiveInt | None = None
    startup: PositiveInt = 10
    patience: PositiveInt | None = None
    timeout: Duration | None = None
    target: float | None = None
    params: dict[str, Any] | None = None


def read_search(settings: dict[str, Any], metrics: Sequence[str]) -> Search:
    """Check and convert the settings of a search.

    Args:
        settings: by name, as in the config.
        metrics: the metrics that trials are compared by.

    Raises:
        ConfigError: with all problems.
    """
    known = read_settings(Search)
    values = {}
    problems = []
    for name, value in settings.items():
        if name not in known:
            problems.append(
                f"{SECTION}.{name}: there is no such setting; {did_you_mean(name, known)}"
            )
            continue
        try:
            values[name] = known[name].convert(value)
        except SettingError as error:
            problems.append(f"{SECTION}.{name}={value}: {error}")
    search = Search() if problems else Search(**values)
    problems += conflicts(search, metrics)
    if problems:
        raise ConfigError(problems)
    if search.sampler == "auto":
        search = replace(search, sampler="nsga2" if len(metrics) > 1 else "tpe")
    return search


def conflicts(search: Search, metrics: Sequence[str]) -> Iterator[str]:
    """Yield the problems of settings that do not fit each other, the metrics or the machine."""
    if len(metrics) > 1:
        for name in ("patience", "target", "pruner"):
            value = getattr(search, name)
            if value not in (None, "none"):
                yield f"{SECTION}.{name}={value}: expected one sweep.metric, got {len(metrics)}"
        if search.sampler == "cma_es":
            yield f"{SECTION}.sampler=cma_es: expected one sweep.metric, got {len(metrics)}"
    if search.pruner != "none" and metrics[0].startswith("test/"):
        yield (
            f"{SECTION}.pruner={search.pruner}: {metrics[0]} is measured after the trial has "
            "ended; use a metric of val/... or pruner=none"
        )
    if search.sampler == "cma_es" and find_spec("cmaes") is None:
        yield f"{SECTION}.sampler=cma_es: needs cmaes: pip install 'framework[tuning]'"
