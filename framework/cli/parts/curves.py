"""The curves of activations, schedules, losses, initializers and optimizers, measured on the parts.

A part is called, not recognized by its name, so that a part of a plugin has the same curves. One
that cannot be called in the expected way raises NotPlotted with the reason.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from framework.contracts.loss import Mean, class_weights
from framework.contracts.schedule import factor_of, observes
from framework.errors import FrameworkError
from framework.errors.user_code import reason_of
from framework.registry.registry import Maker, Registry
from framework.runtime import seeds

SHOWN = 6.0  # activations are drawn from -SHOWN to SHOWN
EXAMINED = 10.0  # and their saturation is searched from -EXAMINED to EXAMINED
FLAT = 0.01  # of the largest |f'|
MOST_INTERVALS = 3  # in a note
ERRORS = 3.0  # losses are drawn for errors from -ERRORS to ERRORS
MARGINS = 5.0
WIDTH = 256  # units of each layer that an initializer is tried on
DEPTH = 20
BINS = 60
DIVERGED = 1e12
SHORT = 0.5  # a path that ends nearer to its start on both surfaces


class NotPlotted(FrameworkError):
    """A part whose curves cannot be measured; the message is the reason."""


@dataclass(frozen=True)
class Panel:
    """The place of a curve: curves with equal panels are drawn in one chart.

    Attributes:
        title: above the chart.
        x_label: what x is.
        log: whether the y axis is logarithmic.
        surface: the test surface on which the curve is a path, or None.
    """

    title: str
    x_label: str
    log: bool = False
    surface: "Surface | None" = None


@dataclass
class Curve:
    """A curve in a panel.

    Attributes:
        panel: where it is drawn.
        x: from left to right, or along the path.
        y: a number for each x.
        label: added to the name of the part in the legend.
    """

    panel: Panel
    x: list[float]
    y: list[float]
    label: str = ""


@dataclass
class PartCurves:
    """The curves of a part.

    Attributes:
        curves: to draw.
        note: what they show, in words and numbers.
        numbers: the same for JSON.
    """

    curves: list[Curve]
    note: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


def curves_of(maker: Maker, steps: int | None = None) -> PartCurves:
    """Return the curves of a part.

    Args:
        maker: the part with its settings.
        steps: of a schedule or an optimizer; None for their defaults.

    Raises:
        NotPlotted: they cannot be measured.
    """
    measure = MEASURES[maker.entry.kind.name]
    if steps is not None and maker.entry.kind.name in ("scheduler", "optimizer"):
        measure = partial(measure, steps=steps)
    try:
        with seeds.stream(0):
            return measure(maker)
    except NotPlotted:
        raise
    except FrameworkError as error:
        raise NotPlotted(str(error)) from error
    except Exception as error:  # of the part, which may fail in any way
        raise NotPlotted(reason_of(error)) from error


# activations


def activation_curves(maker: Maker) -> PartCurves:
    """Return an activation and its derivative, and the inputs for which it saturates.

    It saturates where |f'| is below 1 % of its maximum over [-10, 10], except at a minimum or
    maximum of f. The derivative is that of the backward pass.
    """
    activation = maker()
    activation.double().eval()
    x = torch.linspace(-EXAMINED, EXAMINED, 20_001, dtype=torch.float64).requires_grad_()
    y = activation(x[None])
    if not isinstance(y, Tensor) or y.shape != (1, len(x)):
        raise NotPlotted("its output has another shape than its input")
    if not torch.allclose(activation(x[None, :100]), y[:, :100], equal_nan=True):
        raise NotPlotted("an output depends on more than one input")
    slope = torch.full_like(x, math.nan)
    if y.requires_grad:
        slope = torch.autograd.grad(y.sum(), x)[0]
    x = x.detach()
    intervals = saturated(x, slope)
    drawn = (x.abs() <= SHOWN + 1e-9).nonzero().flatten()[::25]
    shown_x = x[drawn].tolist()
    values = y.detach()[0, drawn].tolist()
    slopes = slope[drawn].tolist()
    curves = [Curve(Panel("f(x)", "x"), shown_x, values)]
    curves.append(Curve(Panel("f'(x)", "x"), shown_x, slopes))
    note = "does not saturate"
    if intervals:
        texts = list(map(interval_text, intervals))
        if len(texts) > MOST_INTERVALS:
            texts[MOST_INTERVALS:] = [f"{len(texts) - MOST_INTERVALS} more intervals"]
        note = "saturates for " + " and ".join(texts)
    elif slope.isnan().all():
        note = "has no derivative"
    numbers = {"x": shown_x, "f": values, "derivative": slopes, "saturated": intervals}
    return PartCurves(curves, note, numbers)


def saturated(x: Tensor, slope: Tensor) -> list[tuple[float | None, float | None]]:
    """Return the intervals in which a function saturates; None for an end outside of x.

    Args:
        x: evenly spaced, shape (N,).
        slope: the derivative at x, shape (N,).
    """
    size = slope.abs()
    flat = (size < FLAT * size.nan_to_num(0).max()).tolist()
    found: list[tuple[float | None, float | None]] = []
    first = 0
    for is_flat, run in groupby(flat):
        after = first + len(list(run))
        touches_end = first == 0 or after == len(flat)
        if is_flat and (touches_end or slope[first - 1] * slope[after] > 0):
            low = None if first == 0 else float(x[first])
            high = None if after == len(flat) else float(x[after - 1])
            found.append((low, high))
        first = after
    return found


def interval_text(interval: tuple[float | None, float | None]) -> str:
    """Return an interval such as "x < -5.99"."""
    low, high = interval
    if low is None and high is None:
        return "all x"
    if low is None:
        return f"x < {three_digits(high)}"
    if high is None:
        return f"x > {three_digits(low)}"
    return f"{three_digits(low)} < x < {three_digits(high)}"


def three_digits(value: float | None) -> str:
    """Return a number with 3 digits, and 0 for one that is nearly 0."""
    assert value is not None
    return "0" if abs(value) < 2e-3 else f"{value:.3g}"


# schedules


def schedule_curves(maker: Maker, steps: int = 1000) -> PartCurves:
    """Return the factor on the learning rate over the steps of a run."""
    schedule = maker(steps)
    if observes(schedule):
        raise NotPlotted("its factor depends on the values of validation")
    factors = [factor_of(schedule, step) for step in range(steps)]
    peak = factors.index(max(factors))
    note = f"starts at {factors[0]:.3g}"
    if factors[peak] not in (factors[0], factors[-1]):
        note += f", is largest at step {peak:,} ({factors[peak]:.3g})"
    note += f", ends at {factors[-1]:.3g}"
    panel = Panel("factor on the learning rate", "step")
    curve = Curve(panel, [float(step) for step in range(steps)], factors)
    return PartCurves([curve], note, {"total_steps": steps, "factor": factors})


# losses


def loss_curves(maker: Maker) -> PartCurves:
    """Return a loss and its gradient over its error, its margin, or its output.

    | loss                                   | x                                                  |
    |----------------------------------------|----------------------------------------------------|
    | depends on outputs - targets only      | the error: output - target                         |
    | takes classes                          | the margin: output of the true class minus 0, the  |
    |                                        | outputs of the other classes                       |
    | takes values or labels                 | the output, for a target of 1 and one of 0         |
    """
    loss = maker()
    loss.double().eval()
    form = Mean.of(loss).form
    if form in ("classes", "indices", "classes or labels"):
        return over_margin(loss, torch.tensor([0]))
    if form == "label sets":
        raise NotPlotted("its targets are sets of labels")
    try:
        curves = over_error(loss) if of_error(loss) else over_output(loss)
        if curves is not None:
            return curves
    except Exception:  # a loss of other targets may fail in any way
        if form != "any":
            raise
    try:
        return over_margin(loss, torch.tensor([0]))
    except Exception:
        return over_margin(loss, torch.tensor([[1.0, 0.0]], dtype=torch.float64))


def of_error(loss: Callable[..., Tensor]) -> bool:
    """Return whether a loss depends on outputs - targets only."""
    outputs = torch.tensor([[0.3], [-1.1], [0.8]], dtype=torch.float64)
    targets = torch.tensor([[0.1], [0.9], [0.5]], dtype=torch.float64)
    with torch.no_grad():
        return torch.allclose(loss(outputs + 0.7, targets + 0.7), loss(outputs, targets))


def over_error(loss: Callable[..., Tensor]) -> PartCurves | None:
    """Return a loss over the error of one value; None if it is constant."""
    target = torch.zeros(1, 1, dtype=torch.float64)
    x, values, slopes = along(lambda output: loss(output.reshape(1, 1), target), ERRORS)
    label = "output - target"
    curves = [Curve(Panel("loss", label), x, values)]
    curves.append(Curve(Panel("gradient", label), x, slopes))
    if min(values) == max(values):
        return None
    numbers = {"x_is": "error", "x": x, "loss": values, "gradient": slopes}
    return PartCurves(curves, "over the error, output - target", numbers)


def over_output(loss: Callable[..., Tensor]) -> PartCurves | None:
    """Return a loss over one output for the targets 1 and 0; None if it is constant."""
    curves = []
    numbers: dict[str, Any] = {"x_is": "output"}
    for target in (1.0, 0.0):
        targets = torch.tensor([[target]], dtype=torch.float64)

        def of_output(output: Tensor, targets: Tensor = targets) -> Tensor:
            return loss(output.reshape(1, 1), targets)

        x, values, slopes = along(of_output, MARGINS)
        if min(values) == max(values):
            return None
        label = f"target {target:g}"
        curves.append(Curve(Panel("loss", "output"), x, values, label))
        curves.append(Curve(Panel("gradient", "output"), x, slopes, label))
        numbers |= {"x": x, f"loss_{target:g}": values, f"gradient_{target:g}": slopes}
    return PartCurves(curves, "over the output, for a target of 1 and of 0", numbers)


def over_margin(loss: Callable[..., Tensor], target: Tensor) -> PartCurves:
    """Return a loss over the output of the true class, where those of the others are 0."""
    weight = class_weights(loss)
    others = torch.zeros(1 if weight is None else len(weight) - 1, dtype=torch.float64)

    def of_margin(margin: Tensor) -> Tensor:
        return loss(torch.cat([margin.reshape(1), others])[None], target)

    x, values, slopes = along(of_margin, MARGINS)
    if min(values) == max(values):
        raise NotPlotted("it is constant over the output of the true class")
    curves = [Curve(Panel("loss", "margin"), x, values)]
    curves.append(Curve(Panel("gradient", "margin"), x, slopes))
    note = "over the margin, the output of the true class minus that of the other one"
    numbers = {"x_is": "margin", "x": x, "loss": values, "gradient": slopes}
    return PartCurves(curves, note, numbers)


def along(
    function: Callable[[Tensor], Tensor], most: float
) -> tuple[list[float], list[float], list[float]]:
    """Return inputs from -most to most, and the values and derivatives of a function there."""
    values = []
    slopes = []
    inputs = torch.linspace(-most, most, 241, dtype=torch.float64)
    for each in inputs:
        x = each.clone().requires_grad_()
        value = function(x)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise NotPlotted("it does not return one number")
        slope = torch.autograd.grad(value.sum(), x)[0] if value.requires_grad else math.nan
        values.append(float(value.detach()))
        slopes.append(float(slope))
    return inputs.tolist(), values, slopes


# initializers


def initializer_curves(maker: Maker) -> PartCurves:
    """Return the distribution of weights, and the size of the outputs of 20 layers.

    The layers have 256 units, weights of the initializer, no biases, and no activation, relu, or
    tanh. Their inputs are drawn from N(0, 1).
    """
    inputs = torch.randn(WIDTH, WIDTH)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": nn.Identity(),
        "relu": torch.relu,
        "tanh": torch.tanh,
    }
    outputs = dict.fromkeys(functions, inputs)
    deviations: dict[str, list[float]] = {name: [] for name in functions}
    weights = torch.empty(0)
    for layer in range(DEPTH):
        weight = torch.empty(WIDTH, WIDTH)
        with torch.no_grad():
            maker(weight)
        if layer == 0:
            weights = weight.flatten()
        for name, function in functions.items():
            outputs[name] = function(outputs[name] @ weight.T)
            deviations[name].append(float(outputs[name].std()))
    low = float(weights.min())
    high = float(weights.max())
    mean = float(weights.mean())
    std = float(weights.std())
    curves = []
    counts: list[float] = []
    edges: list[float] = []
    if high > low:
        counts = torch.histc(weights, BINS, low, high).tolist()
        edges = torch.linspace(low, high, BINS + 1).tolist()
        curves.append(histogram_curve(edges, counts))
    layers = [float(layer) for layer in range(1, DEPTH + 1)]
    for name in functions:
        title = "std of the output" if name == "linear" else f"std of the output, {name}"
        curves.append(Curve(Panel(title, "layer", log=True), layers, deviations[name]))
    ends = ", ".join(f"{name} {values[-1]:.3g}" for name, values in deviations.items())
    note = f"weights of mean {mean:.2g} and std {std:.3g}; "
    note += f"std of the output after {DEPTH} layers: {ends}"
    histogram = {"edges": edges, "counts": [int(count) for count in counts]}
    about = {"mean": mean, "std": std, "min": low, "max": high, "histogram": histogram}
    numbers = {"units": WIDTH, "weights": about, "output_std": deviations}
    return PartCurves(curves, note, numbers)


def histogram_curve(edges: list[float], counts: list[float]) -> Curve:
    """Return the share of the weights in each bin, as steps that begin and end at 0."""
    x = [edges[0]]
    y = [0.0]
    total = sum(counts)
    for index, count in enumerate(counts):
        x += [edges[index], edges[index + 1]]
        y += [100 * count / total] * 2
    return Curve(Panel(f"% of {WIDTH * WIDTH:,} weights", "weight"), [*x, edges[-1]], [*y, 0.0])


# optimizers


@dataclass(frozen=True)
class Surface:
    """A function of two numbers that optimizers minimize.

    Attributes:
        name: its name.
        function: maps x and y, tensors of one shape, to its values.
        start: the first point of each path.
        minimum: where it is smallest; its value there is 0.
        window: the lowest and highest x, and the lowest and highest y, that are drawn.
    """

    name: str
    function: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, float]
    minimum: tuple[float, float]
    window: tuple[float, float, float, float]


def quadratic(x: Tensor, y: Tensor) -> Tensor:
    """(x² + 16 y²) / 2: the curvature is 1 along x and 16 along y."""
    return (x**2 + 16 * y**2) / 2


def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
    """((1 - x)² + 100 (y - x²)²) / 200, a curved valley (Rosenbrock 1960).

    It is divided by 200 so that learning rates of about 0.1 are stable, as on the quadratic.
    """
    return ((1 - x) ** 2 + 100 * (y - x**2) ** 2) / 200


SURFACES = (
    Surface("quadratic", quadratic, (-4.0, 1.5), (0.0, 0.0), (-5.0, 2.0, -2.0, 2.0)),
    Surface("Rosenbrock", rosenbrock, (-1.5, 1.0), (1.0, 1.0), (-2.0, 1.6, -0.6, 2.6)),
)


def optimizer_curves(maker: Maker, steps: int = 200) -> PartCurves:
    """Return the paths of an optimizer on the test surfaces.

    The point is the diagonal of a weight matrix (2, 2), as some optimizers update matrices by a
    rule of their own. A second matrix without gradient is the output layer, which may be excepted.
    """
    curves = []
    paths = {}
    longest = 0.0
    for surface in SURFACES:
        points, losses = path_on(surface, maker, steps)
        x = [point[0] for point in points]
        y = [point[1] for point in points]
        curves.append(Curve(Panel(surface.name, "", surface=surface), x, y))
        has_diverged = len(points) <= steps
        curves[-1].label = f"loss {losses[-1]:.3g}"
        if has_diverged:
            curves[-1].label = f"diverges at step {len(points) - 1:,}"
        longest = max(longest, math.dist(points[0], points[-1]))
        paths[surface.name.lower()] = {
            "points": points,
            "losses": losses,
            "final_loss": losses[-1],
            "diverged": has_diverged,
        }
    rate = learning_rate(maker)
    note = f"{steps:,} steps"
    if rate is not None and "lr" not in maker.settings:
        note += f" with lr={rate:g}"
    if rate is not None and longest < SHORT:
        note += f", too few to move far; try optimizer.lr={100 * rate:g}"
    return PartCurves(curves, note, {"steps": steps, "lr": rate} | paths)


def path_on(
    surface: Surface, maker: Maker, steps: int
) -> tuple[list[tuple[float, float]], list[float]]:
    """Return the points of an optimizer's path and their losses; it ends if it diverges."""
    weight = nn.Parameter(torch.diag(torch.tensor(surface.start, dtype=torch.float64)))
    output = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = maker([weight, output])
    points: list[tuple[float, float]] = []
    losses: list[float] = []
    for step in range(steps + 1):
        loss = surface.function(weight[0, 0], weight[1, 1])
        x, y = weight.detach().diag().tolist()
        points.append((x, y))
        losses.append(float(loss.detach()))
        if step == steps or not losses[-1] < DIVERGED:
            break
        weight.grad = torch.autograd.grad(loss, weight)[0]
        optimizer.step()
    return points, losses


