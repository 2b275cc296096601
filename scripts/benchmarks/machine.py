"""Properties of this machine: the model size from which more threads help, and channels last."""

# mypy: allow-untyped-calls

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rounds import ratio, table, take_turns
from benchmarks.workloads import CLASSES, cnn, dense
from framework.runtime.memory_format import channels_last, choose_memory_format

SECONDS = 0.03  # duration of a measurement
WIN = 1.05  # smaller ratios are noise


class Case(NamedTuple):
    """A model, and the shape of a batch of its inputs."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]


def convolutions(channels: int, widths: Sequence[int], groups: int = 1) -> nn.Module:
    """Return 3 × 3 convolutions with batch norms, at the full resolution."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([channels, *widths]):
        shared = groups if inputs % groups == 0 else 1
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, groups=shared, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return classifier(layers, widths[-1])


def classifier(layers: Sequence[nn.Module], width: int) -> nn.Module:
    """Add the mean over all positions and a linear layer."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def shrinking(channels: int, widths: Sequence[int]) -> nn.Module:
    """Return 3 × 3 convolutions with batch norms; a pooling after each halves the image."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([channels, *widths]):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return classifier(layers, widths[-1])


def depthwise(channels: int, width: int) -> nn.Module:
    """Return a convolution and two depthwise separable ones; the second layer halves the image."""
    kernels = [nn.Conv2d(channels, width, 3, padding=1)]
    for stride in (2, 1):
        kernels.append(nn.Conv2d(width, width, 3, stride, 1, groups=width))
        kernels.append(nn.Conv2d(width, width, 1))
    layers: list[nn.Module] = []
    for kernel in kernels:
        layers += [kernel, nn.BatchNorm2d(width), nn.ReLU()]
    return classifier(layers, width)


def group_norms(channels: int, width: int, pooled: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
    layers += [nn.GroupNorm(8, width), nn.GELU()]
    if pooled:
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()]
    return classifier(layers, width)


