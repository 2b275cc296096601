"""A run before it runs: layers with shapes and costs, steps, the schedule as a curve, memory. Nothing is trained."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.optim import Optimizer

from framework.contracts.callback import Pace
from framework.contracts.schedule import factor_of
from framework.contracts.task import Task
from framework.data.dataset import Batch, Data, TensorSplit, splits_of
from framework.errors.terminal import printable, title
from framework.training.layer_table import (
    Layer,
    activation_bytes,
    optimizer_bytes,
    read_layers,
    size_in_bytes,
)

Schedule = Callable[[int], float]  # step to factor on the learning rate
MOST_ROWS = 40
MOST_GROUPS = 8
CURVE = (60, 4)  # characters; a braille character has 2 by 4 dots
MOST_POINTS = 10_000


@dataclass
class SplitSize:
    """A split: samples, and bytes when it lies in memory."""

    name: str
    samples: int
    bytes: int | None


@dataclass
class ParameterGroup:
    """Parameters that the optimizer treats alike: how many numbers, and what is theirs alone."""

    name: str
    parameters: int
    lr_factor: float
    weight_decay: float


@dataclass
class Curve:
    """The learning rate over the run, as points evenly spread over its steps; `peak_step` is among all of them."""

    start: float
    peak: float
    peak_step: int
    end: float
    rates: list[float]


@dataclass
class Memory:
    """Estimated bytes of training; buffers of kernels and of the allocator come on top.

    Attributes:
        optimizer: its state after a step; None when the optimizer cannot be tried out.
        activations: what the forward pass of a batch keeps for the backward pass (the batch itself included).
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int | None
    activations: int
    total: int = 0

    def __post_init__(self):
        self.total = (
            self.parameters
            + self.buffers
            + self.gradients
            + (self.optimizer or 0)
            + self.activations
        )


@dataclass
class Plan:
    """What a run will do and need."""

    model: str
    layers: list[Layer]
    parameters: int
    trainable: int
    unused: list[str]
    flops: int
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    memory: Memory
    optimizer: str | None = None
    groups: list[ParameterGroup] = field(default_factory=list)
    transforms: list[str] = field(default_factory=list)
    curve: Curve | None = None
    splits: list[SplitSize] = field(default_factory=list)
    threads: int | None = None
    loader: str | None = None
    batches_per_step: float = 1
    pace: str | None = None  # which epochs have how many steps, where they differ

    def follow(self, pace: Pace, optimizer: Optimizer, schedule: Schedule | None) -> None:
        """Use the steps and learning rates of a callback that changes how batches make steps."""
        self.total_steps = pace.total_steps
        self.batches_per_step = pace.batches_per_step
        self.pace = pace.text
        place = pace.schedule_step
        if schedule is None or place is None:
            self.curve = read_curve(optimizer, schedule, pace.total_steps)
        else:
            self.curve = read_curve(optimizer, lambda step: schedule(place(step)), pace.total_steps)


def make_plan(
    model: nn.Module,
    batch: Batch,
    *,
    steps_per_epoch: int,
    total_steps: int,
    task: Task | None = None,
    optimizer: Optimizer | None = None,
    schedule: Schedule | None = None,
    data: Data | None = None,
    threads: int | None = None,
    loader: str | None = None,
    transforms: Sequence[str] = (),
) -> Plan:
    """Return the plan of a run.

    Args:
        batch: one training batch, on the model's device; its first four samples are run.
        steps_per_epoch, total_steps: optimizer steps.
        task: runs the model as in training, loss included; without it, the model is called with the inputs.
        schedule: the factor on the learning rate, by step.
        threads: that an operation may use on the CPU.
        loader: how batches are read, in words.
        transforms: of training batches, in words.
    """
    layers, unused = read_layers(model, batch, task)
    every = list(model.parameters())
    trainable = [p for p in every if p.requires_grad]
    splits = {} if data is None else splits_of(data)
    memory = Memory(
        parameters=size_in_bytes(every),
        buffers=size_in_bytes(model.buffers()),
        gradients=size_in_bytes(trainable),
        optimizer=None if optimizer is None else optimizer_bytes(optimizer),
        activations=activation_bytes(model, batch, task),
    )
    return Plan(
        model=type(model).__name__,
        layers=layers,
        parameters=sum(p.numel() for p in every),
        trainable=sum(p.numel() for p in trainable),
        unused=unused,
        flops=sum(layer.flops for layer in layers),
        batch_size=len(batch[0]),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        memory=memory,
        optimizer=None if optimizer is None else type(optimizer).__name__,
        groups=[] if optimizer is None else read_groups(optimizer),
        transforms=list(transforms),
        curve=read_curve(optimizer, schedule, total_steps),
        splits=[SplitSize(name, len(split), split_bytes(split)) for name, split in splits.items()],
        threads=threads,
        loader=loader,
    )


