"""Saves checkpoints of a sharded state in a background thread of each process."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from framework.contracts.strategy import StateSaver

from .checkpoint import ShardedSnapshot, commit_sharded, sharded_snapshot
from .snapshot import CopyBuffers


class ShardedWriter:
    """Copies the parts of this process at once and writes the copies in a thread.

    One save is in progress at a time: `submit` waits for the one before. So all processes save the
    same steps, whatever the speed of their disks.

    An error of a save is raised in all processes, by the next `submit`, `check` or `join`.

    Args:
        saver: of the strategy.
        rank: of this process.
    """

    def __init__(self, saver: StateSaver, rank: int):
        self.saver = saver
        self.rank = rank
        self.buffers = CopyBuffers()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def submit(self, folder: Path, *state: Any, then: Callable[[Path], None]) -> None:
        """Copy a state and return; all processes must submit the same steps.

        Args:
            folder: of the checkpoints.
            state: the arguments of `sharded_snapshot`.
            then: is called by the thread of the main process with the written checkpoint.
        """
        self.join()
        copied = sharded_snapshot(*state, rank=self.rank, buffers=self.buffers)
        # A daemon: after the loss of a process, the thread may wait for it until the timeout.
        self.thread = threading.Thread(
            target=partial(self._write, folder, copied, then), name="checkpoint", daemon=True
        )
        self.thread.start()

    def check(self) -> None:
        """Raise the error of a finished save."""
        if self.error is not None:
            error = self.error
            self.error = None
            raise error

    def join(self) -> None:
        """Wait until the submitted state is written, and raise the error of the save."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def _write(self, folder: Path, state: ShardedSnapshot, then: Callable[[Path], None]) -> None:
        try:
            commit_sharded(folder, state, self.saver, then)
        except BaseException as error:  # the training thread raises it
            self.error = error
