"""Find a learning rate or a batch size before a long run."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from framework.composition.spec import Spec
from framework.contracts.callback import Callback
from framework.contracts.context import Context
from framework.errors import RunError
from framework.experiment.experiment import Experiment
from framework.experiment.plan import base_rate
from framework.experiment.plan_text import CURVE_COLUMNS, CURVE_ROWS
from framework.runtime.display.plot import braille, ends, with_labels
from framework.runtime.memory import OutOfMemory
from framework.runtime.threads import intra_op_threads
from framework.training.trainer import Trainer
from framework.training.validation import check_has_rate

LOWEST_RATE = 1e-7
HIGHEST_RATE = 10.0
SMOOTHING = 0.9  # of the exponential mean of the losses
DIVERGED = 4.0  # times the lowest smoothed loss, at which a range test ends
LEAST_LOSSES = 20  # of a range test
UNSTABLE = 10  # steps at the beginning, whose smoothed losses are means of fewer losses
SLOPE_STEPS = 7  # smoothed losses of a slope: half a decade of 100 steps
WARM_UP_STEPS = 2  # of each batch size
TIMED_SECONDS = 0.5  # of each batch size
GAIN = 1.05  # factor on the speed that justifies a batch size twice as large


@dataclass
class RangeTest:
    """A learning rate range test.

    Attributes:
        rates: the learning rates of its steps.
        losses: the smoothed loss at each rate.
        suggestion: the rate at which the loss falls most steeply.
        lowest: the rate at which the loss is lowest. Rates between these two train well.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float
    lowest: float


class RangeLosses(Callback):
    """Keeps the loss of each step, also smoothed, and ends the run when the loss diverges."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.mean = 0.0

    def on_step_end(self, trainer: Context) -> None:
        self.losses.append(float(trainer.loss))
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * self.losses[-1]
        self.smoothed.append(self.mean / (1 - SMOOTHING ** len(self.losses)))
        diverges = self.smoothed[-1] > DIVERGED * min(self.smoothed)
        if diverges or not math.isfinite(self.smoothed[-1]):
            trainer.stop("find", "the loss diverges")


def find_learning_rate(spec: Spec, steps: int = 100) -> RangeTest:
    """Raise the learning rate with each step, from 1e-7 to 10, and return the losses.

    The method is from Smith 2017, arXiv:1506.01186, section 3.3. The model is discarded.

    Args:
        steps: of the test, unless the loss diverges before.

    Raises:
        RunError: the loss falls at no rate by more than its noise, or diverges at once.
    """
    built = Experiment(spec)
    check_has_rate(built.optimizer)
    base = base_rate(built.optimizer)
    for group in built.optimizer.param_groups:
        group["lr"] /= base  # groups keep their factors on the rate

    def rate(step: int) -> float:
        return LOWEST_RATE * math.pow(HIGHEST_RATE / LOWEST_RATE, step / (steps - 1))

    kept = RangeLosses()
    with trainer_without_files(built, [kept], max_steps=steps) as trainer:
        trainer.fit(**fit_arguments(built), schedule=rate)
    losses = [loss for loss in kept.smoothed if math.isfinite(loss)]
    rates = [rate(step) for step in range(len(losses))]
    if len(losses) < LEAST_LOSSES:
        raise RunError(
            f"the loss diverges after {len(losses)} steps, at a learning rate of "
            f"{rate(len(losses)):.1g}"
        )
    steepest, lowest = select_steps(kept.losses[: len(losses)], losses)
    return RangeTest(rates, losses, rates[steepest], rates[lowest])


def select_steps(losses: Sequence[float], smoothed: Sequence[float]) -> tuple[int, int]:
    """Return the step at which the loss falls most steeply, and the one at which it is lowest.

    The first smoothed losses are means of few losses, so their slopes are large where the loss is
    flat and noisy. They are left out, and a slope is that of a line through several losses.

    Args:
        losses: of each step of a range test, at least LEAST_LOSSES.
        smoothed: the same losses, smoothed.

    Raises:
        RunError: the loss falls by less than the standard deviation of the first losses.
    """
    windows = torch.tensor(losses, dtype=torch.float64).unfold(0, UNSTABLE, 1)
    means = windows.mean(1)
    if means[0] - means.min() <= windows[0].std():
        raise RunError(
            "no learning rate from 1e-7 to 10 reduces the loss by more than its noise: check the "
            "data and the model"
        )
    stable = torch.tensor(smoothed[UNSTABLE - SLOPE_STEPS // 2 :], dtype=torch.float64)
    lines = stable.unfold(0, SLOPE_STEPS, 1)  # the first one is around the step UNSTABLE
    positions = torch.arange(SLOPE_STEPS, dtype=torch.float64) - SLOPE_STEPS // 2
    slopes = lines @ positions
    lowest = min(range(UNSTABLE, len(smoothed)), key=smoothed.__getitem__)
    steepest = UNSTABLE + int(slopes[: lowest - UNSTABLE + 1].argmin())
    return steepest, lowest


@dataclass
class Speed:
    """The speed of a batch size.

    Attributes:
        samples_per_second: None if the memory was full.
        memory: the peak on CUDA, in bytes.
    """

    batch_size: int
    samples_per_second: float | None
    memory: int | None = None


def find_batch_size(spec: Spec, most: int = 2**14) -> Iterator[Speed]:
    """Double the batch size until the memory is full or the data is too small; yield each speed.

    Args:
        most: the largest batch size; the smallest one is 8.
    """
    data = None
    size = 8
    while size <= most:
        loader = spec.sections["loader"] | {"batch_size": size}
        sized = replace(spec, sections=spec.sections | {"loader": loader})
        built = Experiment(sized, data)
        data = built.data
        if len(built.train_batches.split) < size:
            return
        speed = measure_batch_size(built, size)
        yield speed
        if speed.samples_per_second is None:
            return
        size *= 2


def suggested(speeds: Sequence[Speed]) -> Speed:
    """Return the smallest batch size that is nearly as fast as the fastest one.

    Raises:
        RunError: none fits into the memory.
    """
    fitting = [speed for speed in speeds if speed.samples_per_second is not None]
    if not fitting:
        raise RunError(
            "not even 8 samples fit into memory: choose a smaller model, or set trainer.micro_batch"
        )
    best = max(speed.samples_per_second or 0 for speed in fitting)
    return next(speed for speed in fitting if (speed.samples_per_second or 0) * GAIN >= best)


class StepTimes(Callback):
    """Keeps the time at the end of each step, and ends the run after a while."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, trainer: Context) -> None:
        trainer.loss.item()  # waits for the end of the step
        self.times.append(time.perf_counter())
        if len(self.times) <= WARM_UP_STEPS + 1:
            return
        if self.times[-1] - self.times[WARM_UP_STEPS] > TIMED_SECONDS:
            trainer.stop("find", "measured")


