"""The progress of a run at the terminal: a live bar, or plain lines where nobody looks."""

import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any, Literal, TextIO

from torch.utils.data import DataLoader

from framework import Callback, Context, Loader, PositiveFloat, callbacks, slow_data, terminal
from framework.contracts.state import State

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

APART = (
    "train/samples_per_second",
    "train/seconds_per_epoch",
    "train/learning_rate",
)  # has its place, or is no result


@callbacks.register("progress")
class Progress(Callback):
    """Shows epoch, step, losses, metrics, samples/s and the time that remains, on stderr.

    In a terminal a live bar; elsewhere a line for each validation and each epoch. It reads what was logged, never the
    device, and between two drawings a step costs it one look at the clock.
    """

    changes_training = False

    def __init__(
        self, style: Literal["auto", "bar", "lines"] = "auto", per_second: PositiveFloat = 5.0
    ):
        """Say how to show it.

        Args:
            style: a live bar, plain lines, or whichever suits where stderr goes.
            per_second: how often the bar is drawn, at most.
        """
        self.style, self.interval = style, 1 / per_second
        self.live: Live | None = None
        self.next_drawing = 0.0
        self.validation_seconds = math.inf  # that the last one took
        self.printed: Any = None

    def reset(self) -> None:
        super().reset()
        self.next_drawing = 0.0
        self.validation_seconds = math.inf
        self.printed = None

    def on_fit_start(self, trainer: Context) -> None:
        if self.live is not None:
            self.live.stop()  # of the fit before, in a trainer that is still open
            self.live = None
        self.trainer, self.stream = trainer, sys.stderr
        self.began, self.steps_before = time.monotonic(), trainer.state.step
        if self.stream is None:  # a process without a console
            return
        if self.style == "bar" or (self.style == "auto" and is_terminal(self.stream)):
            self.live = open_live(self.stream)
            self._draw("")

    def on_step_end(self, trainer: Context) -> None:
        if self.live is not None and time.monotonic() >= self.next_drawing:
            self._draw("")

    def on_validation_start(self, trainer: Context) -> None:
        self.validating_since = time.monotonic()
        if (
            self.live is not None and self.validation_seconds > self.interval
        ):  # a short one is not worth a drawing
            self._draw("validating")

    def on_validation_end(self, trainer: Context) -> None:
        self.validation_seconds = time.monotonic() - self.validating_since
        self._print(trainer.state)

    def on_epoch_end(self, trainer: Context) -> None:
        self._print(trainer.state)

    def on_fit_end(self, trainer: Context) -> None:
        self._print(trainer.state)
        advice = data_loader_advice(trainer)
        if advice is None or self.stream is None:
            return
        if self.live is not None:
            self.live.console.print(advice, markup=False, highlight=False)
        else:
            terminal.print_line(advice, self.stream, flush=True)

    def on_close(self, trainer: Context) -> None:
        """Leave the bar as it is at the end, and the cursor visible; also after an exception."""
        if self.live is not None:
            self._draw("")
            self.live.stop()
            self.live = None

    def _draw(self, doing: str) -> None:
        assert self.live is not None
        self.next_drawing = time.monotonic() + self.interval
        self.live.update(self._bar(doing), refresh=True)

    def _bar(self, doing: str) -> "Group":
        """Three lines: how far and how fast; the training values; the validation values."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        state = self.trainer.state
        total = state.total_steps or None
        line = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(3):
            line.add_column(no_wrap=True)
        bar = ProgressBar(
            total=total, completed=min(state.step, total or 0), width=16, pulse=total is None
        )
        line.add_row(Text(self._counts(state)), bar, Text("  ".join(self._pace(state))))
        values = [
            Text.assemble(
                (f"{split:<6}", "bold cyan"), "  ".join(shown), overflow="ellipsis", no_wrap=True
            )
            for split in ("train", "val")
            if (shown := self._shown(split, doing))
        ]
        return Group(line, *values)

    def _shown(self, split: str, doing: str) -> list[str]:
        """What stands behind "train" or "val": its values, and that it is being measured."""
        texts = [text for text in self._values(self.trainer.state) if text.startswith(f"{split}/")]
        return [text.removeprefix(f"{split}/") for text in texts] + [doing] * (
            split == "val" and doing != ""
        )

    def _print(self, state: State) -> None:
        """Print a line for this step, unless there is one."""
        if self.live is None and self.stream is not None and self.printed != state.step:
            self.printed = state.step
            texts = (self._counts(state), *self._values(state), *self._pace(state))
            terminal.print_line("  ".join(texts), self.stream, flush=True)

    def _counts(self, state: State) -> str:
        """The epoch under way (of how many) and the steps done."""
        epochs = self.trainer.max_epochs
        epoch = state.epoch + (state.batch > 0 or state.step == 0)
        return f"epoch {epoch}{of(epochs)}  step {state.step}{of(state.total_steps)}"

    def _values(self, state: State) -> list[str]:
        """The training and validation values logged last: "val/loss 0.3"."""
        return [
            f"{terminal.title(name)} {value:.4g}"
            for name, value in state.metrics.items()
            if name.startswith(("train/", "val/")) and not name.startswith(APART)
        ]

    def _pace(self, state: State) -> list[str]:
        """Samples a second, and the time that remains."""
        speed = state.metrics.get("train/samples_per_second")
        shown = [] if speed is None else [f"{speed:,.0f} samples/s"]
        done, left = state.step - self.steps_before, state.total_steps - state.step
        if done > 0 and left > 0 and state.stop is None:
            shown.append(f"ETA {clock((time.monotonic() - self.began) / done * left)}")
        return shown


def data_loader_advice(trainer: Context) -> str | None:
    """Say how to wait less for a DataLoader without workers, if that took much of the time."""
    if isinstance(trainer.train_batches, Loader):  # `data_advice` of an experiment is about it
        return None
    loader = trainer.train_batches.batches
    share = slow_data(trainer.clock.shares(), trainer.clock.elapsed)
    if share is None or not isinstance(loader, DataLoader) or loader.num_workers > 0:
        return None
    return f"{share:.0%} of the time waited for data: DataLoader(..., num_workers=2) reads ahead"


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def open_live(stream: TextIO) -> "Live":
    """Start a live display without a thread of its own, so that forked workers inherit no lock that one holds."""
    from rich.console import Console
    from rich.live import Live

    live = Live(console=Console(file=stream), auto_refresh=False)
    live.start()
    return live


def of(total: int | None) -> str:
    return f"/{total}" if total else ""


def clock(seconds: float) -> str:
    """Return 75 seconds as 1:15, an hour as 1:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
