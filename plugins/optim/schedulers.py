"""Learning rate schedules: functions from the optimizer step (0 is the first) to a factor.

Lengths (`warmup`, `period`, `decay` ...) are a fraction of the run if below 1, else a number of
steps. During a warm-up of w steps the factor rises linearly, (step + 1) / (w + 1); the schedule
after it starts at 1. Every factor is defined for all steps, also after the end of the run.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Annotated, Any, Literal

from framework import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Range,
    Schedule,
    SettingError,
    did_you_mean,
    schedulers,
)

Factor = Callable[[int], float]
Growth = Annotated[float, Range("[1, inf)")]
Decay = Annotated[float, Range("(0, 1]")]


def steps(length: float, total_steps: int) -> int:
    """Return a length in steps: a fraction of the run when below 1."""
    return round(length * total_steps if length < 1 else length)


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Return the factor of a warm-up: (step + 1) / (warmup_steps + 1), and 1 after it."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def after_warmup(total_steps: int, warmup: float, main: Callable[[int, int], float]) -> Factor:
    """Return a warm-up followed by main(step, span).

    `step` and the number of remaining steps `span` (at least 1) are counted from the end of the
    warm-up.
    """
    warmup_steps = steps(warmup, total_steps)
    span = max(1, total_steps - warmup_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return warmup_factor(step, warmup_steps)
        return main(step - warmup_steps, span)

    return factor


def decay_after_warmup(
    total_steps: int, warmup: float, final: float, shape: Callable[[float], float]
) -> Factor:
    """Return a warm-up followed by a decay to `final` at the end of the run.

    Args:
        total_steps: of the run.
        warmup: steps (or, below 1, fraction of the run) of the warm-up.
        final: factor at the end of the run.
        shape: maps the progress, from 0 to 1, to a number from 1 to 0; see `interpolate`.
    """

    def decay(step: int, span: int) -> float:
        return interpolate(final, shape(min(1.0, step / span)))

    return after_warmup(total_steps, warmup, decay)


def times_warmup(total_steps: int, warmup: float, main: Factor) -> Factor:
    """Return a warm-up times main(step), for schedules over all steps of the run."""
    warmup_steps = steps(warmup, total_steps)
    return lambda step: warmup_factor(step, warmup_steps) * main(step)


def interpolate(low: float, share: float) -> float:
    """Return `low` for share 0 and 1 for share 1, and linearly between."""
    return low + (1 - low) * share


def half_cosine(progress: float) -> float:
    """Return half a cosine from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


@schedulers.register("constant")
def constant(total_steps: int, warmup: NonNegativeFloat = 0.0) -> Factor:
    """Constant 1 after the warm-up.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
    """
    return after_warmup(total_steps, warmup, lambda step, span: 1.0)


@schedulers.register("linear")
def linear(total_steps: int, warmup: NonNegativeFloat = 0.0, final: Fraction = 0.0) -> Factor:
    """A line from 1 to `final` at the end of the run.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        final: factor at the end of the run.
    """
    return decay_after_warmup(total_steps, warmup, final, lambda progress: 1 - progress)


@schedulers.register("cosine")
def cosine(total_steps: int, warmup: NonNegativeFloat = 0.0, final: Fraction = 0.0) -> Factor:
    """Half a cosine from 1 to `final` at the end of the run.

    Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5, without restarts.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        final: factor at the end of the run.
    """
    return decay_after_warmup(total_steps, warmup, final, half_cosine)


@schedulers.register("polynomial", aliases=["poly"])
def polynomial(
    total_steps: int,
    warmup: NonNegativeFloat = 0.0,
    power: PositiveFloat = 2.0,
    final: Fraction = 0.0,
) -> Factor:
    """(1 - progress)^power, from 1 to `final` at the end of the run.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        power: exponent; 1 is a line, and higher powers decay earlier.
        final: factor at the end of the run.
    """
    return decay_after_warmup(total_steps, warmup, final, lambda progress: (1 - progress) ** power)


