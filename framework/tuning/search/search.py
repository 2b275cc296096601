"""A search: Hydra's sweeper that asks Optuna what to try next, lets any launcher train it, and tells what came of it.

All that it knows lies in the sweep folder, so that a search that was killed goes on, to the same number of trials and
the same choices: `study.journal` is Optuna's, `sweep.jsonl` says how each trial ended, run folders have checkpoints.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count, takewhile
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial as Draw, TrialState

from framework.composition.cached_composer import Composer
from framework.composition.hydra_internals import make_launcher, result_of
from framework.composition.overrides import own_settings, rewrite
from framework.contracts.logger import Logger
from framework.errors import ConfigError, FrameworkError
from framework.errors.terminal import print_line
from framework.errors.user_code import describe
from framework.registry.registry import Registry
from framework.runs.folder import read_config
from framework.runtime.seeds import derive
from framework.system.signals import received

from ..sweep.folder import SweepFolder, Trial
from ..sweep.trials import Trials
from .importance import pictures, ranked_trials, report, sign_of
from .settings import SECTION, Search, read_search, seconds_of
from .space import Space
from .study import Direction, create_study, make_sampler

ENDED = ("done", "pruned", "failed")
Batch = dict[int, list[str]]
"""The overrides of trials, by number."""


class Asking:
    """Draws trial after trial. What trial n is follows from the seed and from what came of those before, however often
    the search was killed between: each draw has a generator of its own, and what was drawn stays.
    """

    def __init__(
        self, study: Study, space: Space, sampler: Callable[[int], BaseSampler], seed: int
    ):
        self.study, self.space, self.sampler, self.seed = study, space, sampler, seed

    def ask(self) -> list[str]:
        """Begin the next trial; returns its overrides."""
        self._reseed(len(self.study.get_trials(deepcopy=False)))
        return self._draw(self.study.ask())

    def again(self, trial: FrozenTrial) -> list[str]:
        """Return the overrides of a trial that was cut off, perhaps while it was drawn."""
        self._reseed(trial.number)
        return self._draw(Draw(self.study, trial._trial_id))

    def _reseed(self, *names: object) -> None:
        self.study.sampler = self.sampler(derive(self.seed, "search", *names) % 2**31)

    def _draw(self, trial: Draw) -> list[str]:
        _ = (
            trial.relative_params
        )  # what is drawn together is drawn when first read: now, with the trial's own seed

        def choose(name: str, drawn: BaseDistribution) -> Any:
            self._reseed(trial.number, name)
            if isinstance(drawn, IntDistribution):
                return trial.suggest_int(
                    name, drawn.low, drawn.high, step=drawn.step, log=drawn.log
                )
            if isinstance(drawn, FloatDistribution):
                return trial.suggest_float(
                    name, drawn.low, drawn.high, step=drawn.step, log=drawn.log
                )
            assert isinstance(drawn, CategoricalDistribution)
            return trial.suggest_categorical(name, drawn.choices)

        return self.space.sample(choose)


class Campaign:
    """The loop of a search: a batch of trials is asked for, trained and told, until there are enough."""

    def __init__(
        self,
        search: Search,
        study: Study,
        space: Space,
        folder: SweepFolder,
        metrics: Sequence[str],
    ):
        self.search, self.study, self.folder, self.metrics = search, study, folder, metrics
        assert search.sampler != "auto"
        kind, startup = search.sampler, search.startup
        self.asking = Asking(
            study, space, lambda seed: make_sampler(kind, startup, seed), search.seed
        )

    def run(self, train: Callable[[Batch], Any]) -> str:
        """Have trained what is missing; returns why the search ended before its last trial, if it did."""
        while (reason := self.over()) is None:
            began, batch = time.monotonic(), self.batch()
            ended = {trial.number for trial in self.folder.trials() if trial.state in ENDED}
            train({number: overrides for number, overrides in batch.items() if number not in ended})
            stopped = self.tell(batch)
            self.study.set_user_attr("seconds", self.seconds + time.monotonic() - began)
            if stopped or received() is not None:
                return ""
        return reason

    def batch(self) -> Batch:
        """Return the trials to train next: the rest of the batch that was cut off, or a new one.

        A batch is full before any of it is told, so that a kill makes no difference to what is chosen.
        """
        trials = self.study.get_trials(deepcopy=False)
        batch = {
            trial.number: self.asking.again(trial)
            for trial in trials
            if trial.state == TrialState.RUNNING
        }
        first, size = min(batch, default=len(trials)), self.search.parallel or 1
        for number in range(len(trials), min((first // size + 1) * size, self.search.trials)):
            batch[number] = self.asking.ask()
        return batch

    def tell(self, numbers: Iterable[int]) -> bool:
        """Tell the study how trials ended, in order.

        Returns whether one was interrupted, by a signal or a full disk, and is left for a resumed search.
        """
        rows = {trial.number: trial for trial in self.folder.trials()}
        for number in sorted(numbers):
            row = rows.get(number)
            if row is None or row.state in ("running", "stopped"):
                return True
            self.tell_one(row)
        return False

    def tell_one(self, row: Trial) -> None:
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

    def over(self) -> str | None:
        """Say why no more trials are wanted; nothing of enough trials, None while there are too few."""
        search, done = (
            self.search,
            self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]),
        )
        told = sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))
        if told >= search.trials:
            return ""
        if search.timeout is not None and self.seconds >= seconds_of(search.timeout):
            return f"its time of {search.timeout} is over"
        if len(self.metrics) > 1 or not done:
            return None
        sign = sign_of(self.study, 0)
        best = min(done, key=lambda trial: (sign * trial.values[0], trial.number))
        if search.target is not None and sign * best.values[0] <= sign * search.target:
            return (
                f"{self.metrics[0]} {best.values[0]:.6g} of trial {best.number} reaches the target"
            )
        if search.patience is not None and told - 1 - best.number >= search.patience:
            return f"none of {search.patience} trials was better than trial {best.number}"
        return None


class OptunaSweeper(Sweeper):
    """What `hydra/sweeper=optuna` stands for."""

    def __init__(self, **given: Any):
        """Keep the settings; they are checked when the metrics are known."""
        self.given = given

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher."""
        assert isinstance(task_function, Trials)
        self.trials, self.loader = task_function, hydra_context.config_loader
        self.away = make_launcher(hydra_context, config, task_function)

    def sweep(self, arguments: list[str]) -> None:
        """Search, with the overrides of the command line. Raises ConfigError for what is wrong with them."""
        trials, metrics = self.trials, list(self.trials.by)
        search = read_search(self.given, metrics)
        search.parallel = search.parallel or getattr(self.away, "at_once", 1)
        space = Space([*self.written(search), *arguments], self.loader)
        self.enroll(space)
        for end in (lowest, highest):  # most mistakes show at the ends, before there is a folder
            self.composer.job(space.sample(end), 0)
        asked = {
            "metric": metrics,
            "space": space.texts,
            "sampler": search.sampler,
            "seed": search.seed,
        }
        directions: list[Direction] = [
            "minimize" if mode == "min" else "maximize" for mode in trials.by.values()
        ]
        study, trials.planned = create_study(trials.folder.path, directions, asked), search.trials
        try:
            with trials.showing():
                reason = Campaign(search, study, space, trials.folder, metrics).run(self.train)
            if reason:
                print_line(f"the search ends: {reason}")
        finally:
            conclude(study, metrics, trials.folder)

    @property
    def composer(self) -> Composer:
        assert self.trials.composer is not None
        return self.trials.composer

    def written(self, search: Search) -> list[str]:
        """Return the overrides that the settings stand for: the space, and the callback that prunes."""
        composing = self.trials.composing
        space = rewrite(
            [f"{key}={text}" for key, text in (search.params or {}).items()],
            composing.folders,
            True,
        )
        if space.problems:
            raise ConfigError(
                [text.replace("(command line)", f"({SECTION}.params)") for text in space.problems]
            )
        if search.pruner == "none":
            return space.arguments
        prune = {"callbacks.prune.pruner": search.pruner, "callbacks.prune.warmup": search.warmup}
        texts = {key: f"{key}={value}" for key, value in prune.items()}
        composing.overrides.typed |= texts  # all trials have them: they are nothing of their own
        return [*space.arguments, *(f"++{text}" for text in texts.values())]

    def enroll(self, space: Space) -> None:
        """Say which settings the trials have of their own, and that those with one value each need no Hydra."""
        overrides = self.trials.composing.overrides
        overrides.swept += [axis.key for axis in space.axes if axis.key not in overrides.swept]
        self.composer.swept += tuple(
            f"{axis.written}=" for axis in space.axes if axis.written.startswith("++")
        )

    def train(self, batch: Batch) -> None:
        """Have a batch trained; one that cannot be composed, or whose process dies, has failed."""
        trials = self.trials
        fine = {
            number: overrides
            for number, overrides in batch.items()
            if self.compose(number, overrides)
        }
        for first, overrides in stretches(fine):
            try:
                for job in self.away.launch(overrides, initial_job_idx=first):
                    result_of(job)  # raises what a launcher's process raised
                why = "its process ended without a word"
            except FrameworkError:
                raise
            except Exception as error:  # of a launcher whose process or node is gone
                why = describe(error)
                if not any(row.number in fine for row in trials.folder.trials()):
                    raise
            launched = range(first, first + len(overrides))
            rows = [row for row in trials.folder.trials() if row.number in launched]
            if received() is not None or any(row.state == "stopped" for row in rows):
                return
            for row in rows:
                if row.state == "running":
                    trials.end(replace(row, state="failed", error=why, exit_status=1))

    def compose(self, number: int, overrides: list[str]) -> bool:
        """Make the job of a trial ready; returns whether that is possible."""
        try:
            self.trials.ready[number] = self.trials.place(self.composer.job(overrides, number))
        except ConfigError as error:
            own = own_settings(overrides, self.trials.composing.overrides)
            self.trials.end(
                Trial(number, own, state="failed", error="; ".join(error.problems), exit_status=2)
            )
            return False
        return True


