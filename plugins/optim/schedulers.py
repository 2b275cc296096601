"""Learning rate schedules: given the run's steps, a function from the optimizer step (0 is the first) to a factor.

Lengths (`warmup`, `period`, `decay` ...) are a fraction of the run when below 1, and a number of steps from 1 on.
During a warm-up of w steps the factor rises in a line, (step + 1) / (w + 1); what follows begins at 1. Every factor is
defined for all steps, also after the run's last.
"""

import math
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


def after_warmup(total_steps: int, warmup: float, main: Callable[[int, int], float]) -> Factor:
    """Return the ramp followed by main(step, span), both counted from the ramp's end, with span >= 1."""
    rise = steps(warmup, total_steps)
    span = max(1, total_steps - rise)
    return lambda step: (step + 1) / (rise + 1) if step < rise else main(step - rise, span)


def falling(
    total_steps: int, warmup: float, final: float, shape: Callable[[float], float]
) -> Factor:
    """Return the ramp followed by final + (1 - final) shape(progress), progress from 0 to 1."""
    return after_warmup(
        total_steps, warmup, lambda step, span: final + (1 - final) * shape(min(1.0, step / span))
    )


def times_warmup(total_steps: int, warmup: float, main: Factor) -> Factor:
    """Return the ramp times main(step), for schedules that are laid out over the whole run."""
    rise = steps(warmup, total_steps)
    return lambda step: min(1.0, (step + 1) / (rise + 1)) * main(step)


def half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


@schedulers.register("constant")
def constant(total_steps: int, warmup: NonNegativeFloat = 0.0) -> Factor:
    """1 throughout, after the warm-up.

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
    return falling(total_steps, warmup, final, lambda progress: 1 - progress)


@schedulers.register("cosine")
def cosine(total_steps: int, warmup: NonNegativeFloat = 0.0, final: Fraction = 0.0) -> Factor:
    """Half a cosine from 1 to `final` at the end of the run (Loshchilov and Hutter 2017, eq. 5, without restarts).

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        final: factor at the end of the run.
    """
    return falling(total_steps, warmup, final, half_cosine)


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
        power: 1 is a line; the higher, the earlier the fall.
        final: factor at the end of the run.
    """
    return falling(total_steps, warmup, final, lambda progress: (1 - progress) ** power)


@schedulers.register("exponential")
def exponential(total_steps: int, warmup: NonNegativeFloat = 0.0, final: Decay = 0.01) -> Factor:
    """final^progress: the same ratio each step, from 1 to `final` at the end of the run.

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
    """gamma^k after k periods, counted from the run's first step.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        period: steps (or, below 1, fraction of the run) between two falls.
        gamma: factor of each fall.
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
    """gamma^k after k milestones, counted from the run's first step.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        milestones: steps (or, below 1, fractions of the run) of the falls.
        gamma: factor of each fall.
    """
    falls = [steps(milestone, total_steps) for milestone in milestones]
    return times_warmup(
        total_steps, warmup, lambda step: gamma ** sum(step >= fall for fall in falls)
    )


@schedulers.register("one_cycle")
def one_cycle(
    total_steps: int, warmup: NonNegativeFloat = 0.3, start: Fraction = 0.04, final: Fraction = 4e-6
) -> Factor:
    """Half a cosine from `start` up to 1 and one down to `final` on the last step (Smith and Topin 2018).

    The momentum is left alone.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from `start`.
        start: factor on the first step.
        final: factor on the last step.
    """
    peak = max(0, steps(warmup, total_steps) - 1)  # the last step of the rise is the peak itself
    fall = max(1, total_steps - 1 - peak)

    def factor(step: int) -> float:
        if step < peak:
            return 1 - (1 - start) * half_cosine(step / peak)
        return final + (1 - final) * half_cosine(min(1.0, (step - peak) / fall))

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
    """Warm-up, stable at 1, decay to `final` at the end of the run (Hu et al. 2024, arXiv:2404.06395, section 4).

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        decay: steps (or, below 1, fraction of the run) of the fall at the end.
        shape: linear, half a cosine, or 1 - sqrt(progress) (Hägele et al. 2024, arXiv:2405.18392).
        final: factor at the end of the run.
    """
    length = max(1, steps(decay, total_steps))
    begin = total_steps - length if decay else math.inf

    def fall(step: int) -> float:
        progress = min(1.0, max(0.0, (step - begin) / length))
        return final + (1 - final) * SHAPES[shape](progress)

    return times_warmup(total_steps, warmup, fall)