@schedulers.register("exponential")
def exponential(total_steps: int, warmup: NonNegativeFloat = 0.0, final: Decay = 0.01) -> Factor:
    """final^progress: exponential decay from 1 to `final` at the end of the run.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        final: factor at the end of the run.
    """
    return after_warmup(total_steps, warmup, lambda step, span: final ** min(1.0, step / span))


@schedulers.register("step")
def step(
    total_steps: int,
    warmup: NonNegativeFloat = 0.0,
    period: PositiveFloat = 0.3,
    gamma: Decay = 0.1,
) -> Factor:
    """gamma^k after k periods, counted from the first step of the run.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        period: steps (or, below 1, fraction of the run) between two reductions.
        gamma: factor of each reduction.
    """
    length = max(1, steps(period, total_steps))
    return times_warmup(total_steps, warmup, lambda step: gamma ** (step // length))


@schedulers.register("multi_step")
def multi_step(
    total_steps: int,
    warmup: NonNegativeFloat = 0.0,
    milestones: tuple[PositiveFloat, ...] = (0.5, 0.75),
    gamma: Decay = 0.1,
) -> Factor:
    """gamma^k after k milestones, counted from the first step of the run.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        milestones: steps (or, below 1, fractions of the run) of the reductions.
        gamma: factor of each reduction.
    """
    milestone_steps = sorted(steps(milestone, total_steps) for milestone in milestones)
    return times_warmup(
        total_steps, warmup, lambda step: gamma ** bisect_right(milestone_steps, step)
    )


@schedulers.register("one_cycle")
def one_cycle(
    total_steps: int, warmup: NonNegativeFloat = 0.3, start: Fraction = 0.04, final: Fraction = 4e-6
) -> Factor:
    """Half a cosine from `start` up to 1, then one down to `final` on the last step.

    Smith and Topin 2018, arXiv:1708.07120. The momentum does not change.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from `start`.
        start: factor on the first step.
        final: factor on the last step.
    """
    peak = max(0, steps(warmup, total_steps) - 1)  # the last step of the warm-up is the peak
    fall = max(1, total_steps - 1 - peak)

    def factor(step: int) -> float:
        if step < peak:
            return 1 - (1 - start) * half_cosine(step / peak)
        return interpolate(final, half_cosine(min(1.0, (step - peak) / fall)))

    return factor


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": half_cosine,
    "sqrt": lambda progress: 1 - math.sqrt(progress),
}


@schedulers.register("wsd", aliases=["trapezoid"])
def wsd(
    total_steps: int,
    warmup: NonNegativeFloat = 0.0,
    decay: NonNegativeFloat = 0.2,
    shape: Literal["linear", "cosine", "sqrt"] = "linear",
    final: Fraction = 0.0,
) -> Factor:
    """Warm-up, constant 1, then decay to `final` at the end of the run (Hu et al. 2024).

    arXiv:2404.06395, section 4.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        decay: steps (or, below 1, fraction of the run) of the decay at the end.
        shape: of the decay: linear, half a cosine, or 1 - sqrt(progress) (Hägele et al. 2024,
            arXiv:2405.18392).
        final: factor at the end of the run.
    """
    length = max(1, steps(decay, total_steps))
    begin = total_steps - length if decay else math.inf

    def fall(step: int) -> float:
        progress = min(1.0, max(0.0, (step - begin) / length))
        return interpolate(final, SHAPES[shape](progress))

    return times_warmup(total_steps, warmup, fall)


@schedulers.register("inverse_sqrt", aliases=["noam"])
def inverse_sqrt(total_steps: int, warmup: NonNegativeFloat = 0.0) -> Factor:
    """sqrt((warmup + 1) / (step + 1)) after the warm-up; the maximum is 1.

    Vaswani et al. 2017, arXiv:1706.03762, section 5.3.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
    """
    warmup_steps = steps(warmup, total_steps)

    def decay(step: int, span: int) -> float:
        return math.sqrt((warmup_steps + 1) / (step + warmup_steps + 1))

    return after_warmup(total_steps, warmup, decay)


@schedulers.register("cosine_restarts", aliases=["sgdr"])
def cosine_restarts(
    total_steps: int,
    warmup: NonNegativeFloat = 0.0,
    period: PositiveFloat = 0.25,
    growth: Growth = 1.0,
    final: Fraction = 0.0,
) -> Factor:
    """Half a cosine from 1 to `final` in each period (Loshchilov and Hutter 2017).

    arXiv:1608.03983, equation 5.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        period: steps (or, below 1, fraction of the run) of the first cosine.
        growth: factor by which each cosine is longer than the one before it.
        final: lowest factor.
    """
    first = max(1, steps(period, total_steps))

    def with_restarts(step: int, span: int) -> float:
        length = float(first)
        position = float(step)
        if growth == 1:
            position %= length
        while position >= length:
            position -= length
            length *= growth
        return interpolate(final, half_cosine(position / length))

    return after_warmup(total_steps, warmup, with_restarts)


@schedulers.register("reduce_on_plateau", aliases=["plateau"])
class ReduceOnPlateau(Schedule):
    """Reduce the factor when a validation value has stopped improving.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        monitor: name of the monitored value, as it is logged.
        mode: min: lower is better; max: higher is better.
        factor: factor of each reduction.
        patience: number of validations without improvement that do not reduce the factor yet.
        threshold: smallest relative improvement that counts.
        cooldown: number of validations after a reduction that do not count.
        min_factor: lowest factor.

    Raises:
        SettingError: the validation has no value called `monitor`.
    """

    def __init__(
        self,
        total_steps: int,
        warmup: NonNegativeFloat = 0.0,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        factor: Decay = 0.1,
        patience: NonNegativeInt = 10,
        threshold: NonNegativeFloat = 1e-4,
        cooldown: NonNegativeInt = 0,
        min_factor: Fraction = 0.0,
    ):
        self.warmup_steps = steps(warmup, total_steps)
        self.monitor = monitor
        self.mode = mode
        self.factor = factor
        self.patience = patience
        self.threshold = threshold
        self.cooldown = cooldown
        self.min_factor = min_factor
        self.scale = 1.0
        self.bad = 0
        self.cooling = 0
        self.best: float | None = None

    def __call__(self, step: int) -> float:
        return warmup_factor(step, self.warmup_steps) * self.scale

    def observe(self, metrics: dict[str, float]) -> None:
        if self.monitor not in metrics:
            hint = did_you_mean(self.monitor, metrics)
            raise SettingError(
                f"scheduler.monitor={self.monitor}: there is no such validation value; {hint}"
            )
        value = metrics[self.monitor]
        if self.improves(value):
            self.best = value
            self.bad = 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.bad = 0
        if self.bad > self.patience:
            self.scale = max(self.scale * self.factor, self.min_factor)
            self.cooling = self.cooldown
            self.bad = 0

    def improves(self, value: float) -> bool:
        """Return whether a finite value is better than the best one by more than the threshold."""
        if not math.isfinite(value):
            return False  # no later value would be better than infinity by a fraction of it
        if self.best is None:
            return True
        sign = 1 if self.mode == "max" else -1
        return sign * (value - self.best) > self.threshold * abs(self.best)

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "bad": self.bad,
            "cooling": self.cooling,
            "best": self.best,
            "monitor": self.monitor,
            "mode": self.mode,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale = state["scale"]
        self.bad = state["bad"]
        self.cooling = state["cooling"]
        best = state["best"]
        self.best = best if best is not None and math.isfinite(best) else None
        same_monitor = state.get("monitor", self.monitor) == self.monitor
        same_mode = state.get("mode", self.mode) == self.mode
        if not same_monitor or not same_mode:  # values of another metric are not comparable
            self.bad = 0
            self.best = None
