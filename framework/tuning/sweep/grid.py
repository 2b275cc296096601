"""The sweeper of grids: every combination of the values of an override, or of `hydra.sweeper.params` in a file."""

from collections.abc import Sequence
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from framework.composition.hydra_internals import (
    Override,
    make_launcher,
    parse_overrides,
    result_of,
)
from framework.composition.override_syntax import value_of
from framework.composition.overrides import as_typed, depth, expand_job, own_settings, rewrite
from framework.errors import ConfigError
from framework.errors.terminal import print_line
from framework.registry.schema import PositiveInt
from framework.system.signals import received

from .grid_rules import Rule, combinations
from .trials import Trials, composed


class Grid(Sweeper):
    """Tries every combination but those that the section `sweep` leaves out. All are checked before the first runs."""

    def __init__(
        self, params: dict[str, Any] | None = None, max_batch_size: PositiveInt | None = None
    ):
        """Keep it.

        Args:
            params: overrides with several values, key by key, as an experiment file has them.
            max_batch_size: trials that a launcher gets at once; null for all.
        """
        self.params, self.batch = dict(params or {}), max_batch_size

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        assert isinstance(task_function, Trials)
        self.trials, self.loader = task_function, hydra_context.config_loader
        self.runs = make_launcher(hydra_context, config, task_function)

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials, in batches."""
        overrides = self.jobs([*self.of_params(arguments), *arguments])
        jobs = composed(self.trials, overrides)
        if self.trials.plan is not None:
            for line in self.trials.plan(jobs):
                print_line(line)
            return
        self.trials.planned = len(jobs)
        self.trials.numbers = numbered([job.settings for job in jobs], self.trials)
        self.trials.ready = {number: self.trials.place(job) for number, job in enumerate(jobs)}
        size = self.batch or len(overrides)
        for first in range(0, len(overrides), size):
            ended = self.runs.launch(overrides[first : first + size], initial_job_idx=first)
            if received() is not None or any(result_of(job).state == "stopped" for job in ended):
                break

    def of_params(self, arguments: list[str]) -> list[str]:
        """Return the overrides of `params`, as if typed; what is typed takes the place of one. Raises ConfigError."""
        composing = self.trials.composing
        typed = {key_of(text) for text in arguments}
        wanted = [
            f"{key}={value}"
            for key, value in self.params.items()
            if key.replace("/", ".") not in typed
        ]
        found = rewrite(wanted, composing.folders, multirun=True)
        if found.problems:
            raise ConfigError(
                [
                    text.replace("(command line)", "(hydra.sweeper.params)")
                    for text in found.problems
                ]
            )
        composing.overrides.swept += [
            key for key in found.typed if key not in composing.overrides.swept
        ]
        return found.arguments

    def jobs(self, texts: list[str]) -> list[tuple[str, ...]]:
        """Return the overrides of each job. Raises ConfigError for what is wrong with `sweep.zip` or `sweep.where`."""
        parsed = parse_overrides(texts, self.loader)
        endless = [as_typed(str(each.input_line)) for each in parsed if each.is_interval_sweep()]
        if endless:
            advice = "interval(...) is for a sweeper that draws values: write a,b,c or range(...)"
            raise ConfigError([f"{text}: {advice}" for text in endless])
        fixed = tuple(str(each.input_line) for each in parsed if not each.is_sweep_override())
        section, given = self.trials.sweep, self.trials.composing.overrides
        swept = {
            key_of(str(each.input_line)): sweep_values(each)
            for each in parsed
            if each.is_sweep_override()
        }
        axes = dict(sorted(swept.items(), key=lambda pair: given.swept.index(pair[0])))  # as typed
        known = {key_of(text): value_of(text) for text in fixed if not text.startswith("~")}
        empty = [given.typed.get(key, key) for key, values in axes.items() if not values]
        if empty:
            raise ConfigError([f"{text}: there is no such value" for text in empty])
        rules = [Rule(text, {**known, **axes}) for text in section.rules]
        chosen = combinations(axes, section.zipped)
        kept = [
            own
            for own in chosen
            if all(rule.holds({**known, **own_settings(own, given)}) for rule in rules)
        ]
        if not kept:
            raise ConfigError([f"sweep.where: none of the {len(chosen)} combinations is left"])
        return [with_parts_first([*fixed, *own]) for own in kept]


def with_parts_first(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides of a job, each part before its settings."""
    found: list[str] = []
    for text in overrides:
        found += expand_job(text)
    return tuple(sorted(found, key=depth))


def key_of(override: str) -> str:
    """Return the key of an override as a person types it: `optimizer.lr`."""
    return as_typed(override).lstrip("+~").partition("=")[0].replace("/", ".")


def sweep_values(override: Override) -> list[str]:
    """Return the override with each of its values."""
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def numbered(settings: Sequence[dict[str, Any]], trials: Trials) -> dict[int, int]:
    """Return the number of each trial: a resumed sweep's trials keep theirs, new ones follow."""
    known = {as_key(row.settings): row.number for row in trials.folder.trials()}
    if not known:
        return {}
    texts = [as_key(each) for each in settings]
    free = iter(number for number in range(len(known) + len(texts)) if number not in known.values())
    return {index: known[text] if text in known else next(free) for index, text in enumerate(texts)}


def as_key(settings: dict[str, Any]) -> str:
    """Return settings as a text in which 8.0 is 8, so that a number written otherwise makes no second trial."""
    whole = {}
    for key, value in settings.items():
        is_whole = isinstance(value, float) and value.is_integer()
        whole[key] = int(value) if is_whole else value
    return repr(sorted(whole.items()))
