"""Progress of a run, cadences (10steps, 1epoch, 5min), and parts with state."""

import copy
import re
from dataclasses import dataclass, field
from signal import Signals
from typing import Annotated, Any

from framework.errors import SettingError, short
from framework.registry.annotations import Pattern
from framework.runtime.display import html
from framework.runtime.shared_time import SHARED_TIME as SHARED_TIME

from .history import History

COUNTERS = ("step", "epoch", "batch", "samples")
NUMBER = r"(?!0+(?:\.0*)?[a-z\s])(\d+(?:\.0+)?|\d+\.\d+(?=\s*(?:s|sec|min|h)\b))"
EVERY = rf"\s*{NUMBER}\s*(steps?|epochs?|s|sec|min|h)\s*"
A_CADENCE = "a cadence like 10steps, 1epoch or 5min (whole steps or epochs)"
Every = Annotated[str, Pattern(EVERY, A_CADENCE)]
SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}

CALLBACK = "callback"  # `Stop.by` if a callback sets `state.stop` to a text


@dataclass(frozen=True)
class Stop:
    """The reason why a run ends before its last step.

    `str(stop)` is the text in status.json and at the terminal.

    Attributes:
        by: the name of the callback that ends the run, such as "early_stop"; "callback" if a
            callback sets `state.stop` to a text, "signal" for a signal.
        reason: a text for the user; for a signal its name, such as "SIGTERM".
        signal: the signal that ends the run, or None.
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
    """Counters of a run. Only the Trainer's loop changes them.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done.
        batch: batches done in the current epoch.
        samples: training samples seen.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of an epoch.
        metrics: the last value of every logged scalar, e.g. {"val/accuracy": 0.97}.
        history: all values that this fit has logged; after a resume, those since then.
        started: the time when the run began, on the monotonic clock.
        reading: how the training batches are read, such as "in memory, 32 batches per read".
        stop: the reason to end before the last step, or None; set by `trainer.stop`.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    samples: int = 0
    total_steps: int = 0
    steps_per_epoch: int = 0
    reading: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    history: History = field(default_factory=History, repr=False)
    started: float = field(default_factory=SHARED_TIME.now)
    _stop: Stop | None = field(default=None, init=False)

    @property
    def stop(self) -> Stop | None:
        """The reason to end before the last step, or None."""
        return self._stop

    @stop.setter
    def stop(self, stop: Stop | str | bool | None) -> None:
        """Set the reason; a text or another value becomes that of a Stop by "callback"."""
        if stop is not None and not isinstance(stop, Stop):
            stop = Stop(CALLBACK, str(stop))
        self._stop = stop

    @property
    def interrupted(self) -> bool:
        """Whether a signal ends the run, which may then be resumed."""
        return self._stop is not None and self._stop.signal is not None

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began, without the time between a stop and a resume."""
        return SHARED_TIME.now() - self.started

    def _repr_html_(self) -> str:
        """Return the counters, the reason of an early end, and the history, for notebooks."""
        counters = f"epoch {self.epoch}, step {self.step:,}"
        if self.total_steps:
            counters += f" of {self.total_steps:,}"
        lines = [html.paragraph(counters, bold=True)]
        if self.stop is not None:
            lines.append(html.paragraph(f"Ended early: {self.stop}"))
        return "".join([*lines, self.history._repr_html_()])

    def state_dict(self) -> dict[str, Any]:
        """Return the values that a resumed run cannot derive, as plain types."""
        return {
            "counters": {name: getattr(self, name) for name in COUNTERS},
            "metrics": dict(self.metrics),
            "wall_seconds": self.wall_seconds,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore a result of `state_dict`.

        Raises:
            SettingError: a counter is unknown or not a number of at least 0.
        """
        for name, value in saved["counters"].items():
            if name not in COUNTERS or type(value) is not int or value < 0:
                raise SettingError(
                    f"resume: counter {name}={short(value)}: "
                    f"expected an int >= 0 for one of {', '.join(COUNTERS)}"
                )
            setattr(self, name, value)
        self.metrics = {
            str(name): value
            for name, value in saved["metrics"].items()
            if isinstance(value, int | float)
        }
        self.started = SHARED_TIME.now() - saved["wall_seconds"]


class Cadence:
    """Tells when something is due: after every n steps, n epochs, or a time on a monotonic clock.

    Args:
        every: such as "10steps", "1epoch" or "5min".
        setting: the name of the setting, for error messages.

    Raises:
        SettingError: `every` is not a cadence.
    """

    def __init__(self, every: str, setting: str = "every"):
        reason = cadence_refused(every)
        if reason is not None:
            raise SettingError(f"{setting}={short(every, quote=False)}: {reason}")
        self.every = every
        self.number, self.unit = parse_cadence(every)
        self.restart()

    def __str__(self) -> str:
        """Return it as words, such as "every 10 steps" or "every epoch"."""
        if self.number == 1:
            return f"every {self.unit}"
        plural = "s" if self.unit in ("step", "epoch") else ""
        return f"every {self.number:g} {self.unit}{plural}"

    def restart(self) -> None:
        """Restart the clock of a cadence in minutes."""
        self._last = SHARED_TIME.now()  # when it was due
        self._checked_step = -1
        self._is_due = False

    def due(self, state: State, *, epoch_end: bool | None = None) -> bool:
        """Return whether it is due. Call it after each step; all calls at a step return the same.

        Args:
            state: the counters after the step.
            epoch_end: whether the step is the last one of its epoch. None: whether no batch of the
                next epoch is done, which is right for callbacks.
        """
        if self.unit == "step":
            return state.step % int(self.number) == 0
        if self.unit == "epoch":
            at_end = state.batch == 0 if epoch_end is None else epoch_end
            return at_end and state.epoch % int(self.number) == 0
        if self._checked_step != state.step:
            self._checked_step = state.step
            now = SHARED_TIME.now()
            self._is_due = now - self._last >= self.number * SECONDS[self.unit]
            if self._is_due:
                self._last = now
        return self._is_due


def parse_cadence(every: str) -> tuple[float, str]:
    """Return the number and the unit of a cadence: step, epoch, s, min or h.

    Raises:
        ValueError: the text is not a cadence.
    """
    match = re.fullmatch(EVERY, every)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"expected {A_CADENCE}")
    number = float(match[1])
    unit = match[2].rstrip("s") if match[2] != "s" else "s"
    return number, unit


def cadence_refused(every: str) -> str | None:
    """Return the reason why a text is not a cadence; None for a cadence."""
    try:
        parse_cadence(every)
    except ValueError as error:
        return str(error)
    return None


class Stateful:
    """Base of parts that keep state during a fit: callbacks and schedules.

    When a fit starts, `reset` is called first, then `load_state_dict` if the fit resumes. Therefore
    a second fit with the same objects gives the result of the first one.

        class Average(Callback):
            total = 0.0

            def state_dict(self) -> dict[str, Any]:
                return {"total": self.total}

            def load_state_dict(self, state: dict[str, Any]) -> None:
                self.total = state.get("total", 0.0)
    """

    _initial: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint must contain, as plain types and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a result of `state_dict`; it is empty if the saved run had no such part."""

    def reset(self) -> None:
        """Clear the state of an earlier fit.

        By default it loads the state that `state_dict` returned at the first call, and restarts
        each attribute that is a `Cadence`. Override it for state that `state_dict` does not return.
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
        except Exception:  # the part has no state before `on_fit_start`, which creates it
            return {}
