"""The study of a search: its journal in the sweep folder, its samplers and pruners, and who judges a trial under way.

`study.journal` holds all that Optuna knows of the trials, a JSON object a line; `sweep.jsonl` beside it how they ended.
"""

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from framework.errors import FrameworkError, RunError
from framework.system.files import (
    MOST_LINE_BYTES,
    MOST_ROWS_BYTES,
    AppendFile,
    failure_reason,
    open_file,
    parse_row,
)
from framework.system.locks import lock

from .settings import Pruner

try:
    import optuna
except ImportError:
    raise FrameworkError("a search needs optuna: pip install 'framework[tuning]'") from None

from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import BaseSampler, CmaEsSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, Trial

Sampler = Literal["tpe", "cma_es", "random", "nsga2"]
Direction = Literal["minimize", "maximize"]
FILE, NAME = "study.journal", "search"

optuna.logging.set_verbosity(optuna.logging.ERROR)  # a table of ours tells what comes of each trial


class Journal(BaseJournalBackend):
    """A file of lines, each appended in one write under a lock that a kill lets go of.

    What Optuna has for this keeps its lock for half a minute after a kill, cannot read on after a line that a kill cut
    off, and waits for the disk at each validation of each trial.
    """

    def __init__(self, path: Path):
        self.folder, self.path = path.parent, path
        self.read = (0, 0)  # so many logs, which take so many bytes
        AppendFile(self.folder, path.name).close()  # so that it is there

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """Return the logs from that number on; one that is being written is not there yet.

        Lines that are no logs are left out, and not counted: a disk may have torn one in the middle.
        """
        number, offset = self.read if self.read[0] <= log_number_from else (0, 0)
        found = []
        try:
            with open_file(self.folder, self.path.name, most=MOST_ROWS_BYTES) as file:
                file.seek(offset)
                while line := file.readline(MOST_LINE_BYTES):
                    if not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES:
                        break
                    offset += len(line)
                    log = read_log(line)
                    if log is None:
                        continue
                    if number >= log_number_from:
                        found.append(log)
                    number += 1
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be read: {failure_reason(self.path, error)}"
            ) from error
        self.read = (number, offset)
        return found

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append lines, after taking away what a kill left of one. Raises RunError when they cannot be written."""
        content = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        journal = AppendFile(self.folder, self.path.name)
        try:
            lock(journal.file, self.path, wait=True)  # until it is closed
            journal.file.truncate(end_of_lines(journal.file))
            journal.append(content)
        finally:
            journal.close()


def read_log(line: bytes) -> dict[str, Any] | None:
    """Return the log of a line of the journal; None if it is none."""
    log = parse_row(line)
    if (
        log is None
        or not isinstance(log.get("op_code"), int)
        or not isinstance(log.get("worker_id"), str)
    ):
        return None
    return log


def end_of_lines(file: Any) -> int:
    """Return where the last whole line ends."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        begin = max(end - 4096, 0)
        file.seek(begin)
        newline = file.read(end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


@lru_cache(maxsize=4)
def storage_in(folder: Path) -> JournalStorage:
    """Return what keeps the study of a sweep folder; all of a process share one, which reads each line once."""
    return JournalStorage(Journal(folder / FILE))


def storage_of(folder: Path) -> JournalStorage:
    """Return the storage of a sweep folder. Raises RunError when its journal cannot be read as one."""
    try:
        return storage_in(folder.resolve())
    except (
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:  # Optuna checks no types
        said = f"{type(error).__name__}: {error}"
        raise RunError(
            f"{folder / FILE} is damaged, so that the search cannot go on: {said}"
        ) from error


def create_study(
    folder: Path, directions: Sequence[Direction], asked: dict[str, Any]
) -> optuna.Study:
    """Make the study of a sweep folder, or go on with it. Raises RunError when that was asked for something else."""
    storage = storage_of(folder)
    study = optuna.create_study(
        storage=storage, study_name=NAME, directions=directions, load_if_exists=True
    )
    for what, value in asked.items():
        before = study.user_attrs.get(what)
        if before is None:
            study.set_user_attr(what, value)
        elif before != value:
            raise RunError(f"{folder} cannot go on with {what} {value}: it began with {before}")
    return study


class Generations(NSGAIISampler):
    """NSGA-II whose parents stand in the order of their numbers, also when they are first chosen and not read back."""

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)


def make_sampler(kind: Sampler, startup: int, seed: int) -> BaseSampler:
    """Return a sampler; the first `startup` trials it draws at random (of nsga2: a generation)."""
    if kind == "tpe":
        return TPESampler(n_startup_trials=startup, seed=seed)
    if kind == "cma_es":
        return CmaEsSampler(n_startup_trials=startup, seed=seed, warn_independent_sampling=False)
    return (
        Generations(population_size=max(startup, 2), seed=seed)
        if kind == "nsga2"
        else RandomSampler(seed=seed)
    )


def make_pruner(kind: Pruner, startup: int, warmup: int) -> BasePruner:
    """Return a pruner that counts validations."""
    if kind == "median":
        return MedianPruner(n_startup_trials=startup, n_warmup_steps=warmup + 1)
    if kind == "halving":
        return SuccessiveHalvingPruner(min_resource=max(warmup, 1), reduction_factor=3)
    if kind == "hyperband":
        return HyperbandPruner(min_resource=max(warmup, 1), reduction_factor=3)
    return NopPruner()


class Judge:
    """Says of a trial under way whether it is worth going on, by what the others had come to at the same point."""

    def __init__(self, sweep: Path, number: int, pruner: BasePruner):
        """Find the trial. Raises RunError when the folder has no study, or the study no such trial."""
        if not (sweep / FILE).is_file():
            raise RunError(f"{sweep} is not the folder of a search: there is no {FILE}")
        storage = storage_of(sweep)
        study = optuna.load_study(
            study_name=NAME, storage=storage, sampler=RandomSampler(), pruner=pruner
        )
        trials = study.get_trials(deepcopy=False)
        if number >= len(trials):
            raise RunError(f"the search in {sweep} has no trial {number}")
        self.metrics = [str(name) for name in study.user_attrs["metric"]]
        self.trial = (
            None if trials[number].state.is_finished() else Trial(study, trials[number]._trial_id)
        )
        self.last = trials[number].last_step or 0

    def prunes(self, value: float, point: int) -> bool:
        """Report a value at the n-th point, and say whether the trial should end there.

        A resumed run comes again by points that it has reported: there it was not to end, or it would have.
        A trial that is over goes on as it likes.
        """
        if self.trial is None or point < self.last:
            return False
        if point > self.last:
            self.trial.report(value, point)
            self.last = point
        return self.trial.should_prune()
