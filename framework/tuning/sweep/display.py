"""A sweep at the terminal while it runs: a live table, or a line for each trial where nobody looks."""

import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.errors import RunError
from framework.errors.terminal import message_line, print_line, printable
from framework.system.files import AppendFile

from .folder import Trial
from .table import Direction, table, table_text

if TYPE_CHECKING:
    from rich.console import Group

INTERVAL = 0.25  # seconds between two drawings
MOST_ROWS = 12


class Lines:
    """Prints a line for each trial that ends."""

    def __init__(self, by: Direction):
        self.by = by
        self.errors: dict[str, int] = {}  # the first trial that failed with an error

    def begins(self, trial: Trial) -> None:
        """Nothing is printed of a trial that has just begun."""

    def said(self, line: str) -> None:
        """What a trial prints is in its run folder."""

    def ends(self, trial: Trial) -> None:
        values = [f"{name} {trial.metrics[name]:.4g}" for name in self.by if name in trial.metrics]
        state = [] if trial.state == "done" and values else [trial.state]
        told = "  ".join([label(trial), *state, *values, f"{trial.seconds:.1f} s"])
        if trial.error:
            first = self.errors.setdefault(trial.error, trial.number)
            same = first != trial.number
            told += (
                f": the same error as trial {first:03}"
                if same
                else f": {message_line(trial.error)}"
            )
        print_line(told, flush=True)

    def close(self) -> None:
        """Nothing is open."""


def label(trial: Trial) -> str:
    settings = [f"{table_text(key)}={table_text(value)}" for key, value in trial.settings.items()]
    return " ".join([f"{trial.number:03}", *settings])


class LiveTable:
    """Shows how far a sweep is, what the trial under way prints, and the best so far; on stderr."""

    def __init__(self, by: Direction, earlier: list[Trial], planned: int | None):
        from rich.live import Live

        from framework.runtime.console import console

        self.by, self.planned, self.began = by, planned, time.monotonic()
        self.trials = {trial.number: trial for trial in earlier}
        self.now: dict[int, str] = {}
        self.line, self.next_drawing = "", 0.0
        plain = partial(
            Live, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )  # no thread
        self.live = plain(console=console(sys.stderr), transient=True)
        self.live.start()

    def begins(self, trial: Trial) -> None:
        self.now[trial.number], self.line = label(trial), ""
        self._draw()

    def said(self, line: str) -> None:
        self.line = line
        if time.monotonic() >= self.next_drawing:
            self._draw()

    def ends(self, trial: Trial) -> None:
        self.now.pop(trial.number, None)
        self.trials[trial.number] = trial
        self._draw()

    def close(self) -> None:
        self.live.stop()

    def _draw(self) -> None:
        self.next_drawing = time.monotonic() + INTERVAL
        self.live.update(self._picture(), refresh=True)

    def _picture(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        ended = [trial for trial in self.trials.values() if trial.state != "running"]
        failed = sum(trial.state == "failed" for trial in ended)
        of = f" of {self.planned}" if self.planned else ""
        head = f"{len(ended)}{of} trials" + (f", {failed} failed" if failed else "")
        running = [f"{each}  {self.line}" for each in self.now.values()]
        lines = [printable(text) for text in (head, *running[:MOST_ROWS])]
        texts = [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]
        return Group(*texts, *([table(ended, self.by, MOST_ROWS)] if ended else []))


class Elsewhere:
    """Shows trials in the process that this one was forked from."""

    def __init__(self, pipe: Connection):
        self.pipe, self.lock = pipe, threading.Lock()

    def begins(self, trial: Trial) -> None:
        self.send("begins", trial)

    def said(self, line: str) -> None:
        self.send("said", line)

    def ends(self, trial: Trial) -> None:
        self.send("ends", trial)

    def close(self) -> None:
        """It is closed where it is."""

    def send(self, kind: str, what: Any) -> None:
        """Send what is to be done there; a checkpoint's thread may print as well."""
        with self.lock:
            self.pipe.send((kind, what))


Shown = Lines | LiveTable | Elsewhere


def display(by: Direction, earlier: list[Trial], planned: int | None) -> Lines | LiveTable:
    """Return what suits where stderr goes."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return LiveTable(by, earlier, planned)
    return Lines(by)


class Output(io.TextIOBase):
    """Takes what a trial prints: into a file of its run folder, as soon as there is one; the last line is shown.

    Raises RunError when the file cannot be written, once: what the trial prints while it fails of that is dropped.
    """

    def __init__(self, folder: Path, shown_on: Shown):
        self.folder, self.shown_on = folder, shown_on
        self.pending = self.line = ""
        self.lost = False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.pending += text
        *lines, self.line = (self.line + text).split("\n")
        for line in [line for line in lines if line.strip()][-1:]:
            self.shown_on.said(line)
        if lines and not self.lost and self.folder.is_dir():
            self._append()
        return len(text)

    def _append(self) -> None:
        text, self.pending = self.pending, ""
        try:
            file = AppendFile(self.folder, "output.txt")
            try:
                file.append(text.encode("utf-8", errors="replace"))
            finally:
                file.close()
        except RunError:
            self.lost = True
            raise

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Take what is printed on stdout and stderr."""
        with redirect_stdout(self), redirect_stderr(self):
            yield