@schedulers.register("inverse_sqrt", aliases=["noam"])
def inverse_sqrt(total_steps: int, warmup: NonNegativeFloat = 0.0) -> Factor:
    """sqrt((warmup + 1) / (step + 1)) after the warm-up, 1 at its highest (Vaswani et al. 2017, section 5.3).

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
    """
    rise = steps(warmup, total_steps)
    return after_warmup(
        total_steps, warmup, lambda step, span: math.sqrt((rise + 1) / (step + rise + 1))
    )


@schedulers.register("cosine_restarts", aliases=["sgdr"])
def cosine_restarts(
    total_steps: int,
    warmup: NonNegativeFloat = 0.0,
    period: PositiveFloat = 0.25,
    growth: Growth = 1.0,
    final: Fraction = 0.0,
) -> Factor:
    """Half cosines from 1 to `final`, one a period (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5).

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        period: steps (or, below 1, fraction of the run) of the first cosine.
        growth: factor from the length of one cosine to the next.
        final: lowest factor.
    """
    first = max(1, steps(period, total_steps))

    def restarted(step: int, span: int) -> float:
        length, position = float(first), float(step)
        if growth == 1:
            position %= length
        while position >= length:
            position, length = position - length, length * growth
        return final + (1 - final) * half_cosine(position / length)

    return after_warmup(total_steps, warmup, restarted)


@schedulers.register("reduce_on_plateau", aliases=["plateau"])
class ReduceOnPlateau(Schedule):
    """Falls by a factor whenever a validation value has not got better for a while.

    Raises SettingError when the validation has no value of the name `monitor`.

    Args:
        warmup: steps (or, below 1, fraction of the run) in which the factor rises from near 0.
        monitor: the value to watch, as it is logged.
        mode: min when lower is better, max when higher is.
        factor: factor of each fall.
        patience: validations without improvement that are borne before a fall.
        threshold: the least relative improvement that counts.
        cooldown: validations after a fall that are not judged.
        min_factor: lowest factor.
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
        self.rise = steps(warmup, total_steps)
        self.monitor, self.mode, self.threshold = monitor, mode, threshold
        self.factor, self.patience, self.cooldown, self.min_factor = (
            factor,
            patience,
            cooldown,
            min_factor,
        )
        self.scale, self.bad, self.cooling = 1.0, 0, 0
        self.best: float | None = None

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / (self.rise + 1)) * self.scale

    def observe(self, metrics: dict[str, float]) -> None:
        if self.monitor not in metrics:
            hint = did_you_mean(self.monitor, metrics)
            raise SettingError(
                f"scheduler.monitor: no validation value is called {self.monitor!r}; {hint}"
            )
        if self.improves(metrics[self.monitor]):
            self.best, self.bad = metrics[self.monitor], 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling, self.bad = self.cooling - 1, 0
        if self.bad > self.patience:
            self.scale = max(self.scale * self.factor, self.min_factor)
            self.cooling, self.bad = self.cooldown, 0

    def improves(self, value: float) -> bool:
        """Whether a finite value betters the best one by more than the threshold."""
        if not math.isfinite(value):
            return False  # nothing would ever be better than infinity by a share of it
        if self.best is None:
            return True
        sign = 1 if self.mode == "max" else -1
        return sign * (value - self.best) > self.threshold * abs(self.best)

    def state_dict(self) -> dict[str, Any]:
        state = {"scale": self.scale, "bad": self.bad, "cooling": self.cooling, "best": self.best}
        return state | {"monitor": self.monitor, "mode": self.mode}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.bad, self.cooling = state["scale"], state["bad"], state["cooling"]
        best = state["best"]
        self.best = best if best is not None and math.isfinite(best) else None
        watched = state.get("monitor", self.monitor), state.get("mode", self.mode)
        if watched != (self.monitor, self.mode):
            self.bad, self.best = 0, None  # values of another metric are not to be compared with
