"""The sweeper of grids: all combinations of the values of overrides and `hydra.sweeper.params`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from framework.composition.hydra_internals import (
    Override,
    parse_overrides,
    result_of,
)
from framework.composition.override_syntax import value_of
from framework.composition.overrides import as_typed, depth, expand_job, own_settings, rewrite
from framework.errors import ConfigError
from framework.errors.terminal import print_line
from framework.registry.annotations import PositiveInt
from framework.system.signals import received

from .folder import Trial
from .grid_rules import Rule, combinations
from .sweeper import TrialSweeper
from .trial_runner import compose_all


class Grid(TrialSweeper):
    """Runs all combinations that the section `sweep` does not leave out.

    All are checked before the first runs.
    """

    def __init__(
        self, params: dict[str, Any] | None = None, max_batch_size: PositiveInt | None = None
    ):
        """Keep the settings.

        Args:
            params: overrides with several values, by key, as in an experiment file.
            max_batch_size: trials that a launcher gets at once; null for all.
        """
        self.params = dict(params or {})
        self.max_batch_size = max_batch_size

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials in batches."""
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
            ended = self.trial_launcher.launch(batch, initial_job_idx=first)
            if received() is not None or any(result_of(job).state == "stopped" for job in ended):
                break

    def params_overrides(self, arguments: list[str]) -> list[str]:
        """Return the overrides of `params` that the command line does not replace.

        Raises ConfigError.
        """
        composing = self.runner.composing
        typed = {override_key(text) for text in arguments}
        texts = []
        for key, value in self.params.items():
            if key.replace("/", ".") not in typed:
                texts.append(f"{key}={value}")
        params = rewrite(texts, composing.folders, multirun=True)
        if params.problems:
            place = "(hydra.sweeper.params)"
            raise ConfigError([text.replace("(command line)", place) for text in params.problems])
        for key in params.typed:
            if key not in composing.overrides.swept:
                composing.overrides.swept.append(key)
        return params.arguments

    def job_overrides(self, arguments: list[str]) -> list[tuple[str, ...]]:
        """Return the overrides of each job.

        Raises ConfigError for values that a grid cannot use, and for problems of `sweep.zip` and
        `sweep.where`.
        """
        section = self.runner.sweep
        typed = self.runner.composing.overrides
        parsed = parse_overrides(arguments, self.loader)
        problems = list(axis_problems(parsed))
        if problems:
            raise ConfigError(problems)
        fixed = []
        swept = {}
        for override in parsed:
            text = str(override.input_line)
            if override.is_sweep_override():
                swept[override_key(text)] = sweep_values(override)
            else:
                fixed.append(text)
        axes = {key: swept[key] for key in sorted(swept, key=typed.swept.index)}  # as typed
        known: dict[str, Any] = {}
        for text in fixed:
            if not text.startswith("~"):
                known[override_key(text)] = value_of(text)
        rules = [Rule(text, {**known, **axes}) for text in section.rules]
        grid = combinations(axes, section.zipped)
        jobs = []
        for overrides in grid:
            settings = {**known, **own_settings(overrides, typed)}
            if all(rule.holds(settings) for rule in rules):
                jobs.append(parts_first([*fixed, *overrides]))
        if not jobs:
            raise ConfigError([f"sweep.where: excludes all {len(grid)} combinations"])
        return jobs


def parts_first(overrides: Sequence[str]) -> tuple[str, ...]:
    """Return the overrides of a job, with each part before its settings."""
    expanded: list[str] = []
    for text in overrides:
        expanded += expand_job(text)
    return tuple(sorted(expanded, key=depth))


def override_key(override: str) -> str:
    """Return the key of an override as typed by a user: `optimizer.lr`."""
    return as_typed(override).lstrip("+~").partition("=")[0].replace("/", ".")


def axis_problems(overrides: Sequence[Override]) -> Iterator[str]:
    """Yield the overrides with several values that a grid cannot use."""
    for override in overrides:
        text = as_typed(str(override.input_line))
        if override.is_interval_sweep():
            advice = "interval(...) is for a sweeper that samples values: use a,b,c or range(...)"
            yield f"{text}: {advice}"
        elif override.is_sweep_override() and not sweep_values(override):
            yield f"{text}: there are no values"


def sweep_values(override: Override) -> list[str]:
    """Return an override for each of the values."""
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def trial_numbers(
    settings: Sequence[Mapping[str, Any]], earlier: Sequence[Trial]
) -> dict[int, int]:
    """Return the trial number of each job, by index; empty for a new sweep.

    Trials of a resumed sweep keep their numbers; new ones get free numbers.
    """
    if not earlier:
        return {}
    known = {normalized(trial.settings): trial.number for trial in earlier}
    used = set(known.values())
    free = (number for number in count() if number not in used)
    numbers = {}
    for index, each in enumerate(settings):
        key = normalized(each)
        numbers[index] = known[key] if key in known else next(free)
    return numbers


def normalized(settings: Mapping[str, Any]) -> str:
    """Return settings as text in which 8.0 is 8, as both are the same trial."""
    values = {}
    for key, value in settings.items():
        is_whole = isinstance(value, float) and value.is_integer()
        values[key] = int(value) if is_whole else value
    return repr(sorted(values.items()))
