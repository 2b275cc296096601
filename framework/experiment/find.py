"""Before a long run: which learning rate, which batch size."""

import json
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
from framework.registry.discovery import output_for_programs
from framework.runtime.device import intra_op_threads
from framework.runtime.memory import OutOfMemory
from framework.training.trainer import Trainer
from framework.training.validation import check_has_rate

from .experiment import Experiment
from .plan import base_rate
from .plan_text import braille

LOWEST, HIGHEST = 1e-7, 10.0  # learning rates that are tried
SMOOTH = 0.9  # of the running mean of the losses
DIVERGED = 4.0  # times the lowest smoothed loss: where a range test ends
WARM_UP, TIMED = 2, 0.5  # steps, and seconds, of each batch size
GAIN = 1.05  # a batch size twice as large is worth it when it is this much quicker


@dataclass
class RangeTest:
    """A learning rate range test: the rates tried, the loss at each, smoothed, and what they suggest.

    suggestion: where the loss falls most steeply; lowest: where it is lowest. A rate between them will train.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float
    lowest: float


class Sweeping(Callback):
    """Keeps the loss of each step, and ends the run when it explodes."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.mean = 0.0

    def on_step_end(self, trainer: Context) -> None:
        self.mean = SMOOTH * self.mean + (1 - SMOOTH) * float(trainer.loss)
        self.losses.append(self.mean / (1 - SMOOTH ** (len(self.losses) + 1)))
        if not math.isfinite(self.losses[-1]) or self.losses[-1] > DIVERGED * min(self.losses):
            trainer.stop("find", "the loss explodes")


def find_learning_rate(spec: Spec, steps: int = 100) -> RangeTest:
    """Raise the learning rate with each step, from 1e-7 to 10, and see where the loss falls (Smith 2017,
    arXiv:1506.01186, section 3.3). The model is thrown away. Raises RunError when the loss falls nowhere.
    """
    built = Experiment(spec)
    check_has_rate(built.optimizer)
    factor, own = HIGHEST / LOWEST, base_rate(built.optimizer)
    for group in built.optimizer.param_groups:
        group["lr"] /= own  # a group that learns faster or slower than the others does so here too

    def rate(step: int) -> float:
        return LOWEST * factor ** (step / (steps - 1))

    sweeping = Sweeping()
    with alone(built, [sweeping], max_steps=steps) as trainer:
        trainer.fit(**without_validation(built), schedule=rate)
    losses = [loss for loss in sweeping.losses if math.isfinite(loss)]
    rates = [rate(step) for step in range(len(losses))]
    if len(losses) < 10:
        raise RunError(
            f"the loss is not finite after {len(losses)} steps at a rate of {rate(len(losses)):.1g}"
        )
    lowest = min(range(len(losses)), key=losses.__getitem__)
    slopes = [losses[n + 1] - losses[n - 1] for n in range(1, max(lowest, 3))]
    steepest = min(range(len(slopes)), key=slopes.__getitem__) + 1
    if slopes[steepest - 1] >= 0:
        raise RunError(
            "the loss falls at no learning rate from 1e-7 to 10: look at the data and the model first"
        )
    return RangeTest(rates, losses, rates[steepest], rates[lowest])


@dataclass
class Speed:
    """How a batch size did: samples a second, None when memory was full; peak memory on CUDA in bytes."""

    batch_size: int
    samples_per_second: float | None
    memory: int | None = None


def find_batch_size(spec: Spec, most: int = 2**14) -> Iterator[Speed]:
    """Double the batch size, from 8 on, until memory is full or no batch is left; yields each as it is measured."""
    data = None
    size = 8
    while size <= most:
        sized = replace(
            spec,
            sections=spec.sections | {"loader": spec.sections["loader"] | {"batch_size": size}},
        )
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
    """Return the smallest batch size after which doubling is hardly quicker. Raises RunError when none fits."""
    fitting = [speed for speed in speeds if speed.samples_per_second is not None]
    if not fitting:
        raise RunError(
            "not even 8 samples fit into memory: take a smaller model, or trainer.micro_batch"
        )
    best = max(speed.samples_per_second or 0 for speed in fitting)
    return next(speed for speed in fitting if (speed.samples_per_second or 0) * GAIN >= best)


