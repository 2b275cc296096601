"""Print a plan."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from framework.errors.terminal import printable, title
from framework.training.layer_table import (
    Layer,
)

from .plan import Curve, ParameterGroup, Plan, SplitSize

MOST_ROWS = 40
MOST_GROUPS = 8
CURVE = (60, 4)  # characters; a braille character has 2 by 4 dots


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