def read_curve(
    optimizer: Optimizer | None, schedule: Schedule | None, total_steps: int
) -> Curve | None:
    """Return the learning rate over the run: the optimizer's own, of which a group may have its factor."""
    if optimizer is None or total_steps < 1:
        return None
    base = base_rate(optimizer)
    if base is None:
        return None
    points = min(total_steps, MOST_POINTS)
    steps = [round(i * (total_steps - 1) / max(points - 1, 1)) for i in range(points)]
    rates = [base * (1.0 if schedule is None else factor_of(schedule, step)) for step in steps]
    peak = max(range(points), key=rates.__getitem__)
    columns = min(points, 2 * CURVE[0])
    shown = [rates[round(i * (points - 1) / max(columns - 1, 1))] for i in range(columns)]
    return Curve(rates[0], rates[peak], steps[peak], rates[-1], shown)


def base_rate(optimizer: Optimizer) -> float | None:
    """Return the optimizer's own learning rate; None where it has none."""
    rate = optimizer.defaults.get("lr", optimizer.param_groups[0].get("lr"))
    return None if rate is None else float(rate)


def read_groups(optimizer: Optimizer) -> list[ParameterGroup]:
    """Return the groups; those of `Parameters` have names, which may end in their factor."""
    base, found = base_rate(optimizer), []
    for number, group in enumerate(optimizer.param_groups, 1):
        name = str(
            group.get("name", number if len(optimizer.param_groups) > 1 else "all")
        ).partition(" x ")[0]
        rate = group.get("initial_lr", group.get("lr"))
        factor = float(rate) / base if base and rate is not None else 1.0
        size = sum(parameter.numel() for parameter in group["params"])
        found.append(ParameterGroup(name, size, factor, float(group.get("weight_decay", 0.0))))
    return found


def split_bytes(split: Any) -> int | None:
    return size_in_bytes(split.tensors) if isinstance(split, TensorSplit) else None


def fold(layers: Sequence[Layer], most: int = MOST_ROWS) -> list[Layer]:
    """Merge layers with a common path until at most `most` are left; a merged one shows the last one's shape."""
    depth = max((layer.name.count(".") + 1 for layer in layers), default=0)
    folded = list(layers)
    while len(folded) > most and depth > 1:
        depth -= 1
        folded = fold_to(layers, depth)
    return folded


def fold_to(layers: Sequence[Layer], depth: int) -> list[Layer]:
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(".".join(layer.name.split(".")[:depth]), []).append(layer)
    return [merged(name, group) for name, group in groups.items()]


def merged(name: str, layers: Sequence[Layer]) -> Layer:
    kind = layers[0].type if len(layers) == 1 else "..."
    parameters, flops = (
        sum(layer.parameters for layer in layers),
        sum(layer.flops for layer in layers),
    )
    return Layer(name, kind, layers[-1].out_shape, parameters, flops)


def braille(rates: Sequence[float], columns: int = CURVE[0], rows: int = CURVE[1]) -> list[str]:
    """Draw values from 0 to their maximum as lines of braille characters, the highest first."""
    dots = 4 * rows
    top = max((abs(rate) for rate in rates), default=0) or 1.0
    bits = (
        (0x40, 0x04, 0x02, 0x01),
        (0x80, 0x20, 0x10, 0x08),
    )  # of a character's two columns, from the bottom up
    cells = [[0x2800] * columns for _ in range(rows)]
    for x in range(2 * columns):
        rate = rates[round(x * (len(rates) - 1) / max(2 * columns - 1, 1))]
        y = min(dots - 1, max(0, round(rate / top * (dots - 1))))
        cells[rows - 1 - y // 4][x // 2] |= bits[x % 2][y % 4]
    return ["".join(map(chr, line)) for line in cells]


def count_text(number: float) -> str:
    """Write 1,234 as it is, 23,456,789 as 23.5 M."""
    return in_units(number, {"T": 1e12, "G": 1e9, "M": 1e6}) or f"{number:,.0f}"


def bytes_text(number: int | None) -> str:
    """Write bytes in KiB, MiB or GiB; "unknown" for None."""
    if number is None:
        return "unknown"
    return in_units(number, {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}) or f"{number} B"


def in_units(number: float, units: Mapping[str, float]) -> str | None:
    """Write a number in the first unit that it fills; None when it fills none."""
    return next(
        (f"{number / size:.3g} {unit}" for unit, size in units.items() if number >= size), None
    )


def render(plan: Plan) -> RenderableType:
    """Return the plan for a terminal: the layers, then a line on each of data, steps, cost, memory, learning rate."""
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, text in fact_lines(plan):
        facts.add_row(name, Text(printable(text)))
    parts: list[RenderableType] = [layer_table(plan), Text(), facts]
    if plan.curve is not None:
        parts += [Text(), curve_text(plan.curve, plan.total_steps)]
    return Group(*parts)


def layer_table(plan: Plan) -> Table:
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_footer=True
    )
    layers = fold(plan.layers)
    folded = f" ({len(plan.layers)} layers, folded)" if len(layers) < len(plan.layers) else ""
    table.add_column(
        Text(f"{title(plan.model)}{folded}"), "total", no_wrap=True, footer_style="bold"
    )
    table.add_column("type", no_wrap=True, style="dim")
    table.add_column("output", no_wrap=True)
    table.add_column(
        "parameters", f"{plan.parameters:,}", justify="right", no_wrap=True, footer_style="bold"
    )
    table.add_column(
        "FLOPs", count_text(plan.flops), justify="right", no_wrap=True, footer_style="bold"
    )
    for layer in layers:
        shape = " × ".join(map(str, layer.out_shape))
        numbers = (
            count_text(number) if number else "-" for number in (layer.parameters, layer.flops)
        )
        table.add_row(Text(title(layer.name)), Text(title(layer.type)), shape, *numbers)
    return table


