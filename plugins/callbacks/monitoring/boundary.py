"""A callback that shows what a network computes over a plane: its outputs and its hidden units."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from framework import (
    Context,
    Every,
    PositiveInt,
    SettingError,
    callbacks,
    check_read_again,
    drawing,
    files,
    read_spread_samples,
)
from framework.contracts.periodic_callback import PeriodicCallback

if TYPE_CHECKING:
    from rich.console import RenderableType

GRID = 100  # points of the plane in each direction
UNIT_GRID = 39  # the same for a hidden unit
FRAME_MILLISECONDS = 150
COLORS_OF_A_FRAME = 256
MOST_LAYERS = 6
UNITS_IN_A_ROW = 8
LIGHT = 0.45  # share of the color of a class in its region; the rest is white
LOW, HIGH = drawing.COLORS[:2]
EDGE = (120, 120, 120)
NEEDS = "callbacks.boundary needs"


class Plane(NamedTuple):
    """The outputs of a network over a plane, in colors.

    Attributes:
        regions: shape (3, GRID, GRID), values in [0, 1]; the first row is the top.
        units: by layer, the values of its units, shape (units, GRID, GRID).
    """

    regions: Tensor
    units: dict[str, Tensor]


@callbacks.register("boundary")
class Boundary(PeriodicCallback):
    """Shows the decision regions of a network with two inputs, and each of its hidden units.

    The data has samples of two numbers, and one class or one value for each. The loggers get the
    regions with the training points as an image, and the values of hidden units over the plane,
    blue below 0 and red above, with one scale for each layer. The values of a layer are those after
    its activation, if this is a module. boundary.gif in the folder of the run has a picture for
    each time.

    Args:
        every: how often to draw.
        points: the number of training points to draw, at most.
        units: the number of units of each layer to draw, at most; of many layers, 6 are drawn.
        live: show the regions in the terminal below the progress bar (callback progress), in colors
            with half blocks. Without a bar it shows nothing.
    """

    only_main = True
    runs_model = True

    def __init__(
        self,
        every: Every = "1epoch",
        points: PositiveInt = 500,
        units: PositiveInt = 16,
        live: bool = False,
    ):
        super().__init__(every)
        self.points = points
        self.units = units
        self.live = live
        self.animation_bytes = 0  # of boundary.gif, without its end mark
        self.animation_size = [0, 0]
        self.regions: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state | {"bytes": self.animation_bytes, "size": self.animation_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.animation_bytes = state.get("bytes", 0)
        self.animation_size = list(state.get("size", [0, 0]))

    def on_fit_start(self, trainer: Context) -> None:
        self.inputs, self.targets = training_points(trainer, self.points)
        self.regions = None
        self.axes = [axis_of(self.inputs[:, column]) for column in (0, 1)]
        self._remove_later_frames(trainer)
        if trainer.resumed_from is None:
            self.show_once(trainer)

    def cost(self) -> str:
        return f"runs the model on a grid of the plane, {self.cadence}"

    def on_step_end(self, trainer: Context) -> None:
        self.show_if_due(trainer)

    def live_view(self, columns: int, rows: int) -> "RenderableType | None":
        """Return the regions in lines of half blocks, for the callback progress.

        Args:
            columns: the largest width in characters.
            rows: the largest number of lines.
        """
        rows = min(rows, columns // 2, 24)
        if not self.live or self.regions is None or rows < 4:
            return None
        from rich.text import Text

        from framework import plot  # it imports rich

        picture = F.interpolate(self.regions[None], (2 * rows, 2 * rows), mode="area")[0]
        for point, color in zip(self.inputs.tolist(), self._point_colors(), strict=True):
            across, up = (axis.position(x) for axis, x in zip(self.axes, point, strict=True))
            row = min(2 * rows - 1, int((1 - up) * 2 * rows))
            column = min(2 * rows - 1, int(across * 2 * rows))
            picture[:, row, column] = torch.tensor(color) / 255
        return Text("\n").join(plot.half_blocks(drawing.pixels_of(picture)))

    def show(self, trainer: Context) -> None:
        state = trainer.state
        plane = self._measure(trainer)
        self.regions = plane.regions
        if not trainer.loggers and trainer.folder is None:
            return
        chart = self._chart(plane.regions, f"epoch {state.epoch}, step {state.step:,}")
        units = units_picture(plane.units)
        for logger in trainer.loggers:
            logger.images("boundary", chart, state.step)
            if units is not None:
                logger.images("boundary/units", units, state.step)
        if trainer.folder is not None:
            self._add_frame(
                trainer, chart if units is None else drawing.side_by_side([chart, units])
            )

    def _measure(self, trainer: Context) -> Plane:
        """Return the outputs of a copy of the model over the plane."""
        model = copy.deepcopy(trainer.model)
        x, y = (torch.linspace(axis.low, axis.high, GRID) for axis in self.axes)
        grid = torch.cartesian_prod(y.flip(0), x).flip(1).to(self.inputs.dtype)
        recorded: list[tuple[str, nn.Module, Tensor]] = []
        with trainer.precision.inference(model), recording(model, recorded):
            outputs = trainer.task.model_outputs(model, (grid.to(trainer.device),))
        if not isinstance(outputs, Tensor) or outputs.shape[:1] != (len(grid),):
            raise SettingError(f"{NEEDS} a model with one output tensor")
        if self.targets.is_floating_point() and outputs[:1].numel() != 1:
            count = outputs[:1].numel()
            raise SettingError(f"{NEEDS} a model with one value for each sample, got {count}")
        probabilities = trainer.task.predict(outputs).get("probabilities")
        if isinstance(probabilities, Tensor):
            outputs = probabilities
        elif not self.targets.is_floating_point():
            outputs = outputs.float().softmax(1)
        outputs = outputs.float().cpu().flatten(1)
        return Plane(self._colors(outputs), hidden_units(recorded, self.units))

    def _colors(self, outputs: Tensor) -> Tensor:
        """Return the colors of probabilities or values (GRID², number) as an image."""
        if self.targets.is_floating_point():
            low, high = self.targets.aminmax()
            shares = (outputs[:, 0] - low) / (high - low).clamp(min=1e-12)
            colors = diverging(2 * shares - 1)
        else:
            colors = outputs @ class_colors(outputs.shape[1])
        light = 1 - LIGHT * (1 - colors)
        return light.T.reshape(3, GRID, GRID)

    def _point_colors(self) -> list[drawing.Color]:
        if self.targets.is_floating_point():
            low, high = self.targets.aminmax()
            shares = (self.targets - low) / (high - low).clamp(min=1e-12)
            colors = diverging(2 * shares - 1)
        else:
            colors = class_colors(int(self.targets.max()) + 1)[self.targets.clamp(min=0)]
        return [(red, green, blue) for red, green, blue in (colors * 255).int().tolist()]

    def _chart(self, regions: Tensor, title: str) -> Tensor:
        x, y = self.axes
        chart = drawing.Chart(title, x, y, "x1", "x2", height=drawing.CARD)
        chart.background(regions)
        # Points of values may be nearly white.
        edge = EDGE if self.targets.is_floating_point() else drawing.WHITE
        for point, color in zip(self.inputs.tolist(), self._point_colors(), strict=True):
            chart.points([(point[0], point[1])], color, edge=edge)
        return chart.tensor()

    # the animation

    def _remove_later_frames(self, trainer: Context) -> None:
        """Cut boundary.gif to the frames of the checkpoint from which the run resumes."""
        if trainer.folder is None or not (trainer.folder / "boundary.gif").exists():
            self.animation_bytes = 0
            return
        file = files.AppendFile(trainer.folder, "boundary.gif")
        if file.file.seek(0, 2) < self.animation_bytes:
            self.animation_bytes = 0
        file.file.truncate(self.animation_bytes)
        if self.animation_bytes:
            file.append(b";")
        file.close()

    def _add_frame(self, trainer: Context, picture: Tensor) -> None:
        """Append a picture (1, 3, H, W) to boundary.gif, which is complete after each of them."""
        from PIL import GifImagePlugin, Image  # only a run that draws needs them

        image = drawing.as_pillow(picture[0]).quantize(
            COLORS_OF_A_FRAME, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
        )
        record = b"".join(
            GifImagePlugin.getdata(image, duration=FRAME_MILLISECONDS, include_color_table=True)
        )
        if self.animation_bytes == 0 or self.animation_size != list(image.size):
            self.animation_bytes = 0
            self.animation_size = list(image.size)
            record = animation_header(*image.size) + record
        assert trainer.folder is not None
        file = files.AppendFile(trainer.folder, "boundary.gif")
        file.file.truncate(self.animation_bytes)
        file.append(record + b";")
        file.close()
        self.animation_bytes += len(record)


def animation_header(width: int, height: int) -> bytes:
    """Return the beginning of a GIF (version 89a) that repeats without end."""
    size = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    return b"GIF89a" + size + b"\x00\x00\x00" + b"!\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00"


def training_points(trainer: Context, most: int) -> tuple[Tensor, Tensor]:
    """Return finite inputs (N, 2) and targets (N,) of the training split, on the CPU.

    Raises:
        SettingError: the data has other inputs or targets.
        DataError: the data can be read only once.
    """
    check_read_again(trainer.train_batches, "callbacks.boundary")
    batch = read_spread_samples(trainer.train_batches, most, trainer.device)
    inputs = trainer.task.fields.only_input(batch)
    shape = tuple(inputs.shape[1:])
    if shape != (2,) or not inputs.is_floating_point():
        raise SettingError(f"{NEEDS} samples of two numbers (shape (2,)), got shape {shape}")
    if trainer.task.phases or not trainer.task.splits_batches:
        name = type(trainer.task).__name__
        raise SettingError(
            f"{NEEDS} a task with one class or one value for each sample, got {name}"
        )
    model = copy.deepcopy(trainer.model)
    with trainer.precision.inference(model):
        step = trainer.task.step(model, batch)
    targets = step.targets
    if not isinstance(targets, Tensor) or targets.shape not in ((len(inputs),), (len(inputs), 1)):
        raise SettingError(f"{NEEDS} one class or one value for each sample")
    targets = targets.flatten()
    if targets.is_floating_point():
        targets = targets.float()
    inputs = inputs.to("cpu", copy=True)
    targets = targets.to("cpu", copy=True)
    is_finite = inputs.isfinite().all(1) & targets.isfinite()
    if not is_finite.any():
        raise SettingError(f"{NEEDS} training points that are finite")
    return inputs[is_finite], targets[is_finite]


def axis_of(values: Tensor) -> drawing.Axis:
    """Return an axis with all values, and a margin of 10 %."""
    low = float(values.min())
    high = float(values.max())
    margin = 0.1 * (high - low) or 1.0
    return drawing.Axis(low - margin, high + margin)


@contextmanager
def recording(model: nn.Module, found: list[tuple[str, nn.Module, Tensor]]) -> Iterator[None]:
    """Record the outputs of the modules without children, in the order of their calls."""
    hooks = []
    for name, module in model.named_modules():
        if next(module.children(), None) is not None:
            continue

        def record(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and output.shape[:1] == (GRID**2,):
                found.append((name, module, output))

        hooks.append(module.register_forward_hook(record))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def hidden_units(recorded: list[tuple[str, nn.Module, Tensor]], most: int) -> dict[str, Tensor]:
    """Return the values of the first units of each hidden layer, by the name of the layer.

    A layer begins with a module that has a weight matrix, and its values are the outputs of the
    last module before the next one, such as the activation. The last layer is the output.
    """
    layers: dict[str, Tensor] = {}
    name = ""
    for each, module, output in recorded:
        if any(parameter.ndim > 1 for parameter in module.parameters()):
            name = each
        if name and output.ndim == 2:
            layers[name] = output
    names = list(layers)[:-1]
    if len(names) > MOST_LAYERS:
        names = [names[round(i * (len(names) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]
    shapes = {name: layers[name][:, :most] for name in names}
    return {name: values.float().cpu().T.reshape(-1, GRID, GRID) for name, values in shapes.items()}


def units_picture(units: dict[str, Tensor]) -> Tensor | None:
    """Return an image (1, 3, H, W) of the units of each layer; None without layers."""
    if not units:
        return None
    tile = UNIT_GRID + 4
    rows = {name: -(-len(values) // UNITS_IN_A_ROW) for name, values in units.items()}
    width = max(drawing.CARD, UNITS_IN_A_ROW * tile + 4)
    canvas = drawing.Canvas(width, sum(20 + count * tile for count in rows.values()) + 6)
    top = 2
    for name, values in units.items():
        canvas.text(4, top + 9, drawing.cut_to_width(canvas, name, width - 8), "lm")
        scale = values.nan_to_num(0).abs().max().clamp(min=1e-12)
        small = F.interpolate(values[:, None], (UNIT_GRID, UNIT_GRID), mode="area")[:, 0]
        for number, value in enumerate(small):
            left = (number % UNITS_IN_A_ROW) * tile + 4
            row = number // UNITS_IN_A_ROW
            colors = diverging(value.flatten() / scale).T.reshape(3, UNIT_GRID, UNIT_GRID)
            above = top + 20 + row * tile
            canvas.box(left - 1, above - 1, left + UNIT_GRID, above + UNIT_GRID, drawing.GRAY)
            canvas.paste(colors, left, above, UNIT_GRID, UNIT_GRID)
        top += 20 + rows[name] * tile
    return canvas.tensor()


def class_colors(classes: int) -> Tensor:
    """Return a color for each class, shape (classes, 3), values in [0, 1]."""
    colors = [drawing.COLORS[index % len(drawing.COLORS)] for index in range(classes)]
    return torch.tensor(colors) / 255


def diverging(values: Tensor) -> Tensor:
    """Return colors (N, 3) of values (N,): blue for -1, white for 0, red for 1."""
    values = values.nan_to_num(0).clamp(-1, 1)[:, None]
    ends = torch.where(values < 0, torch.tensor(LOW) / 255, torch.tensor(HIGH) / 255)
    return 1 - values.abs() * (1 - ends)
