"""The sweeper of searches: Optuna proposes trials, any launcher trains them.

The state of a search is in the sweep folder, so that a killed search continues with the same
trials: `study.journal` is Optuna's, `sweep.jsonl` records how each trial ended, run folders have
checkpoints.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial as OptunaTrial, TrialState

from framework.composition.cached_composer import Composer
from framework.composition.hydra_internals import result_of
from framework.composition.overrides import own_settings
from framework.contracts.direction import Direction
from framework.contracts.duration import duration_seconds
from framework.contracts.logger import Logger
from framework.errors import ConfigError, FrameworkError
from framework.errors.terminal import print_line
from framework.errors.user_code import describe
from framework.registry.registry import Registry
from framework.runs.folder import read_config
from framework.runs.sweep_files import Trial
from framework.runtime.seeds import derive
from framework.system.signals import received
from framework.tuning.sweep.folder import SweepFolder
from framework.tuning.sweep.sweeper import TrialSweeper, rewrite_params

from .importance import charts, completed_trials, importance_table, objective_sign, ranked_trials
from .settings import Search, read_search
from .space import Distribution, Space
from .study import OptunaDirection, create_study, make_sampler

ENDED = ("done", "pruned", "failed")
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
OPTUNA_DIRECTIONS: dict[Direction, OptunaDirection] = {"min": "minimize", "max": "maximize"}
TrialOverrides = dict[int, list[str]]
"""The overrides of trials, by number."""


class TrialProposer:
    """Proposes trials that depend only on the seed and on the results of earlier trials.

    Each draw has its own generator, and drawn values are in the journal, so that a killed search
    proposes the same trials again.
    """

    def __init__(
        self, study: Study, space: Space, make_sampler: Callable[[int], BaseSampler], seed: int
    ):
        self.study = study
        self.space = space
        self.make_sampler = make_sampler
        self.seed = seed

    def propose(self) -> list[str]:
        """Start the next trial and return its overrides."""
        self._reseed(len(self.study.get_trials(deepcopy=False)))
        return self._draw(self.study.ask())

    def restore(self, trial: FrozenTrial) -> list[str]:
        """Return the overrides of an interrupted trial; some of them may not be drawn yet."""
        self._reseed(trial.number)
        return self._draw(OptunaTrial(self.study, trial._trial_id))

    def _reseed(self, *names: object) -> None:
        self.study.sampler = self.make_sampler(derive(self.seed, "search", *names) % 2**31)

    def _draw(self, trial: OptunaTrial) -> list[str]:
        _ = trial.relative_params  # Optuna draws them on the first access: now, with this seed

        def choose(name: str, distribution: Distribution) -> Any:
            self._reseed(trial.number, name)
            if isinstance(distribution, CategoricalDistribution):
                return trial.suggest_categorical(name, distribution.choices)
            suggest: Any = trial.suggest_float
            if isinstance(distribution, IntDistribution):
                suggest = trial.suggest_int
            return suggest(
                name,
                distribution.low,
                distribution.high,
                step=distribution.step,
                log=distribution.log,
            )

        return self.space.sample(choose)


class SearchLoop:
    """The loop of a search: propose a batch of trials, train it, report its results, repeat."""

    def __init__(
        self,
        search: Search,
        study: Study,
        space: Space,
        folder: SweepFolder,
        metrics: Sequence[str],
    ):
        self.search = search
        self.study = study
        self.folder = folder
        self.metrics = metrics

        def sampler(seed: int) -> BaseSampler:
            assert search.sampler != "auto"  # `read_search` has replaced it
            return make_sampler(search.sampler, search.startup, seed)

        self.proposer = TrialProposer(study, space, sampler, search.seed)

    def run(self, train: Callable[[TrialOverrides], Any]) -> str:
        """Train all missing trials; return the reason for an early end, or "" for none."""
        while (reason := self.end_reason()) is None:
            began = time.monotonic()
            batch = self.next_batch()
            ended = {trial.number for trial in self.folder.trials() if trial.state in ENDED}
            train({number: batch[number] for number in batch if number not in ended})
            is_interrupted = self.report_results(batch)
            self.study.set_user_attr("seconds", self.seconds + time.monotonic() - began)
            if is_interrupted or received() is not None:
                return ""
        return reason

    def next_batch(self) -> TrialOverrides:
        """Return the next trials: the rest of an interrupted batch, or a new one.

        No result of a batch is reported before all its trials are proposed, so that an interruption
        does not change the proposals.
        """
        trials = self.study.get_trials(deepcopy=False)
        batch: TrialOverrides = {}
        for trial in trials:
            if trial.state == TrialState.RUNNING:
                batch[trial.number] = self.proposer.restore(trial)
        first = min(batch, default=len(trials))
        size = self.search.parallel or 1
        end = min((first // size + 1) * size, self.search.trials)
        for number in range(len(trials), end):
            batch[number] = self.proposer.propose()
        return batch

    def report_results(self, numbers: Iterable[int]) -> bool:
        """Report to the study how trials ended, in order.

        Returns whether one was interrupted, by a signal or a full disk; it is left for a resumed
        search.
        """
        rows = {trial.number: trial for trial in self.folder.trials()}
        for number in sorted(numbers):
            row = rows.get(number)
            if row is None or row.state in ("running", "stopped"):
                return True
            self.report_result(row)
        return False

    def report_result(self, row: Trial) -> None:
        values = [row.metrics.get(name, math.nan) for name in self.metrics]
        if row.state == "pruned":
            self.study.tell(row.number, state=TrialState.PRUNED)
        elif row.state == "done" and all(map(math.isfinite, values)):
            self.study.tell(row.number, values)
        else:
            self.study.tell(row.number, state=TrialState.FAIL)

    @property
    def seconds(self) -> float:
        return float(self.study.user_attrs.get("seconds", 0.0))

    def end_reason(self) -> str | None:
        """Return why the search is over: "" if it has all its trials, None if it continues."""
        search = self.search
        finished = len(self.study.get_trials(deepcopy=False, states=FINISHED))
        if finished >= search.trials:
            return ""
        if search.timeout is not None and self.seconds >= duration_seconds(search.timeout):
            return f"timeout={search.timeout} reached"
        if len(self.metrics) > 1 or not completed_trials(self.study):
            return None
        best = ranked_trials(self.study)[0]
        value = best.values[0]
        sign = objective_sign(self.study)
        if search.target is not None and sign * value >= sign * search.target:
            return f"{self.metrics[0]} {value:.6g} of trial {best.number} reaches the target"
        if search.patience is not None and finished - 1 - best.number >= search.patience:
            return f"none of {search.patience} trials was better than trial {best.number}"
        return None


class OptunaSweeper(TrialSweeper):
    """The sweeper `hydra/sweeper=optuna`.

    Args:
        settings: those of `Search`; they are checked when the metrics are known.
    """

    def __init__(self, **settings: Any):
        self.settings = settings

    def sweep(self, arguments: list[str]) -> None:
        """Search with the overrides of the command line.

        Raises:
            ConfigError: an override or a setting of the search is invalid.
            RunError: the folder is that of another search, or cannot be written.
        """
        runner = self.runner
        metrics = list(runner.objectives)
        search = read_search(self.settings, metrics)
        search.parallel = search.parallel or getattr(self.trial_launcher, "default_parallel", 1)
        space = Space([*self.settings_overrides(search), *arguments], self.loader)
        self.declare_swept(space)
        for choose in (lowest, highest):  # finds most mistakes before a folder is created
            self.composer.job(space.sample(choose), 0)
        request = {
            "metric": metrics,
            "space": space.texts,
            "sampler": search.sampler,
            "seed": search.seed,
        }
        directions = [OPTUNA_DIRECTIONS[each] for each in runner.objectives.values()]
        study = create_study(runner.folder.path, directions, request)
        runner.planned = search.trials
        try:
            with runner.displayed():
                reason = SearchLoop(search, study, space, runner.folder, metrics).run(self.train)
            if reason:
                print_line(f"the search ends: {reason}")
        finally:
            report_search(study, metrics, runner.folder)

    @property
    def composer(self) -> Composer:
        return self.runner.required_composer

    def settings_overrides(self, search: Search) -> list[str]:
        """Return the overrides for the settings `params` and `pruner`."""
        composing = self.runner.composing
        params = [f"{key}={text}" for key, text in (search.params or {}).items()]
        arguments = [*rewrite_params(params, composing).arguments]
        if search.pruner == "none":
            return arguments
        prune = {"callbacks.prune.pruner": search.pruner, "callbacks.prune.warmup": search.warmup}
        for key, value in prune.items():
            composing.overrides.typed[key] = f"{key}={value}"  # shared by all trials
            arguments.append(f"++{key}={value}")
        return arguments

    def declare_swept(self, space: Space) -> None:
        """Declare the settings that differ between trials.

        Those of single values need no composition by Hydra.
        """
        overrides = self.runner.composing.overrides
        prefixes = []
        for axis in space.axes:
            if axis.key not in overrides.swept:
                overrides.swept.append(axis.key)
            if axis.written.startswith("++"):
                prefixes.append(f"{axis.written}=")
        self.composer.swept += tuple(prefixes)

    def train(self, batch: TrialOverrides) -> None:
        """Train a batch; record trials as failed if they are invalid or lose their process."""
        runner = self.runner
        composed = dict(batch)
        for number, texts in batch.items():
            if not self.compose(number, texts):
                del composed[number]
        for first, overrides in consecutive(composed):
            cause = "its process ended without a result"
            try:
                for job in self.trial_launcher.launch(overrides, initial_job_idx=first):
                    result_of(job)  # raises the error of a launcher's process
            except FrameworkError:
                raise
            except Exception as error:  # the process or node of a launcher is lost
                cause = describe(error)
                if not any(row.number in composed for row in runner.folder.trials()):
                    raise
            launched = range(first, first + len(overrides))
            self.wait_for_running(launched)
            rows = [row for row in runner.folder.trials() if row.number in launched]
            if received() is not None or any(row.state == "stopped" for row in rows):
                return
            for row in rows:
                if row.state == "running":
                    runner.finish(replace(row, state="failed", error=cause, exit_status=1))

    def wait_for_running(self, numbers: range) -> None:
        """Wait for jobs that still run when the launcher returns because another job is lost."""
        for row in self.runner.folder.trials():
            if row.number in numbers and row.state == "running":
                self.runner.wait_for_other_process(row.folder)

    def compose(self, number: int, overrides: list[str]) -> bool:
        """Compose the job of a trial; return whether it is valid."""
        runner = self.runner
        try:
            job = self.composer.job(overrides, number)
            runner.composed_jobs[number] = runner.assign_folder(job)
        except ConfigError as error:
            trial = Trial(
                number,
                own_settings(overrides, runner.composing.overrides),
                state="failed",
                error="; ".join(error.problems),
                exit_status=2,
            )
            runner.finish(trial)
            return False
        return True


def lowest(name: str, distribution: Distribution) -> Any:
    """Return the first choice, or the lowest number."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    return distribution.low