def lowest(name: str, drawn: BaseDistribution) -> Any:
    return drawn.choices[0] if isinstance(drawn, CategoricalDistribution) else drawn.low  # type: ignore[attr-defined]


def highest(name: str, drawn: BaseDistribution) -> Any:
    return drawn.choices[-1] if isinstance(drawn, CategoricalDistribution) else drawn.high  # type: ignore[attr-defined]


def conclude(study: Study, metrics: Sequence[str], folder: SweepFolder) -> None:
    """Say what was learned, and draw it where the runs' own loggers draw."""
    for line in report(study, metrics):
        print_line(line)
    best = {trial.number for trial in ranked_trials(study)[:1]}
    rows = [row for row in folder.trials() if row.number in best]
    used = read_config(folder.path / rows[0].folder).get("loggers") or {} if rows else {}
    loggers = [Registry.every["logger"].build(name, **settings) for name, settings in used.items()]
    drawing = [logger for logger in loggers if type(logger).images is not Logger.images]
    drawn = pictures(study, metrics) if drawing else {}
    for logger in drawing if drawn else ():
        step = len(study.get_trials(deepcopy=False))
        try:
            logger.open(folder.path, step, [])
            for tag, picture in drawn.items():
                logger.images(tag, picture, step)
        finally:
            logger.close()


def stretches(batch: Batch) -> Iterator[tuple[int, list[list[str]]]]:
    """Yield the first number and the overrides of trials that follow each other without a gap."""
    for first in [number for number in sorted(batch) if number - 1 not in batch]:
        numbers = takewhile(batch.__contains__, count(first))
        yield first, [batch[number] for number in numbers]