def fact_lines(plan: Plan) -> list[tuple[str, str]]:
    lines = [("data", ", ".join(map(split_text, plan.splits)))] if plan.splits else []
    together = f", {plan.batches_per_step:.3g} a step" * (
        plan.batches_per_step > 1
    ) + " on average" * bool(plan.pace)
    pace = (
        plan.pace
        or f"{plan.total_steps / max(plan.steps_per_epoch, 1):.4g} epochs of {plan.steps_per_epoch:,}"
    )
    steps = f"{plan.total_steps:,} = {pace}, batches of {plan.batch_size:,}{together}"
    # The backward pass costs twice the forward one.
    training = count_text(
        3 * plan.flops * plan.batch_size * plan.total_steps * plan.batches_per_step
    )
    cost = f"{count_text(plan.flops)} FLOPs a sample forward (multiply-add: 2), about {training} to train"
    lines += [("steps", steps), ("cost", cost), ("memory", memory_text(plan))]
    if plan.groups:
        rest = (
            [f"and {len(plan.groups) - MOST_GROUPS} groups more"]
            if len(plan.groups) > MOST_GROUPS
            else []
        )
        first, *others = [*map(group_text, plan.groups[:MOST_GROUPS]), *rest]
        lines += [("trained", first), *(("", other) for other in others)]
    threads = (
        f"{plan.threads} for an operation on the CPU (OMP_NUM_THREADS sets another number)"
        * bool(plan.threads)
    )
    more = [
        ("transforms", ", ".join(plan.transforms)),
        ("loader", plan.loader or ""),
        ("threads", threads),
    ]
    lines += [(name, text) for name, text in more if text]
    if plan.trainable < plan.parameters:
        lines.append(
            ("frozen", f"{plan.parameters - plan.trainable:,} of {plan.parameters:,} parameters")
        )
    if plan.unused:
        named = ", ".join(map(title, plan.unused[:5])) + (", ..." if len(plan.unused) > 5 else "")
        lines.append(("unused", f"the forward pass calls no layer that has {named}"))
    return lines


def split_text(split: SplitSize) -> str:
    size = "" if split.bytes is None else f" ({bytes_text(split.bytes)})"
    return f"{split.name} {split.samples:,}{size}"


def group_text(group: ParameterGroup) -> str:
    """Write: biases and norms: 650, lr x 0.5, no weight decay."""
    rate = "" if math.isclose(group.lr_factor, 1.0) else f", lr x {group.lr_factor:.3g}"
    decay = f"weight decay {group.weight_decay:.3g}" if group.weight_decay else "no weight decay"
    return f"{title(group.name)}: {group.parameters:,}{rate}, {decay}"


def memory_text(plan: Plan) -> str:
    memory = plan.memory
    items = [
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("buffers", memory.buffers),
    ]
    listed = [f"{name} {bytes_text(size)}" for name, size in items if size]
    if plan.optimizer is not None:
        listed.append(f"{title(plan.optimizer)} state {bytes_text(memory.optimizer)}")
    listed.append(f"activations of a batch {bytes_text(memory.activations)}")
    return f"about {bytes_text(memory.total)}: " + ", ".join(listed)


def curve_text(curve: Curve, total_steps: int) -> Text:
    """Return the curve with its highest value on the left and the steps below."""
    lines = braille(curve.rates)
    labels = [f"{curve.peak:.3g}", *[""] * (len(lines) - 2), "0"]
    text = Text()
    for label, line in zip(labels, lines, strict=True):
        text.append(f"{label:>9} ", "dim").append(line + "\n", "cyan")
    last = f"step {total_steps:,}"
    text.append(f"{'':>9} step 1{last:>{CURVE[0] - 6}}\n", "dim")
    peak = (
        ""
        if curve.peak in (curve.start, curve.end)
        else f", peak {curve.peak:.3g} at step {curve.peak_step + 1:,}"
    )
    text.append("learning rate", "bold").append(
        f"  start {curve.start:.3g}{peak}, end {curve.end:.3g}"
    )
    return text
