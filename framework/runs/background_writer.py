"""Saves checkpoints off the training thread."""

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import commit
from .snapshot import Copies, Snapshot, snapshot


class WriteJob(NamedTuple):
    """A copy of a state that is to be written, and what follows then."""

    folder: Path
    taken: Snapshot
    copies: Copies
    then: Callable[[Path], None]


class Writer:
    """Copies a state at once, and lets a thread write the copies, in the order of their submission.

    However often one saves, there is a write a second at most, and writing takes no more than a fifth of the time: the
    thread rests after each (it would slow down the steps of a small model, as Python runs one thread at a time), and a
    state that waits meanwhile is dropped when it need not be written any more. So a kill costs what came after the
    newest state on the disk: an interval, a second, and what a few writes take. Large states do not pile up in memory;
    the next waits until the one before is written.
    What goes wrong in a save is raised by the next `submit`, `check` or `join`. The program ends when all is written.
    """

    rest = 4.0  # seconds for each second of writing
    pause = 1.0  # seconds, at least
    most_bytes = 256 * 2**20  # of copies, besides one

    def __init__(self) -> None:
        self.jobs: list[WriteJob] = []  # the first may be under way
        self.spare: list[Copies] = []
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None
        self.writing = self.hurry = False
        self.error: BaseException | None = None

    def submit(
        self,
        folder: Path,
        *state: Any,
        then: Callable[[Path], None],
        stays: Collection[int | None] | None = None,
    ) -> None:
        """Copy a state (the arguments of `snapshot`) and return; the thread calls `then` with the written folder.

        stays: the steps whose states must be written though this one is newer; None for all.
        """
        self.check()
        with self.changed:
            if stays is not None:
                self._drop(stays)
            if (
                not self._has_room()
            ):  # only then is the thread woken, which costs as much as the copy
                self.hurry = True
                self.changed.notify_all()
                self.changed.wait_for(self._has_room)
                self.hurry = False
            copies = self.spare.pop() if self.spare else Copies()
        self.check()
        taken = snapshot(*state, copies=copies)
        with self.changed:
            self.jobs.append(WriteJob(folder, taken, copies, then))
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, name="checkpoint")
                self.thread.start()

    def _has_room(self) -> bool:
        return sum(job.taken.nbytes for job in self.jobs) < self.most_bytes

    def _drop(self, stays: Collection[int | None]) -> None:
        for job in self.jobs[self.writing :]:
            if job.taken.step not in stays:
                self.jobs.remove(job)
                self.spare.append(job.copies)

    def _work(self) -> None:
        """Write until there is nothing to write."""
        while (job := self._next()) is not None:
            began = time.monotonic()
            try:
                job.then(commit(job.folder, job.taken))
            except BaseException as error:  # it belongs to the thread that trains
                self.error = error
            with self.changed:
                self.jobs.pop(0)
                self.spare.append(job.copies)
                self.writing = False
                self.changed.notify_all()
                self.changed.wait_for(
                    lambda: self.hurry,
                    timeout=max(self.pause, self.rest * (time.monotonic() - began)),
                )

    def _next(self) -> WriteJob | None:
        """Return what to write now; after an error nothing is written any more."""
        with self.changed:
            if self.error is not None:
                self._drop(())
            if not self.jobs:
                self.thread = None
                return None
            self.writing = True
            return self.jobs[0]

    def check(self) -> None:
        """Raise what went wrong in a save that is over."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def begin_at_once(self) -> None:
        """Rest no more before the next write, until `join`."""
        with self.changed:
            self.hurry = True
            self.changed.notify_all()

    def join(self) -> None:
        """Wait until everything is written; raise what went wrong."""
        self.begin_at_once()
        thread = self.thread
        if thread is not None:
            thread.join()
        self.hurry = False
        self.check()