class Timing(Callback):
    """Ends the run after a while, and knows when its steps were done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, trainer: Context) -> None:
        trainer.loss.item()  # the step is done when its loss can be read
        self.times.append(time.perf_counter())
        if len(self.times) > WARM_UP + 1 and self.times[-1] - self.times[WARM_UP] > TIMED:
            trainer.stop("find", "measured")


def measure_batch_size(built: Experiment, size: int) -> Speed:
    timing, cuda = Timing(), torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        with alone(built, [timing], max_steps=200) as trainer:
            trainer.fit(**without_validation(built))
    except OutOfMemory:
        return Speed(size, None)
    seconds = timing.times[-1] - timing.times[WARM_UP]
    memory = torch.cuda.max_memory_allocated() if cuda else None
    return Speed(size, size * (len(timing.times) - 1 - WARM_UP) / seconds, memory)


@contextmanager
def alone(built: Experiment, callbacks: Sequence[Callback], **limits: Any) -> Iterator[Trainer]:
    """A trainer of the experiment that writes nothing: with these callbacks alone, and these limits."""
    settings = (
        built.spec.sections["trainer"]
        | {"max_epochs": None, "max_steps": None, "profile": False}
        | limits
    )
    trainer = Trainer(**settings, seed=built.spec.seed, callbacks=[*built.transforms, *callbacks])
    with intra_op_threads(built.threads()):
        yield trainer


def without_validation(built: Experiment) -> dict[str, Any]:
    given = {
        "model": built.model,
        "data": built.train_batches,
        "task": built.task,
        "optimizer": built.optimizer,
    }
    return given | {"metrics": built.metrics}


def show_learning_rates(spec: Spec, as_json: bool) -> None:
    """Print the curve of a learning rate range test, and what it suggests."""
    with output_for_programs(as_json):
        found = find_learning_rate(spec)
    if as_json:
        print(json.dumps(asdict(found)))
        return
    top = min(max(found.losses), 2 * found.losses[0])
    lines = braille([min(loss, top) for loss in found.losses])
    for label, line in zip([f"{top:.3g}", "", "loss", "0"], lines, strict=True):
        print(f"{label:>9} {line}")
    print(
        f"{'':>9} {found.rates[0]:<10.1g}{'learning rate, logarithmic':^40}{found.rates[-1]:>10.2g}"
    )
    print(f"suggest  optimizer.lr={found.suggestion:.2g}, where the loss falls most steeply")
    print(f"         from {found.lowest:.2g} on it does not fall any more")


def print_speed(speed: Speed) -> None:
    rate = (
        "memory is full"
        if speed.samples_per_second is None
        else f"{speed.samples_per_second:10,.0f} samples/s"
    )
    memory = "" if speed.memory is None else f"  {speed.memory / 2**30:.2f} GiB"
    print(f"batch_size {speed.batch_size:6,}  {rate}{memory}", flush=True)


def show_batch_sizes(spec: Spec, as_json: bool) -> None:
    """Print the speed of each batch size as it is measured, and what that suggests."""
    speeds = []
    with output_for_programs(as_json):
        for speed in find_batch_size(spec):
            speeds.append(speed)
            if not as_json:
                print_speed(speed)
    chosen = suggested(speeds)
    if as_json:
        print(
            json.dumps(
                {"measured": [asdict(speed) for speed in speeds], "suggestion": chosen.batch_size}
            )
        )
    else:
        print(
            f"suggest  loader.batch_size={chosen.batch_size}; a larger one is less than 5 % quicker"
        )
