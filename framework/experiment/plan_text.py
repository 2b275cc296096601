"""A plan as text for a terminal: the table of layers, the facts, the curve of the learning rate."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from framework.errors.terminal import printable, title
from framework.runtime.display.plot import braille, ends, with_labels
from framework.training.layer_table import Layer

from .plan import Curve, ParameterGroup, Plan, SplitSize

MOST_ROWS = 40
MOST_GROUPS = 8
MOST_UNUSED = 5
CURVE_COLUMNS = 60
CURVE_ROWS = 4


def render(plan: Plan) -> RenderableType:
    """Return a plan for a terminal: the layers, a line for each fact, the learning rate."""
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
    """Return the table of layers, with their totals in the last row."""
    layers = fold(plan.layers)
    heading = title(plan.model)
    if len(layers) < len(plan.layers):
        heading += f" ({len(plan.layers)} layers, folded)"
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_footer=True
    )
    table.add_column(Text(heading), "total", no_wrap=True, footer_style="bold")
    table.add_column("type", no_wrap=True, style="dim")
    table.add_column("output", no_wrap=True)
    for name, total in (("parameters", f"{plan.parameters:,}"), ("FLOPs", count_text(plan.flops))):
        table.add_column(name, total, justify="right", no_wrap=True, footer_style="bold")
    for layer in layers:
        table.add_row(
            Text(title(layer.name)),
            Text(title(layer.type)),
            " × ".join(map(str, layer.out_shape)),
            count_text(layer.parameters) if layer.parameters else "-",
            count_text(layer.flops) if layer.flops else "-",
        )
    return table


def fold(layers: Sequence[Layer], most: int = MOST_ROWS) -> list[Layer]:
    """Merge layers with a common path until at most `most` are left.

    A merged layer has the output shape of the last one.
    """
    depth = max((layer.name.count(".") + 1 for layer in layers), default=0)
    folded = list(layers)
    while len(folded) > most and depth > 1:
        depth -= 1
        folded = fold_to(layers, depth)
    return folded


def fold_to(layers: Sequence[Layer], depth: int) -> list[Layer]:
    """Merge the layers whose paths have the same first `depth` names."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        path = ".".join(layer.name.split(".")[:depth])
        groups.setdefault(path, []).append(layer)
    return [merged(path, group) for path, group in groups.items()]


def merged(name: str, layers: Sequence[Layer]) -> Layer:
    """Return several layers as one."""
    kind = layers[0].type if len(layers) == 1 else "..."
    parameters = sum(layer.parameters for layer in layers)
    flops = sum(layer.flops for layer in layers)
    return Layer(name, kind, layers[-1].out_shape, parameters, flops)


def fact_lines(plan: Plan) -> list[tuple[str, str]]:
    """Return the names and texts of the facts."""
    lines = []
    if plan.splits:
        lines.append(("data", ", ".join(map(split_text, plan.splits))))
    lines.append(("steps", plan_steps_text(plan)))
    lines.append(("cost", cost_text(plan)))
    lines.append(("memory", memory_text(plan)))
    if plan.processes > 1:
        lines.append(("processes", processes_text(plan)))
    heading = "trained"
    for text in group_lines(plan.groups):
        lines.append((heading, text))
        heading = ""
    if plan.transforms:
        lines.append(("transforms", ", ".join(plan.transforms)))
    heading = "callbacks"
    for text in plan.callbacks:
        lines.append((heading, text))
        heading = ""
    if plan.loader:
        lines.append(("loader", plan.loader))
    if plan.threads:
        text = f"{plan.threads} for an operation on the CPU (OMP_NUM_THREADS sets another number)"
        lines.append(("threads", text))
    if plan.trainable < plan.parameters:
        frozen = plan.parameters - plan.trainable
        lines.append(("frozen", f"{frozen:,} of {plan.parameters:,} parameters"))
    if plan.unused:
        names = ", ".join(map(title, plan.unused[:MOST_UNUSED]))
        if len(plan.unused) > MOST_UNUSED:
            names += ", ..."
        lines.append(("unused", f"the forward pass does not call the layers of {names}"))
    return lines


def split_text(split: SplitSize) -> str:
    """Return the size of a split, such as "train 100 (4.69 KiB)"."""
    size = "" if split.bytes is None else f" ({bytes_text(split.bytes)})"
    return f"{split.name} {split.samples:,}{size}"