def measure_batch_size(built: Experiment, size: int) -> Speed:
    """Train a few steps and return their speed.

    Args:
        size: of a batch in the experiment.
    """
    step_times = StepTimes()
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        with trainer_without_files(built, [step_times], max_steps=200) as trainer:
            trainer.fit(**fit_arguments(built))
    except OutOfMemory:
        return Speed(size, None)
    times = step_times.times[WARM_UP_STEPS:]
    seconds = times[-1] - times[0]
    memory = torch.cuda.max_memory_allocated() if has_cuda else None
    return Speed(size, size * (len(times) - 1) / seconds, memory)


@contextmanager
def trainer_without_files(
    built: Experiment, callbacks: Sequence[Callback], max_steps: int
) -> Iterator[Trainer]:
    """Yield a trainer of the experiment that writes nothing.

    Args:
        callbacks: instead of those of the experiment.
        max_steps: instead of the limits of the experiment.
    """
    limits = {"max_epochs": None, "max_steps": max_steps, "profile": False, "devices": None}
    trainer = Trainer(
        **(built.spec.sections["trainer"] | limits),
        seed=built.spec.seed,
        callbacks=[*built.transforms, *callbacks],
    )
    with intra_op_threads(built.threads()):
        yield trainer


def fit_arguments(built: Experiment) -> dict[str, Any]:
    """Return the arguments of `Trainer.fit`, without those of validation."""
    return {
        "model": built.model,
        "data": built.train_batches,
        "task": built.task,
        "optimizer": built.optimizer,
        "metrics": built.metrics,
    }


def show_learning_rates(spec: Spec) -> dict[str, Any]:
    """Print the curve of a learning rate range test and the suggested rate; return them."""
    found = find_learning_rate(spec)
    bottom = min(found.losses)
    top = min(max(found.losses), 2 * found.losses[0] - bottom)  # the fall has half of the height
    losses = [min(loss, top) for loss in found.losses]
    lines = braille(losses, CURVE_COLUMNS, CURVE_ROWS, bottom, top)
    first = f"{found.rates[0]:.1g}"
    last = f"{found.rates[-1]:.2g}"
    below = ends(first, last, CURVE_COLUMNS, "loss over the learning rate, logarithmic")
    for line in with_labels(lines, f"{top:.3g}", f"{bottom:.3g}", below):
        print(line.plain)
    print(f"suggest  optimizer.lr={found.suggestion:.2g}, where the loss decreases fastest")
    print(f"         the loss is lowest at {found.lowest:.2g}; do not use a larger learning rate")
    return asdict(found)


def show_batch_sizes(spec: Spec) -> dict[str, Any]:
    """Print the speed of each batch size when it is measured, and the suggested one; return all."""
    speeds = []
    for speed in find_batch_size(spec):
        speeds.append(speed)
        print_speed(speed)
    size = suggested(speeds).batch_size
    print(f"suggest  loader.batch_size={size}; a larger one is less than 5 % faster")
    return {"measured": [asdict(speed) for speed in speeds], "suggestion": size}


def print_speed(speed: Speed) -> None:
    """Print a batch size with its speed and memory."""
    rate = "memory is full"
    if speed.samples_per_second is not None:
        rate = f"{speed.samples_per_second:10,.0f} samples/s"
    memory = "" if speed.memory is None else f"  {speed.memory / 2**30:.2f} GiB"
    print(f"batch_size {speed.batch_size:6,}  {rate}{memory}", flush=True)