def highest(name: str, distribution: Distribution) -> Any:
    """Return the last choice, or the highest number."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[-1]
    return distribution.high


def report_search(study: Study, metrics: Sequence[str], folder: SweepFolder) -> None:
    """Print the importances of hyperparameters, and log charts to the loggers of the best run."""
    for line in importance_table(study, metrics):
        print_line(line)
    loggers = best_run_loggers(study, folder)
    drawn = charts(study, metrics) if loggers else {}
    if not drawn:
        return
    step = len(study.get_trials(deepcopy=False))
    for logger in loggers:
        try:
            logger.open(folder.path, step, [])
            for tag, chart in drawn.items():
                logger.images(tag, chart, step)
        finally:
            logger.close()


def best_run_loggers(study: Study, folder: SweepFolder) -> list[Logger]:
    """Return new loggers like those of the best run, if they log images."""
    ranked = ranked_trials(study)
    rows = {row.number: row for row in folder.trials()}
    if not ranked or ranked[0].number not in rows:
        return []
    config = read_config(folder.path / rows[ranked[0].number].folder).get("loggers") or {}
    loggers = []
    for name, settings in config.items():
        logger = Registry.every["logger"].build(name, **settings)
        if type(logger).images is not Logger.images:
            loggers.append(logger)
    return loggers


def consecutive(batch: TrialOverrides) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield each group of consecutive trials: its first number, and the overrides of its trials."""
    group: list[list[str]] = []
    for number in sorted(batch):
        group.append(batch[number])
        if number + 1 not in batch:
            yield number + 1 - len(group), group
            group = []
