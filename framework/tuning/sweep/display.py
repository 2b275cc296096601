"""The display of a running sweep: a live table at a terminal, otherwise a line for each trial."""

import io
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from framework.errors import RunError
from framework.errors.terminal import can_redraw, message_line, print_line, printable
from framework.runs.sweep_files import Trial
from framework.system.files import AppendFile

from .table import Objectives, results_table, table_text

if TYPE_CHECKING:
    from rich.console import Group

REFRESH_SECONDS = 0.25
MAX_ROWS = 12


class Display(Protocol):
    """Shows the progress of a sweep."""

    def trial_started(self, trial: Trial) -> None:
        """Show that a trial has started."""

    def output(self, line: str) -> None:
        """Show a line that a trial has printed."""

    def trial_ended(self, trial: Trial) -> None:
        """Show the result of a trial."""

    def close(self) -> None:
        """End the display."""


class LineDisplay:
    """Prints a line for each trial that ends."""

    def __init__(self, objectives: Objectives):
        self.objectives = objectives
        self.first_with_error: dict[str, int] = {}  # number of the first trial, by error

    def trial_started(self, trial: Trial) -> None:
        """Print nothing."""

    def output(self, line: str) -> None:
        """Print nothing: output of a trial is in its run folder."""

    def trial_ended(self, trial: Trial) -> None:
        parts = [trial_label(trial)]
        metrics = [name for name in self.objectives if name in trial.metrics]
        if trial.state != "done" or not metrics:
            parts.append(trial.state)
        parts += [f"{name} {trial.metrics[name]:.4g}" for name in metrics]
        parts.append(f"{trial.seconds:.1f} s")
        line = "  ".join(parts)
        if trial.error:
            line += f": {self._error_text(trial)}"
        print_line(line, flush=True)

    def _error_text(self, trial: Trial) -> str:
        first = self.first_with_error.setdefault(trial.error, trial.number)
        if first != trial.number:
            return f"the same error as trial {first:03}"
        return message_line(trial.error)

    def close(self) -> None:
        """Do nothing."""


def trial_label(trial: Trial) -> str:
    """Return the number and settings of a trial: 003 lr=0.01 seed=2."""
    settings = [f"{table_text(key)}={table_text(value)}" for key, value in trial.settings.items()]
    return " ".join([f"{trial.number:03}", *settings])


class LiveTable:
    """Shows progress, the last output of the running trials, and the best results, on stderr."""

    def __init__(self, objectives: Objectives, earlier: Sequence[Trial], planned: int | None):
        from rich.live import Live

        from framework.runtime.display.console import console

        self.objectives = objectives
        self.planned = planned
        self.trials = {trial.number: trial for trial in earlier}
        self.running: dict[int, str] = {}  # labels by number
        self.last_line = ""
        self.next_refresh = 0.0
        self.live = Live(
            console=console(sys.stderr),
            transient=True,
            auto_refresh=False,  # no thread
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.live.start()

    def trial_started(self, trial: Trial) -> None:
        self.running[trial.number] = trial_label(trial)
        self.last_line = ""
        self._refresh()

    def output(self, line: str) -> None:
        self.last_line = line
        if time.monotonic() >= self.next_refresh:
            self._refresh()

    def trial_ended(self, trial: Trial) -> None:
        self.running.pop(trial.number, None)
        self.trials[trial.number] = trial
        self._refresh()

    def close(self) -> None:
        self.live.stop()

    def _refresh(self) -> None:
        self.next_refresh = time.monotonic() + REFRESH_SECONDS
        self.live.update(self._content(), refresh=True)

    def _content(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        ended = [trial for trial in self.trials.values() if trial.state != "running"]
        labels = list(self.running.values())[:MAX_ROWS]
        lines = [self._progress(ended), *(f"{label}  {self.last_line}" for label in labels)]
        content: list[Any] = [
            Text(printable(line), no_wrap=True, overflow="ellipsis") for line in lines
        ]
        if ended:
            content.append(results_table(ended, self.objectives, MAX_ROWS))
        return Group(*content)

    def _progress(self, ended: Sequence[Trial]) -> str:
        failed = sum(trial.state == "failed" for trial in ended)
        text = str(len(ended))
        if self.planned:
            text += f" of {self.planned}"
        text += " trials"
        if failed:
            text += f", {failed} failed"
        return text


class ForwardingDisplay:
    """Forwards calls to the display of the parent process."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.lock = threading.Lock()  # the thread of a checkpoint may print as well

    def trial_started(self, trial: Trial) -> None:
        self.send("trial_started", trial)

    def output(self, line: str) -> None:
        self.send("output", line)

    def trial_ended(self, trial: Trial) -> None:
        self.send("trial_ended", trial)

    def close(self) -> None:
        """Do nothing: the parent process closes its display."""

    def send(self, kind: str, argument: Any) -> None:
        """Send the name of a method of the display, or of another message, and its argument."""
        with self.lock:
            self.pipe.send((kind, argument))


def make_display(
    objectives: Objectives, earlier: Sequence[Trial], planned: int | None
) -> LineDisplay | LiveTable:
    """Return a live table if stderr is a terminal, otherwise a display of lines."""
    if can_redraw(sys.stderr):
        return LiveTable(objectives, earlier, planned)
    return LineDisplay(objectives)


class OutputCapture(io.TextIOBase):
    """Writes the output of a trial to a file in its run folder, and shows the last line.

    Output is held back until the folder exists. If the file cannot be written, `write` raises
    RunError once; later output, such as the message of that error, is dropped.
    """

    def __init__(self, folder: Path, display: Display):
        self.folder = folder
        self.display = display
        self.pending = ""
        self.line = ""
        self.has_failed = False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.pending += text
        *lines, self.line = (self.line + text).split("\n")
        shown = [line for line in lines if line.strip()]
        if shown:
            self.display.output(shown[-1])
        if lines and not self.has_failed and self.folder.is_dir():
            self._append()
        return len(text)

    def _append(self) -> None:
        content = self.pending.encode("utf-8", errors="replace")
        self.pending = ""
        try:
            file = AppendFile(self.folder, "output.txt")
            try:
                file.append(content)
            finally:
                file.close()
        except RunError:
            self.has_failed = True
            raise

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Capture stdout and stderr."""
        with redirect_stdout(self), redirect_stderr(self):
            yield
