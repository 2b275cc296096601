"""The progress of a run: a live bar in a terminal or notebook, plain lines elsewhere."""

import math
import sys
import time
from typing import TYPE_CHECKING, Literal, TextIO

from torch.utils.data import DataLoader

from framework import (
    Callback,
    Context,
    Loader,
    PositiveFloat,
    callbacks,
    notebook,
    slow_data,
    terminal,
)
from framework.contracts.callback_protocols import LiveCallback
from framework.contracts.state import State

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.live import Live

PREFIXES = ("train/", "val/")
# These are shown elsewhere, or are no results.
NOT_LISTED = ("train/samples_per_second", "train/seconds_per_epoch", "train/learning_rate")
NOT_LISTED += ("train/communication", "train/waiting", "train/slowest_process")


@callbacks.register("progress")
class Progress(Callback):
    """Shows epoch, step, losses, metrics, samples/s and the remaining time, on stderr.

    In a terminal or notebook it is a live bar; elsewhere a line for each validation and each epoch.
    It shows logged values and never reads the device. Between two updates of the bar, a step only
    reads the clock.

    Args:
        style: a live bar, plain lines, or auto: the bar in a notebook, or if stderr is a terminal.
        per_second: maximum updates of the bar per second.
    """

    changes_training = False
    only_main = True

    def __init__(
        self, style: Literal["auto", "bar", "lines"] = "auto", per_second: PositiveFloat = 5.0
    ):
        self.style = style
        self.interval = 1 / per_second
        self.live: Live | notebook.NotebookDisplay | None = None
        self.next_update = 0.0
        self.validation_seconds = math.inf  # of the last validation
        self.printed_step: int | None = None

    def reset(self) -> None:
        super().reset()
        self.next_update = 0.0
        self.validation_seconds = math.inf
        self.printed_step = None

    def on_fit_start(self, trainer: Context) -> None:
        if self.live is not None:
            self.live.stop()  # from the previous fit of the same trainer
            self.live = None
        self.trainer = trainer
        self.stream = sys.stderr
        self.began = time.monotonic()
        self.first_step = trainer.state.step
        if self.stream is None:  # a process without a console
            return
        if self.style == "lines":
            return
        if notebook.in_notebook():
            self.live = notebook.NotebookDisplay()
        elif self.style == "bar" or terminal.can_redraw(self.stream):
            self.live = open_live(self.stream)
        if self.live is not None:
            self._update_bar()

    def on_step_end(self, trainer: Context) -> None:
        if self.live is not None and time.monotonic() >= self.next_update:
            self._update_bar()

    def on_validation_start(self, trainer: Context) -> None:
        self.validation_began = time.monotonic()
        if self.live is not None and self.validation_seconds > self.interval:
            self._update_bar(validating=True)

    def on_validation_end(self, trainer: Context) -> None:
        self.validation_seconds = time.monotonic() - self.validation_began
        self._print_line(trainer.state)

    def on_epoch_end(self, trainer: Context) -> None:
        self._print_line(trainer.state)

    def on_fit_end(self, trainer: Context) -> None:
        self._print_line(trainer.state)
        advice = data_loader_advice(trainer)
        if advice is None or self.stream is None:
            return
        if self.live is not None and not isinstance(self.live, notebook.NotebookDisplay):
            self.live.console.print(advice, markup=False, highlight=False)  # above the bar
        else:
            terminal.print_line(advice, self.stream, flush=True)

    def on_close(self, trainer: Context) -> None:
        """Show the final state of the bar, and the cursor again; also after an exception."""
        if self.live is not None:
            self._update_bar()
            self.live.stop()
            self.live = None

    def _update_bar(self, validating: bool = False) -> None:
        assert self.live is not None
        self.next_update = time.monotonic() + self.interval
        self.live.update(self._bar(validating), refresh=True)

    def _bar(self, validating: bool) -> "Group":
        """Return progress and speed, training values, validation values, and a live view."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        state = self.trainer.state
        total = state.total_steps or None
        bar = ProgressBar(
            total=total, completed=min(state.step, total or 0), width=16, pulse=total is None
        )
        progress = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(3):
            progress.add_column(no_wrap=True)
        progress.add_row(Text(self._counts(state)), bar, Text("  ".join(self._speed(state))))
        lines: list[RenderableType] = [progress]
        for split in ("train", "val"):
            values = self._values(state, f"{split}/")
            texts = [value.removeprefix(f"{split}/") for value in values]
            if validating and split == "val":
                texts.append("validating")
            if texts:
                title = (f"{split:<6}", "bold cyan")
                lines.append(
                    Text.assemble(title, "  ".join(texts), overflow="ellipsis", no_wrap=True)
                )
        assert self.live is not None
        size = self.live.console.size
        free = size.height - len(lines) - 2
        for callback in self.trainer.callbacks:
            if isinstance(callback, LiveCallback):
                view = callback.live_view(size.width, free)
                if view is not None:
                    lines.append(view)
                    free = 0
        return Group(*lines)

    def _print_line(self, state: State) -> None:
        """Print a line for this step, once, unless there is a bar."""
        if self.live is not None or self.stream is None or self.printed_step == state.step:
            return
        self.printed_step = state.step
        texts = (self._counts(state), *self._values(state), *self._speed(state))
        terminal.print_line("  ".join(texts), self.stream, flush=True)

    def _counts(self, state: State) -> str:
        """Return the current epoch and the completed steps."""
        epochs = self.trainer.max_epochs
        epoch = state.epoch + (state.batch > 0 or state.step == 0)
        return f"epoch {epoch}{of_total(epochs)}  step {state.step}{of_total(state.total_steps)}"

    def _values(self, state: State, prefixes: str | tuple[str, ...] = PREFIXES) -> list[str]:
        """Return the last logged values, such as "val/loss 0.3"."""
        values = []
        for tag, value in state.metrics.items():
            if tag.startswith(prefixes) and not tag.startswith(NOT_LISTED):
                values.append(f"{terminal.title(tag)} {value:.4g}")
        return values

    def _speed(self, state: State) -> list[str]:
        """Return the samples per second and the remaining time, as far as they are known."""
        texts = []
        samples_per_second = state.metrics.get("train/samples_per_second")
        if samples_per_second is not None:
            texts.append(f"{samples_per_second:,.0f} samples/s")
        done = state.step - self.first_step
        remaining = state.total_steps - state.step
        if done > 0 and remaining > 0 and state.stop is None:
            seconds_per_step = (time.monotonic() - self.began) / done
            texts.append(f"ETA {clock(seconds_per_step * remaining)}")
        return texts


def data_loader_advice(trainer: Context) -> str | None:
    """Return advice for a DataLoader without workers that takes much of the time."""
    if isinstance(trainer.train_batches, Loader):  # the experiment itself gives advice on it
        return None
    loader = trainer.train_batches.batches
    share = slow_data(trainer.clock.shares(), trainer.clock.elapsed)
    if share is None or not isinstance(loader, DataLoader) or loader.num_workers > 0:
        return None
    spent = f"{share:.0%} of the time was spent waiting for data"
    return f"{spent}: DataLoader(..., num_workers=2) reads ahead"


def open_live(stream: TextIO) -> "Live":
    """Start a live display without a thread, so that forked workers inherit no locked locks."""
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(file=stream), auto_refresh=False)
    live.start()
    return live


def of_total(total: int | None) -> str:
    """Return "/60", or nothing for an unknown total."""
    return f"/{total}" if total else ""


def clock(seconds: float) -> str:
    """Return 75 seconds as 1:15, an hour as 1:00:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