def learning_rate(maker: Maker) -> float | None:
    """Return the learning rate of an optimizer; None if it has none."""
    setting = maker.entry.settings.get("lr")
    if setting is None:
        return None
    return float(maker.settings.get("lr", setting.default))


def contour_points(surface: Surface, columns: int, rows: int) -> Iterator[tuple[float, float]]:
    """Yield some points of a grid next to contour lines of a surface, whose levels differ by 10.

    Two of five points of a line are left, in each direction, so that it is dotted.
    """
    left, right, bottom, top = surface.window
    x = torch.linspace(left, right, columns, dtype=torch.float64)
    y = torch.linspace(bottom, top, rows, dtype=torch.float64)
    values = surface.function(x[None, :], y[:, None])
    levels = (values + 3e-3).log10().floor()
    edge = torch.zeros_like(levels, dtype=torch.bool)
    edge[:, 1:] |= levels[:, 1:] != levels[:, :-1]
    edge[1:] |= levels[1:] != levels[:-1]
    for row, column in edge.nonzero().tolist():
        if (2 * column + row) % 5 in (0, 2):
            yield float(x[column]), float(y[row])


MEASURES: dict[str, Callable[..., PartCurves]] = {
    "activation": activation_curves,
    "scheduler": schedule_curves,
    "loss": loss_curves,
    "initializer": initializer_curves,
    "optimizer": optimizer_curves,
}


def maker_of(kind: str, name: str, settings: dict[str, Any]) -> Maker:
    """Return the maker of a registered part with settings.

    Raises:
        SettingError: a setting has a wrong value.
    """
    return Registry.every[kind].maker(name, **settings)