def plan_steps_text(plan: Plan) -> str:
    """Return the steps, such as "40 = 10 epochs of 4, batches of 32"."""
    pace = plan.pace
    if not pace:
        epochs = plan.total_steps / max(plan.steps_per_epoch, 1)
        pace = f"{epochs:.4g} epochs of {plan.steps_per_epoch:,}"
    text = f"{plan.total_steps:,} = {pace}, batches of {plan.batch_size:,}"
    if plan.batches_per_step > 1:
        text += f", {plan.batches_per_step:.3g} a step"
    if plan.pace:
        text += " on average"
    return text


def cost_text(plan: Plan) -> str:
    """Return the FLOPs of a sample and of the training."""
    samples = plan.batch_size * plan.total_steps * plan.batches_per_step
    training = 3 * plan.flops * samples  # the backward pass costs twice as much as the forward pass
    return (
        f"{count_text(plan.flops)} FLOPs per sample forward (multiply-add: 2), "
        f"about {count_text(training)} to train"
    )


def memory_text(plan: Plan) -> str:
    """Return the memory of training, in total and by use."""
    memory = plan.memory
    texts = []
    for name, size in (
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("buffers", memory.buffers),
    ):
        if size:
            texts.append(f"{name} {bytes_text(size)}")
    if plan.optimizer is not None:
        texts.append(f"{title(plan.optimizer)} state {bytes_text(memory.optimizer)}")
    if memory.communication:
        texts.append(f"communication {bytes_text(memory.communication)}")
    part = "its part of a batch" if plan.processes > 1 else "a batch"
    texts.append(f"activations of {part} {bytes_text(memory.activations)}")
    owner = " per process" if plan.processes > 1 else ""
    return f"about {bytes_text(memory.total)}{owner}: " + ", ".join(texts)


def processes_text(plan: Plan) -> str:
    """Return the number of processes and what they send."""
    part = math.ceil(plan.batch_size / plan.processes)
    return (
        f"{plan.processes} with strategy={plan.strategy}, {part:,} samples of a batch each; each "
        f"sends about {bytes_text(plan.sent)} per step"
    )


def group_lines(groups: Sequence[ParameterGroup]) -> list[str]:
    """Return a line for each group of parameters, up to a limit."""
    lines = [group_text(group) for group in groups[:MOST_GROUPS]]
    if len(groups) > MOST_GROUPS:
        lines.append(f"and {len(groups) - MOST_GROUPS} more groups")
    return lines


def group_text(group: ParameterGroup) -> str:
    """Return a group, such as "biases and norms: 650, lr x 0.5, no weight decay"."""
    rate = "" if math.isclose(group.lr_factor, 1.0) else f", lr x {group.lr_factor:.3g}"
    decay = f"weight decay {group.weight_decay:.3g}" if group.weight_decay else "no weight decay"
    return f"{title(group.name)}: {group.parameters:,}{rate}, {decay}"


def curve_text(curve: Curve, total_steps: int) -> Text:
    """Return the curve, with its maximum on the left and the steps below."""
    lines = braille(curve.rates, CURVE_COLUMNS, CURVE_ROWS)
    below = ends("step 1", f"step {total_steps:,}", CURVE_COLUMNS)
    text = Text("\n").join(with_labels(lines, f"{curve.peak:.3g}", "0", below)).append("\n")
    rates = f"  start {curve.start:.3g}"
    if curve.peak not in (curve.start, curve.end):
        rates += f", peak {curve.peak:.3g} at step {curve.peak_step + 1:,}"
    return text.append("learning rate", "bold").append(f"{rates}, end {curve.end:.3g}")


def count_text(number: float) -> str:
    """Return 1,234 as it is, and 23,456,789 as "23.5 M"."""
    return in_units(number, {"T": 1e12, "G": 1e9, "M": 1e6}) or f"{number:,.0f}"


def bytes_text(number: int | None) -> str:
    """Return bytes in B, KiB, MiB or GiB; "unknown" for None."""
    if number is None:
        return "unknown"
    return in_units(number, {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}) or f"{number} B"


def in_units(number: float, units: Mapping[str, float]) -> str | None:
    """Return a number in the largest unit that it reaches; None if it reaches none.

    Args:
        units: their sizes, the largest unit first.
    """
    for unit, size in units.items():
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return None
