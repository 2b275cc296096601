"""Where a run stands, cadences (`every: 10steps | 1epoch | 5min`), and parts with state."""

import copy
import re
import time
from dataclasses import dataclass, field
from signal import Signals
from typing import Annotated, Any

from framework.errors import SettingError, short
from framework.registry.annotations import Pattern

COUNTERS = ("step", "epoch", "batch", "samples")
EVERY = r"\s*(?!0+(?:\.0*)?[a-z\s])(\d+(?:\.\d+)?)\s*(steps?|epochs?|s|sec|min|h)\s*"
Every = Annotated[str, Pattern(EVERY, "a cadence like 10steps, 1epoch or 5min")]
SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


CALLBACK = "callback"  # what ends a run that was given only a text as its reason


@dataclass(frozen=True)
class Stop:
    """Why a run ends before its last step.

    `str(stop)` is the text in status.json and at the terminal.

    Attributes:
        by: the name of the callback that ends the run, such as "early_stop"; "callback" for one
            that sets `state.stop` to a text, "signal" for a signal.
        reason: a text for people; for a signal its name, such as "SIGTERM".
        signal: the signal that ends the run, if it is one.
    """

    by: str
    reason: str
    signal: Signals | None = None

    def __str__(self) -> str:
        if self.by == CALLBACK or self.signal is not None:
            return self.reason
        return f"{self.by}: {self.reason}"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


@dataclass
class State:
    """Counters of a run; they change only in the Trainer's loop.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done.
        batch: batches done in the epoch under way.
        samples: training samples seen.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of an epoch.
        metrics: the last value of every logged scalar, e.g. {"val/accuracy": 0.97}.
        stop: why the run ends before its last step, or None; `trainer.stop` sets it.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    samples: int = 0
    total_steps: int = 0
    steps_per_epoch: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    _stop: Stop | None = field(default=None, init=False)

    @property
    def stop(self) -> Stop | None:
        return self._stop

    @stop.setter
    def stop(self, stop: Stop | str | bool | None) -> None:
        """Set it; a text, or another value such as True, becomes the reason of a Stop by "callback"."""
        if stop is not None and not isinstance(stop, Stop):
            stop = Stop(CALLBACK, str(stop))
        self._stop = stop

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began, without the time between being stopped and resumed."""
        return time.monotonic() - self.started

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run cannot derive, in plain types."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        return {
            "counters": counters,
            "metrics": dict(self.metrics),
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for name, value in saved["counters"].items():
            if name not in COUNTERS or type(value) is not int or value < 0:
                raise SettingError(f"resume: the counter {name} is {short(value)}")
            setattr(self, name, value)
        self.metrics = {
            str(name): value
            for name, value in saved["metrics"].items()
            if isinstance(value, int | float)
        }
        self.started = time.monotonic() - saved["wall_seconds"]


class Cadence:
    """Says when something is due: after every n steps, epochs or minutes (of a clock that never jumps).

    `setting` is what its owner calls it, for the SettingError that a text which is no cadence raises.
    """

    def __init__(self, every: str, setting: str = "every"):
        match = re.fullmatch(EVERY, every)
        if match is None or float(match[1]) <= 0:
            raise SettingError(
                f"{setting} should be a cadence like 10steps, 1epoch or 5min, not {every!r}"
            )
        self.every = every
        self.unit = match[2].rstrip("s") if match[2] != "s" else "s"
        self.number = float(match[1])
        if self.unit in ("step", "epoch") and self.number != int(self.number):
            raise SettingError(f"{setting} should be a whole number of {self.unit}s, not {every!r}")
        self._last = time.monotonic()

    def restart(self) -> None:
        """Start the clock of a cadence in minutes anew."""
        self._last = time.monotonic()

    def due(self, state: State, *, epoch_end: bool = False) -> bool:
        """Whether it is time, asked once after each step (`epoch_end`: the step was the last of its epoch)."""
        if self.unit == "step":
            return state.step % int(self.number) == 0
        if self.unit == "epoch":
            return epoch_end and state.epoch % int(self.number) == 0
        now = time.monotonic()
        if now - self._last < self.number * SECONDS[self.unit]:
            return False
        self._last = now
        return True


class Stateful:
    """Base of parts that keep state during a fit: callbacks and schedules.

    When a fit starts, `reset` is called first, then `load_state_dict` if the fit resumes. Therefore
    a second fit with the same objects equals a first one.
    """

    _initial: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must keep, in plain types."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def reset(self) -> None:
        """Forget what an earlier fit left.

        The default restores the state of the first call with `load_state_dict`, and restarts each
        `Cadence` among the attributes. Override it for state that `state_dict` does not return.
        """
        for value in vars(self).values():
            if isinstance(value, Cadence):
                value.restart()
        if self._initial is None:
            self._initial = self._state_before_first_fit()
        elif self._initial:
            self.load_state_dict(copy.deepcopy(self._initial))

    def _state_before_first_fit(self) -> dict[str, Any]:
        try:
            return copy.deepcopy(self.state_dict())
        except Exception:  # there is none before `on_fit_start`, which makes it anew in each fit
            return {}
