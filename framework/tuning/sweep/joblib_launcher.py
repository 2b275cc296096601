"""Hydra's joblib launcher, with workers that handle signals and end with the sweep."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.utils import JobReturn
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from joblib import effective_n_jobs

from framework.system.signals import (
    Forward,
    InitWorker,
    blocked,
    ending_exception,
    ending_signals,
    forwarding,
)

from .trial_runner import TrialRunner

POLL_SECONDS = 0.05  # between two checks for a signal


class Joblib(JoblibLauncher):  # type: ignore[misc]  # the package is not typed
    """The launcher `hydra/launcher=joblib`: a worker finishes its step and saves on a signal."""

    joblib: dict[str, Any]

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run jobs in workers; after a signal, jobs that have not started return as stopped."""
        settings = self.joblib
        results: Sequence[JobReturn]
        if effective_n_jobs(settings.get("n_jobs", 1)) == 1:
            results = super().launch(job_overrides, initial_job_idx)  # in this process
            return results
        self.joblib = settings | {"initializer": InitWorker(os.getpid())}
        with forwarding(worker_pids) as forward, watching(forward):
            try:
                results = super().launch(job_overrides, initial_job_idx)
            except BaseException:
                if forward.received is None:
                    raise
                raise ending_exception(forward.received) from None
            finally:
                self.joblib = settings
                if forward.received is not None:
                    stop_workers()  # so that they start no more trials
        if forward.received is not None:
            runner = self.task_function
            if isinstance(runner, TrialRunner) and runner.returns_metric:
                raise ending_exception(forward.received)  # another sweeper would continue
        return results


@contextmanager
def watching(forward: Forward) -> Iterator[None]:
    """Block signals in this thread and forward them from another thread.

    Workers start with the signals of this thread blocked.
    """
    ended = threading.Event()
    numbers = set(ending_signals())

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            for number in numbers & signal.sigpending():
                signal.sigwait([number])
                forward(number, None)
            forward.send_pending()  # for workers that have started since

    with blocked():
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def worker_executor() -> Any:
    """Return joblib's executor of workers, or None if it has none."""
    module: Any = sys.modules.get("joblib.externals.loky.reusable_executor")
    return getattr(module, "_executor", None)


def worker_pids() -> list[int]:
    """Return the process ids of joblib's workers."""
    return list(getattr(worker_executor(), "_processes", None) or ())


def stop_workers() -> None:
    """End joblib's workers."""
    executor = worker_executor()
    if executor is not None:
        executor.shutdown(wait=True, kill_workers=True)
