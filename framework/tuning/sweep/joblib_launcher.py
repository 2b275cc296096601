"""Hydra's joblib launcher, with workers that finish their step and save on a signal, and end with the sweep."""

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

from .trials import Trials

POLL_SECONDS = 0.05  # between two looks for a signal


class Joblib(JoblibLauncher):
    """What `hydra/launcher=joblib` stands for."""

    joblib: dict[str, Any]

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run jobs in workers; after a signal those that have not begun return at once, as stopped."""
        if effective_n_jobs(self.joblib.get("n_jobs", 1)) == 1:  # in this process
            return super().launch(job_overrides, initial_job_idx)
        settings = self.joblib
        self.joblib = settings | {"initializer": InitWorker(os.getpid())}
        with forwarding(worker_pids) as forward, watching(forward):
            try:
                done = super().launch(job_overrides, initial_job_idx)
            except BaseException:
                if forward.received is None:
                    raise
                raise ending_exception(forward.received) from None
            finally:
                self.joblib = settings
                if forward.received is not None:
                    stop_workers()  # they begin no more trials, whatever they are asked
        if (
            forward.received is not None
            and isinstance(self.task_function, Trials)
            and self.task_function.gives_value
        ):
            raise ending_exception(forward.received)  # another sweeper would go on
        return done


@contextmanager
def watching(forward: Forward) -> Iterator[None]:
    """Block signals in this thread, so that workers start with blocked ones, and forward them from another thread."""
    over = threading.Event()
    numbers = set(ending_signals())

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            for number in numbers & signal.sigpending():
                signal.sigwait([number])
                forward(number, None)
            forward.send_pending()  # workers that have started since

    with blocked():
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def executor() -> Any:
    """Return joblib's executor of workers, or None when there is none."""
    module: Any = sys.modules.get("joblib.externals.loky.reusable_executor")
    return getattr(module, "_executor", None)


def worker_pids() -> list[int]:
    return list(getattr(executor(), "_processes", None) or ())


def stop_workers() -> None:
    running = executor()
    if running is not None:
        running.shutdown(wait=True, kill_workers=True)
