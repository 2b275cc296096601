"""The sweeper of grids: all combinations of the values of overrides and `hydra.sweeper.params`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from framework.composition.hydra_internals import Override, parse_overrides, result_of
from framework.composition.override_syntax import dotted, override_key, value_of
from framework.composition.overrides import as_typed, depth, expand_job, own_settings
from framework.errors import ConfigError
from framework.errors.terminal import print_line
from framework.registry.annotations import PositiveInt
from framework.runs.sweep_files import Trial
from framework.system.signals import received

from .grid_rules import Rule, combinations
from .sweeper import TrialSweeper, rewrite_params
from .table import settings_key
from .trial_runner import compose_all


class Grid(TrialSweeper):
    """Runs all combinations that the section `sweep` does not leave out.

    All are checked before the first runs.

    Args:
        params: overrides with several values, by key, as in an experiment file.
        max_batch_size: trials that a launcher gets at once; null for all.
    """

    def __init__(
        self, params: dict[str, Any] | None = None, max_batch_size: PositiveInt | None = None
    ):
        self.params = dict(params or {})
        self.max_batch_size = max_batch_size

    def sweep(self, arguments: list[str]) -> None:
        """Check all trials and run them in batches, or with `plan -m` only print them.

        Raises:
            ConfigError: overrides or settings of the sweep are invalid.
        """
        runner = self.runner
        overrides = self.job_overrides([*self.params_overrides(arguments), *arguments])
        jobs = compose_all(runner, overrides)
        if runner.plan is not None:
            for line in runner.plan(jobs):
                print_line(line)
            return
        runner.planned = len(jobs)
        runner.numbers = trial_numbers([job.settings for job in jobs], runner.folder.trials())
        for index, job in enumerate(jobs):
            runner.composed_jobs[index] = runner.assign_folder(job)
        size = self.max_batch_size or len(overrides)
        for first in range(0, len(overrides), size):
            batch = overrides[first : first + size]
            results = self.trial_launcher.launch(batch, initial_job_idx=first)
            is_stopped = any(result_of(result).state == "stopped" for result in results)
            if is_stopped or received() is not None:
                break

    def params_overrides(self, arguments: list[str]) -> list[str]:
        """Return the overrides of `params` that the command line does not replace.

        Raises:
            ConfigError: one of them is invalid.
        """
        composing = self.runner.composing
        replaced = {override_key(as_typed(text)) for text in arguments}
        texts = []
        for key, value in self.params.items():
            if dotted(key) not in replaced:
                texts.append(f"{key}={value}")
        params = rewrite_params(texts, composing)
        for key in params.typed:
            if key not in composing.overrides.swept:
                composing.overrides.swept.append(key)
        return params.arguments

    def job_overrides(self, arguments: list[str]) -> list[tuple[str, ...]]:
        """Return the overrides of each job.

        Raises:
            ConfigError: a grid cannot use some values, `sweep.zip` or `sweep.where` is invalid, or
                no combination is left.
        """
        section = self.runner.sweep
        sweep_overrides = self.runner.composing.overrides
        parsed = parse_overrides(arguments, self.loader)
        problems = list(axis_problems(parsed))
        if problems:
            raise ConfigError(problems)
        shared = [str(each.input_line) for each in parsed if not each.is_sweep_override()]
        values = {}
        for text in shared:
            if not text.startswith("~"):
                values[override_key(as_typed(text))] = value_of(text)
        axes = read_axes(parsed, sweep_overrides.swept)
        rules = [Rule(text, values.keys() | axes.keys()) for text in section.rules]
        grid = combinations(axes, section.zipped)
        jobs = []
        for overrides in grid:
            settings = values | own_settings(overrides, sweep_overrides)
            if all(rule.holds(settings) for rule in rules):
                jobs.append(parts_first([*shared, *overrides]))
        if not jobs:
            raise ConfigError([f"sweep.where: excludes all {len(grid)} combinations"])
        return jobs


def axis_problems(overrides: Sequence[Override]) -> Iterator[str]:
    """Yield the overrides with several values that a grid cannot use."""
    for override in overrides:
        text = as_typed(str(override.input_line))
        if override.is_interval_sweep():
            yield (
                f"{text}: interval(...) is for a sweeper that samples values: "
                "use a,b,c or range(...)"
            )
        elif override.is_sweep_override() and not sweep_values(override):
            yield f"{text}: there are no values"


def read_axes(overrides: Sequence[Override], swept: Sequence[str]) -> dict[str, list[str]]:
    """Return, by key, an override for each value of the overrides with several values.

    Args:
        overrides: the overrides of the sweep.
        swept: the keys in the order of the result.
    """
    axes = {}
    for override in overrides:
        if override.is_sweep_override():
            key = override_key(as_typed(str(override.input_line)))
            axes[key] = sweep_values(override)
    return {key: axes[key] for key in sorted(axes, key=swept.index)}


def sweep_values(override: Override) -> list[str]:
    """Return an override for each of the values."""
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def parts_first(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides of a job, with each part before its settings."""
    expanded: list[str] = []
    for text in overrides:
        expanded += expand_job(text)
    return tuple(sorted(expanded, key=depth))


def trial_numbers(
    settings: Sequence[Mapping[str, Any]], earlier: Sequence[Trial]
) -> dict[int, int]:
    """Return the trial number of each job, by index; empty for a new sweep.

    Trials of a resumed sweep keep their numbers; new ones get free numbers.
    """
    if not earlier:
        return {}
    known = {trial_key(trial.settings): trial.number for trial in earlier}
    used = set(known.values())
    free = (number for number in count() if number not in used)
    numbers = {}
    for index, each in enumerate(settings):
        key = trial_key(each)
        numbers[index] = known[key] if key in known else next(free)
    return numbers


def trial_key(settings: Mapping[str, Any]) -> str:
    """Return a text that is the same for settings of the same trial: 8.0 is 8."""
    values = dict(settings)
    for key, value in settings.items():
        if isinstance(value, float) and value.is_integer():
            values[key] = int(value)
    return settings_key(values)
