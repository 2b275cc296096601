"""Saves checkpoints in a background thread."""

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import commit
from .snapshot import CopyBuffers, Snapshot, snapshot


class WriteJob(NamedTuple):
    """A copied state that waits for the thread, and a function to call after it is written."""

    folder: Path
    state: Snapshot
    buffers: CopyBuffers
    then: Callable[[Path], None]


class Writer:
    """Copies states at once and writes the copies in a thread, in the order of their submission.

    After each write the thread rests, because writing slows down the training: for `pause` seconds,
    or for `rest` times the duration of the write if that is longer. A state that waits meanwhile is
    dropped if a newer one replaces it. So a kill costs the work since the newest checkpoint: the
    interval of saving, a second, and the time of a few writes. When the copies need too much
    memory, `submit` waits for the thread.

    An error of a save is raised by the next `submit`, `check` or `join`. The process does not end
    before all submitted states are written.

    Attributes:
        pause: seconds of rest after a write, at least.
        rest: seconds of rest for each second of writing.
        most_bytes: of copies that wait, besides the newest one.
        jobs: submitted states; the first one may be in progress.
        spare: buffers that are reused for the next copies.
    """

    rest = 4.0
    pause = 1.0
    most_bytes = 256 * 2**20

    def __init__(self) -> None:
        self.jobs: list[WriteJob] = []
        self.spare: list[CopyBuffers] = []
        self.changed = threading.Condition()  # guards all other attributes
        self.thread: threading.Thread | None = None
        self.writing = False
        self.blocked = False  # `submit` waits for memory
        self.finishing = False
        self.error: BaseException | None = None

    def submit(
        self,
        folder: Path,
        *state: Any,
        then: Callable[[Path], None],
        stays: Collection[int | None] | None = None,
    ) -> None:
        """Copy a state and return.

        Args:
            folder: of the checkpoints.
            state: the arguments of `snapshot`.
            then: is called by the thread with the written checkpoint.
            stays: the steps whose waiting states must still be written; None for all.
        """
        self.check()
        with self.changed:
            if stays is not None:
                self._drop(stays)
            self._wait_for_memory()
            buffers = self.spare.pop() if self.spare else CopyBuffers()
        self.check()
        job = WriteJob(folder, snapshot(*state, buffers=buffers), buffers, then)
        with self.changed:
            self.jobs.append(job)
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, name="checkpoint")
                self.thread.start()

    def check(self) -> None:
        """Raise the error of a finished save."""
        if self.error is not None:
            error = self.error
            self.error = None
            raise error

    def begin_at_once(self) -> None:
        """Do not rest before the next writes, until `join`."""
        with self.changed:
            self.finishing = True
            self.changed.notify_all()

    def join(self) -> None:
        """Wait until all states are written, and raise the error of a save."""
        self.begin_at_once()
        thread = self.thread
        if thread is not None:
            thread.join()
        self.finishing = False
        self.check()

    def _drop(self, stays: Collection[int | None]) -> None:
        """Drop the waiting states, except those of some steps."""
        first = 1 if self.writing else 0
        for job in self.jobs[first:]:
            if job.state.step not in stays:
                self.jobs.remove(job)
                self.spare.append(job.buffers)

    def _wait_for_memory(self) -> None:
        """Wait until there is memory for another copy; the thread does not rest meanwhile."""
        if self._has_memory():
            return  # without waking the thread, which takes as long as a small copy
        self.blocked = True
        self.changed.notify_all()
        self.changed.wait_for(self._has_memory)
        self.blocked = False

    def _has_memory(self) -> bool:
        return sum(job.state.nbytes for job in self.jobs) < self.most_bytes

    def _work(self) -> None:
        """Write until no state waits."""
        while (job := self._next_job()) is not None:
            began = time.monotonic()
            try:
                job.then(commit(job.folder, job.state))
            except BaseException as error:  # the training thread raises it
                self.error = error
            with self.changed:
                self.jobs.pop(0)
                self.spare.append(job.buffers)
                self.writing = False
                self.changed.notify_all()
                seconds = max(self.pause, self.rest * (time.monotonic() - began))
                self.changed.wait_for(lambda: self.finishing or self.blocked, timeout=seconds)

    def _next_job(self) -> WriteJob | None:
        """Return the next state to write; None if none waits, or after an error."""
        with self.changed:
            if self.error is not None:
                self._drop(())
            if not self.jobs:
                self.thread = None
                return None
            self.writing = True
            return self.jobs[0]
