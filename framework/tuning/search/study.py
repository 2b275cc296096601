"""The Optuna study of a search: its journal in the sweep folder, its samplers and its pruners.

`study.journal` is a file of Optuna, a JSON object a line; `sweep.jsonl` records the results.
"""

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

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
OptunaDirection = Literal["minimize", "maximize"]
JOURNAL_FILE = "study.journal"
STUDY_NAME = "search"
BLOCK_BYTES = 4096

optuna.logging.set_verbosity(optuna.logging.ERROR)  # the table of the sweep shows the results


class Journal(BaseJournalBackend):
    """Optuna's journal, with a lock and lines that survive a kill.

    `optuna.storages.journal.JournalFileBackend` (5.0) writes the same lines, but after a kill its
    lock blocks others for 30 seconds, and it appends to a torn last line, which makes the file
    unreadable. It also calls fsync for each validation of a trial, and reports a full disk as an
    OSError.
    """

    def __init__(self, path: Path):
        self.folder = path.parent
        self.path = path
        self.logs_read = 0
        self.bytes_read = 0
        AppendFile(self.folder, path.name).close()  # creates the file

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """Return the logs from a number on, without a last one that is being written.

        Lines that are not logs, such as those torn by a disk error, are skipped and not counted.
        """
        number = self.logs_read
        offset = self.bytes_read
        if number > log_number_from:
            number = offset = 0
        logs = []
        try:
            with open_file(self.folder, self.path.name, most=MOST_ROWS_BYTES) as file:
                file.seek(offset)
                while line := file.readline(MOST_LINE_BYTES):
                    if not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES:
                        break
                    offset += len(line)
                    log = parse_log(line)
                    if log is None:
                        continue
                    if number >= log_number_from:
                        logs.append(log)
                    number += 1
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be read: {failure_reason(self.path, error)}"
            ) from error
        self.logs_read = number
        self.bytes_read = offset
        return logs

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append lines in one write.

        Part of a line at the end of the file, left by a kill, is removed.

        Raises:
            RunError: the lines cannot be written.
        """
        lines = [json.dumps(log, separators=(",", ":")) + "\n" for log in logs]
        journal = AppendFile(self.folder, self.path.name)
        try:
            lock(journal.file, self.path, wait=True)  # released when the file is closed
            journal.file.truncate(end_of_last_line(journal.file))
            journal.append("".join(lines).encode())
        finally:
            journal.close()


def parse_log(line: bytes) -> dict[str, Any] | None:
    """Return the log in a line of the journal, or None if there is none."""
    log = parse_row(line)
    if log is None:
        return None
    is_log = isinstance(log.get("op_code"), int) and isinstance(log.get("worker_id"), str)
    return log if is_log else None


def end_of_last_line(file: BinaryIO) -> int:
    """Return the offset after the last newline of a file."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(end - BLOCK_BYTES, 0)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


@lru_cache(maxsize=4)
def cached_storage(folder: Path) -> JournalStorage:
    """Return the storage of a sweep folder, one for a process, so that it reads each line once."""
    return JournalStorage(Journal(folder / JOURNAL_FILE))


def open_storage(folder: Path) -> JournalStorage:
    """Return the storage of a sweep folder.

    Raises:
        RunError: the journal is damaged.
    """
    try:
        return cached_storage(folder.resolve())
    except (LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        # Optuna does not check the types in a journal.
        raise RunError(
            f"{folder / JOURNAL_FILE} is damaged, the search cannot be resumed: "
            f"{type(error).__name__}: {error}"
        ) from error


def create_study(
    folder: Path, directions: Sequence[OptunaDirection], request: dict[str, Any]
) -> optuna.Study:
    """Create the study of a sweep folder, or load it.

    Args:
        folder: the sweep folder.
        directions: the direction of each objective.
        request: settings that must stay the same when a search is resumed, by name.

    Raises:
        RunError: the existing study was created for another request.
    """
    study = optuna.create_study(
        storage=open_storage(folder),
        study_name=STUDY_NAME,
        directions=directions,
        load_if_exists=True,
    )
    for name, value in request.items():
        before = study.user_attrs.get(name)
        if before is None:
            study.set_user_attr(name, value)
        elif before != value:
            raise RunError(
                f"{folder} cannot be resumed with {name}={value}: it was started with {before}"
            )
    return study


class Generations(NSGAIISampler):
    """NSGA-II with parents ordered by number, both when they are chosen and when they are read.

    Optuna stores the name of this class in journals.
    """

    def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        parents = super().select_parent(study, generation)
        return sorted(parents, key=lambda trial: trial.number)


def make_sampler(kind: Sampler, startup: int, seed: int) -> BaseSampler:
    """Return a sampler, with `startup` random trials; for nsga2 that is the population size."""
    if kind == "tpe":
        return TPESampler(n_startup_trials=startup, seed=seed)
    if kind == "cma_es":
        return CmaEsSampler(n_startup_trials=startup, seed=seed, warn_independent_sampling=False)
    if kind == "nsga2":
        return Generations(population_size=max(startup, 2), seed=seed)
    return RandomSampler(seed=seed)


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
    """Decides whether a trial is pruned, by comparison with the other trials of its search.

    Attributes:
        metrics: names of the metrics that the search compares trials by.
        last: number of the last reported validation; 0 for none.
    """

    def __init__(self, sweep: Path, number: int, pruner: BasePruner):
        """Load the study.

        Args:
            sweep: the sweep folder.
            number: the number of the trial.
            pruner: decides by the reported values.

        Raises:
            RunError: the folder has no study, or the study no such trial.
        """
        if not (sweep / JOURNAL_FILE).is_file():
            raise RunError(f"{sweep} is not the folder of a search: it contains no {JOURNAL_FILE}")
        study = optuna.load_study(
            study_name=STUDY_NAME,
            storage=open_storage(sweep),
            sampler=RandomSampler(),
            pruner=pruner,
        )
        trials = study.get_trials(deepcopy=False)
        if number >= len(trials):
            raise RunError(f"the search in {sweep} has no trial {number}")
        trial = trials[number]
        self.metrics = [str(name) for name in study.user_attrs["metric"]]
        self.last = trial.last_step or 0
        self.trial: Trial | None = None
        if not trial.state.is_finished():
            self.trial = Trial(study, trial._trial_id)

    def prunes(self, value: float, point: int) -> bool:
        """Report the value of the n-th validation, and return whether the trial is pruned there.

        A resumed run reports points a second time: it was not pruned there. A finished trial is
        never pruned.
        """
        if self.trial is None or point < self.last:
            return False
        if point > self.last:
            self.trial.report(value, point)
            self.last = point
        return self.trial.should_prune()
