"""What this machine is good at: from what size of a model on more threads help, and whether channels last does."""

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

SECONDS = 0.03  # of steps between two looks at the clock
WIN = 1.05  # times as fast: less is noise


class Case(NamedTuple):
    """A model, and the shape of a batch of its inputs."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]


def convolutions(channels: int, widths: Sequence[int], groups: int = 1) -> nn.Module:
    """3 × 3 convolutions with batch norms, all positions kept; the mean over them goes to the classes."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([channels, *widths]):
        shared = groups if inputs % groups == 0 else 1
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, groups=shared, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES)
    )


def shrinking(channels: int, widths: Sequence[int]) -> nn.Module:
    """3 × 3 convolutions with batch norms, each followed by a pooling that halves the image."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([channels, *widths]):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES)
    )


def depthwise(channels: int, width: int) -> nn.Module:
    """A convolution, then two depthwise ones with a 1 × 1 behind each; the first of them halves the image."""
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    for stride in (2, 1):
        layers += [
            nn.Conv2d(width, width, 3, stride, 1, groups=width),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        layers += [nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def group_norms(channels: int, width: int, pooled: bool = False) -> nn.Module:
    convolution, norm = (
        partial(nn.Conv2d, kernel_size=3, padding=1),
        partial(nn.GroupNorm, 8, width),
    )
    layers = [
        convolution(channels, width),
        norm(),
        nn.GELU(),
        convolution(width, width),
        norm(),
        nn.GELU(),
    ]
    layers[3:3] = [nn.MaxPool2d(2)] * pooled
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


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
    """Multilayer perceptrons of growing width, and convolutions of growing size, in batches of 32."""
    widths = (64, 128, 256, 384, 512, 768, 1024, 2048)
    found = {f"MLP 64-{w}-{w}": Case(partial(dense, 64, w, w), (32, 64)) for w in widths}
    sizes = (
        (8, (8, 8)),
        (8, (16, 16)),
        (14, (16, 16)),
        (28, (16, 16)),
        (28, (32, 32)),
        (32, (64, 64)),
    )
    return found | {
        f"convolutions {'-'.join(map(str, widths))}, {side} × {side}": Case(
            partial(convolutions, 3, widths), (32, 3, side, side)
        )
        for side, widths in sizes
    }


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
    """Print how many times as fast a step is with all cores, and from how many products on that pays."""
    most = os.cpu_count() or 1
    found = []
    for name, case in threads_cases().items():
        step = training_step(case)
        times = take_turns({str(n): partial(timed, step, n) for n in (1, most)}, rounds)
        found.append((products(case), name, times["1"], times[str(most)]))
    rows = [
        [
            name,
            f"{count / 1e6:,.1f}",
            f"{median(one):,.0f}",
            f"{median(all_):,.0f}",
            f"{ratio(one, all_):.2f}",
        ]
        for count, name, one, all_ in sorted(found)
    ]
    print(
        table(
            ["step", "million products", "µs, 1 thread", f"µs, {most} threads", "times as fast"],
            rows,
        )
    )
    least = pays_from([(count, ratio(one, all_)) for count, _, one, all_ in found])
    said = (
        "in no case measured"
        if least is None
        else f"from {least / 1e6:,.1f} million products of a forward pass on"
    )
    print(f"\n{most} threads are {WIN} times as fast or more {said}")
    return 0


def pays_from(found: Sequence[tuple[int, float]]) -> int | None:
    """Return the least size from which on every ratio is a win, given (size, ratio); None when there is none."""
    lost = max((size for size, gain in found if gain < WIN), default=-1)
    return min((size for size, _ in found if size > lost), default=None)


def formats(rounds: int, threads: int) -> int:
    """Print how many times as fast a step is with inputs in the format channels last, and what auto chooses."""
    rows = []
    for name, case in FORMATS.items():
        parts = {
            name: partial(timed, training_step(case, each), threads)
            for name, each in LAYOUTS.items()
        }
        times = take_turns(parts, rounds)
        micro = [f"{median(each):,.0f}" for each in times.values()]
        rows.append([name, *micro, f"{ratio(*times.values()):.2f}"])
    print(
        table(["convolutional model", *(f"µs, {name}" for name in LAYOUTS), "times as fast"], rows)
    )
    chosen = []
    for name, case in FORMATS.items():
        if choose_memory_format("auto", case.model()).channels_last:
            chosen.append(name)
    print(f"\nloader.channels_last=auto takes channels last for {'; '.join(chosen)}")
    return 0


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": Tensor.contiguous,
    "channels last": channels_last,
}


def training_step(
    case: Case, layout: Callable[[Tensor], Tensor] = Tensor.contiguous
) -> Callable[[], None]:
    """Return forward, backward and update of a model on one batch."""
    torch.manual_seed(0)
    model, inputs = case.model(), layout(torch.randn(case.shape))
    targets = torch.randint(0, CLASSES, case.shape[:1])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def products(case: Case) -> int:
    """Return what `suitable_threads` counts: weights times what each is multiplied with."""
    features = case.shape[1]
    rows = math.prod(case.shape) // features
    return rows * sum(weight.numel() for weight in case.model().parameters() if weight.ndim > 1)


def timed(step: Callable[[], None], threads: int) -> float:
    """Return the microseconds of a step with so many threads, over at least SECONDS."""
    torch.set_num_threads(threads)
    step()  # whatever the switch costs
    steps, took, began = 0, 0.0, time.perf_counter()
    while not steps or took < SECONDS:
        step()
        steps, took = steps + 1, time.perf_counter() - began
    return took / steps * 1e6