def patches(channels: int, width: int, size: int = 8, side: int = 64) -> nn.Module:
    places = (side // size) ** 2
    mixer = [nn.Flatten(2), nn.Linear(places, 2 * places), nn.GELU(), nn.Linear(2 * places, places)]
    return nn.Sequential(
        nn.Conv2d(channels, width, size, size),
        *mixer,
        nn.Flatten(),
        nn.Linear(width * places, CLASSES),
    )


def threads_cases() -> dict[str, Case]:
    """Return MLPs of growing width and convolutions of growing size, with batches of 32."""
    cases = {}
    for width in (64, 128, 256, 384, 512, 768, 1024, 2048):
        name = f"MLP 64-{width}-{width}"
        cases[name] = Case(partial(dense, 64, width, width), (32, 64))
    for side, width in ((8, 8), (8, 16), (14, 16), (28, 16), (28, 32), (32, 64)):
        name = f"convolutions {width}-{width}, {side} × {side}"
        model = partial(convolutions, 3, (width, width))
        cases[name] = Case(model, (32, 3, side, side))
    return cases


FORMATS = {
    "the CNN of `speed`, 28 × 28": Case(cnn, (32, 1, 28, 28)),
    "16-32-64 and batch norms, 28 × 28": Case(
        partial(convolutions, 1, (16, 32, 64)), (32, 1, 28, 28)
    ),
    "16-32-64 and batch norms, 64 × 64": Case(
        partial(convolutions, 3, (16, 32, 64)), (16, 3, 64, 64)
    ),
    "16-32-64, batch norms and poolings, 28 × 28": Case(
        partial(shrinking, 3, (16, 32, 64)), (32, 3, 28, 28)
    ),
    "32-32-32, depthwise, then halved, 28 × 28": Case(partial(depthwise, 3, 32), (32, 3, 28, 28)),
    "32-32, group norms, pooled once, 28 × 28": Case(
        partial(group_norms, 3, 32, pooled=True), (32, 3, 28, 28)
    ),
    "256-256 and batch norms, 16 × 16": Case(partial(convolutions, 3, (256, 256)), (16, 3, 16, 16)),
    "64-64, depthwise, 28 × 28": Case(
        partial(convolutions, 3, (64, 64), groups=64), (32, 3, 28, 28)
    ),
    "16-32-64, one image, 64 × 64": Case(partial(convolutions, 3, (16, 32, 64)), (1, 3, 64, 64)),
    "32-32 and group norms, 28 × 28": Case(partial(group_norms, 3, 32), (32, 3, 28, 28)),
    "patches of 8 × 8, of 64 × 64": Case(partial(patches, 3, 128), (32, 3, 64, 64)),
}


def threads(rounds: int) -> int:
    """Print the speedup of a step by all cores, and the number of products from which it pays."""
    most = os.cpu_count() or 1
    rows = []
    gains = []
    for name, case in sorted(threads_cases().items(), key=lambda item: products(item[1])):
        step = training_step(case)
        parts = {"one": partial(timed, step, 1), "all": partial(timed, step, most)}
        times = take_turns(parts, rounds)
        count = products(case)
        gain = ratio(times["one"], times["all"])
        gains.append((count, gain))
        microseconds = [f"{median(spent):,.0f}" for spent in times.values()]
        rows.append([name, f"{count / 1e6:,.1f}", *microseconds, f"{gain:.2f}"])
    header = ["step", "million products", "µs, 1 thread", f"µs, {most} threads", "times as fast"]
    print(table(header, rows))
    least = pays_from(gains)
    if least is None:
        limit = "in no measured case"
    else:
        limit = f"from {least / 1e6:,.1f} million products of a forward pass"
    print(f"\n{most} threads are {WIN} times as fast or more {limit}")
    return 0


def pays_from(gains: Sequence[tuple[int, float]]) -> int | None:
    """Return the least size from which every ratio is a win; None if there is none.

    Args:
        gains: Pairs of size and ratio.
    """
    lost = max((size for size, gain in gains if gain < WIN), default=-1)
    return min((size for size, _ in gains if size > lost), default=None)


def formats(rounds: int, threads: int) -> int:
    """Print the speedup of a step by inputs in channels last, and the models that auto selects."""
    rows = []
    for name, case in FORMATS.items():
        parts = {
            layout: partial(timed, training_step(case, convert), threads)
            for layout, convert in LAYOUTS.items()
        }
        times = take_turns(parts, rounds)
        microseconds = [f"{median(spent):,.0f}" for spent in times.values()]
        rows.append([name, *microseconds, f"{ratio(*times.values()):.2f}"])
    header = ["convolutional model", *(f"µs, {name}" for name in LAYOUTS), "times as fast"]
    print(table(header, rows))
    chosen = []
    for name, case in FORMATS.items():
        if choose_memory_format("auto", case.model()).channels_last:
            chosen.append(name)
    print(f"\nloader.channels_last=auto selects channels last for {'; '.join(chosen)}")
    return 0


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": Tensor.contiguous,
    "channels last": channels_last,
}


def training_step(
    case: Case, layout: Callable[[Tensor], Tensor] = Tensor.contiguous
) -> Callable[[], None]:
    """Return a function that runs forward, backward and update of a model on one batch."""
    torch.manual_seed(0)
    model = case.model()
    inputs = layout(torch.randn(case.shape))
    targets = torch.randint(0, CLASSES, case.shape[:1])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def products(case: Case) -> int:
    """Return the number of products as `suitable_threads` counts them: weights times rows."""
    features = case.shape[1]
    rows = math.prod(case.shape) // features
    return rows * sum(weight.numel() for weight in case.model().parameters() if weight.ndim > 1)


def timed(step: Callable[[], None], threads: int) -> float:
    """Return the microseconds of a step with that number of threads, over at least SECONDS."""
    torch.set_num_threads(threads)
    step()  # exclude the cost of the change
    steps = 0
    seconds = 0.0
    began = time.perf_counter()
    while not steps or seconds < SECONDS:
        step()
        steps += 1
        seconds = time.perf_counter() - began
    return seconds / steps * 1e6
