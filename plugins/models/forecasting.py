"""Forecasting models, a metric of forecasts, and images of predicted and true values.

Inputs are (lookback, channels); the first channel is the one to forecast. Outputs are its next
values (horizon,).
"""

from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from framework import (
    Activation,
    BuildError,
    Context,
    Every,
    Metric,
    NonNegativeInt,
    PositiveInt,
    Rate,
    SettingError,
    Shape,
    TensorSplit,
    blocks,
    callbacks,
    drawing,
    evaluation,
    metrics,
    models,
    shapes,
)
from framework.contracts.alignment import same_shape
from framework.contracts.periodic_callback import ValidationCallback

RED = (220, 0, 0)
MOST_POINTS = 500  # of a scatter plot; more are drawn as shades
SHADES = 140  # rows and columns of shades


class SeasonalNaive(nn.Module):
    """Repeat the last season of the first channel for the next `horizon` values.

    Args:
        in_shape: (lookback, channels).
        out_shape: (horizon,).
        season: steps of the season, at most lookback.
        name: the name of the model, for messages.

    Raises:
        BuildError: the season is longer than the lookback.
    """

    rows: Tensor

    def __init__(self, in_shape: Shape, out_shape: Shape, season: int, name: str):
        super().__init__()
        lookback, _ = shapes.expect(in_shape, "(T, D)", name)
        if season > lookback:
            raise BuildError(f"{name}: season={season} is longer than the lookback of {lookback}")
        steps = torch.arange(prod(out_shape))
        self.register_buffer("rows", lookback - season + steps % season, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0].index_select(1, self.rows)


@models.register("linear_forecast", aliases=["nlinear"])
class LinearForecast(nn.Module):
    """One linear layer from past to future differences to the last value (NLinear).

    It reads the first channel only (Zeng et al. 2023, arXiv:2205.13504, section 3.3).
    """

    def __init__(self, in_shape: Shape, out_shape: Shape):
        super().__init__()
        lookback, _ = shapes.expect(in_shape, "(T, D)", "linear_forecast")
        self.linear = nn.Linear(lookback, prod(out_shape))

    def forward(self, x: Tensor) -> Tensor:
        past = x[:, :, 0]
        return past[:, -1:] + self.linear(past - past[:, -1:])


class NBeatsBlock(nn.Module):
    """Linear layers, then a linear layer for the backcast and one for the forecast, which is zero.

    Args:
        inputs: number of inputs: the past, and the other channels of the last step.
        lookback: number of values of the backcast.
        horizon: number of values of the forecast.
        width: features of each linear layer.
        layers: number of linear layers before the last ones.
        activation: after each of these layers.
        dropout: probability of zeroing a feature of these layers.
    """

    def __init__(
        self,
        inputs: int,
        lookback: int,
        horizon: int,
        width: int,
        layers: int,
        activation: Activation,
        dropout: float,
    ):
        super().__init__()
        layer = blocks.maker("linear", width=width, activation=activation, dropout=dropout)
        self.body = nn.Sequential(layer((inputs,)))
        for _ in range(layers - 1):
            self.body.append(layer((width,)))
        self.backcast = nn.Linear(width, lookback)
        self.forecast = nn.Linear(width, horizon)
        nn.init.zeros_(self.forecast.weight)
        nn.init.zeros_(self.forecast.bias)

    def forward(self, past: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(torch.cat([past, now], dim=1))
        return self.backcast(hidden), self.forecast(hidden)


@models.register("nbeats")
class NBeats(nn.Module):
    """Generic N-BEATS: each block subtracts its backcast from the past and adds to the forecast.

    Oreshkin et al. 2020, arXiv:1905.10437, section 3. In addition, all blocks read the other
    channels of the last step (the calendar), the past is given as differences to its last value,
    and the forecast starts from that value, or with a `season` from the values one season before.
    The last layers of the blocks start at zero, so the initial forecast is the naive one.

    Args:
        season: number of steps of the season that the forecast starts from; 0: start from the
            last value.
        depth: number of blocks.
        layers: number of linear layers of a block.
        width: features of each linear layer.
        activation: after each linear layer.
        dropout: probability of zeroing a feature.
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        season: NonNegativeInt = 0,
        depth: PositiveInt = 3,
        layers: PositiveInt = 3,
        width: PositiveInt = 128,
        activation: Activation = "relu",
        dropout: Rate = 0.0,
    ):
        super().__init__()
        lookback, channels = shapes.expect(in_shape, "(T, D)", "nbeats")
        sizes = (lookback + channels - 1, lookback, prod(out_shape), width, layers)
        self.naive = SeasonalNaive(in_shape, out_shape, season or 1, "nbeats")
        self.blocks = nn.ModuleList(NBeatsBlock(*sizes, activation, dropout) for _ in range(depth))
        self.blocks[-1].backcast.requires_grad_(False)  # no block reads its residual

    def forward(self, x: Tensor) -> Tensor:
        past = x[:, :, 0] - x[:, -1:, 0]
        calendar = x[:, -1, 1:]
        forecast = self.naive(x)
        for block in self.blocks:
            backcast, change = block(past, calendar)
            past = past - backcast
            forecast = forecast + change
        return forecast


@metrics.register("mape")
class MeanAbsolutePercentageError(Metric):
    """Mean absolute difference of outputs and targets in percent of the targets, ignoring zeros."""

    name = "mape"
    better = "lower"
    targets: ClassVar[tuple[str, ...]] = ("value",)

    def sums(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = same_shape(outputs, targets)
        counted = targets != 0
        shares = (outputs.double() - targets).abs() / torch.where(counted, targets.abs(), 1)
        return torch.stack([(shares * counted).sum(), counted.sum()])

    def compute(self, sums: Tensor) -> float:
        return 100 * float(sums[0] / sums[1])


@callbacks.register("predictions")
class Predictions(ValidationCallback):
    """Logs images of predictions on the validation split, as a scatter plot or as curves.

    With one value per sample: predicted (y axis) against true values (x axis) in the unit of the
    data, with a red diagonal; more than 500 samples as shades, darker for more. With several
    values, such as a forecast: a few samples as curves, the true one black and the predicted one
    red.

    Args:
        every: how often images are logged.
        curves: number of samples shown as curves, evenly spaced in the split.
        samples: largest number of samples in a scatter plot.
    """

    name = "predictions"

    def __init__(
        self, every: Every = "1epoch", curves: PositiveInt = 4, samples: PositiveInt = 4096
    ):
        super().__init__(every)
        self.curves = curves
        self.samples = samples

    def on_fit_start(self, trainer: Context) -> None:
        split = None if trainer.val_batches is None else trainer.val_batches.split
        if trainer.val_batches is None:
            problem = "there is no validation split"
        elif not isinstance(split, TensorSplit):
            problem = "the validation split is not in memory"
        elif split.names:
            problem = "its samples are dicts"
        elif not split.tensors[-1].is_floating_point():
            problem = "the targets are classes (use callbacks.confusion)"
        else:
            return
        raise SettingError(
            "callbacks.predictions: expected a validation split in memory with values as targets:"
            f" {problem}"
        )

    def cost(self) -> str:
        return f"runs the model on at most {self.samples:,} samples, {self.cadence}"

    @torch.no_grad()
    def show(self, trainer: Context) -> None:
        assert trainer.val_batches is not None
        split = trainer.val_batches.split
        assert isinstance(split, TensorSplit)
        several = split.tensors[-1][0].numel() > 1
        count = min(self.curves if several else self.samples, len(split))
        inputs, targets = split[torch.linspace(0, len(split) - 1, count).long()]
        with trainer.precision.inference(trainer.model):
            on_device = inputs.to(trainer.device)
            outputs = trainer.strategy.forward(run_model, trainer.model, on_device)
        outputs = outputs.float().cpu().flatten(1)
        targets = targets.float().cpu().flatten(1)
        if several:
            pictures = draw_curves(outputs, targets)
        else:
            scale = evaluation.target_scale(trainer.folder)
            if scale is not None:
                outputs = scale.inverse_transform(outputs)
                targets = scale.inverse_transform(targets)
            pictures = draw_scatter(outputs, targets)
        for logger in trainer.loggers:
            logger.images("predictions", pictures, trainer.state.step)


def run_model(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the outputs of a model."""
    outputs: Tensor = model(inputs)
    return outputs


def rescale(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return values mapped linearly from [low, high] to [0, 1]."""
    return (values - low) / (high - low).clamp_min(1e-12)


def draw_scatter(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return an image (1, 3, H, W) of outputs against targets, over the range of targets.

    Samples whose output or target is not finite are left out.
    """
    is_finite = outputs.isfinite() & targets.isfinite()
    outputs = outputs[is_finite]
    targets = targets[is_finite]
    low, high = targets.aminmax() if len(targets) else (torch.zeros(()), torch.ones(()))
    ends = (float(low), float(high))
    axis = drawing.Axis(*ends)
    title = f"{len(targets):,} validation samples"
    chart = drawing.Chart(title, axis, axis, "true value", "prediction", height=drawing.CARD)
    if len(targets) > MOST_POINTS:
        x = rescale(targets, low, high).clamp(0, 1) * (SHADES - 1)
        y = rescale(outputs, low, high).clamp(0, 1) * (SHADES - 1)
        pixels = (SHADES - 1 - y.round().long()) * SHADES + x.round().long()
        counts = pixels.flatten().bincount(minlength=SHADES**2).reshape(SHADES, SHADES).float()
        chart.background(1 - counts.log1p()[None] / counts.max().log1p())
    else:
        chart.points(list(zip(targets.tolist(), outputs.tolist(), strict=True)), drawing.COLORS[0])
    chart.line([(ends[0], ends[0]), (ends[1], ends[1])], RED, "perfect")
    return chart.tensor()


def draw_curves(outputs: Tensor, targets: Tensor, height: int = 120, width: int = 320) -> Tensor:
    """Return images (samples, 3, height, width) of outputs (red) and targets (black) as curves."""
    both = torch.cat([outputs, targets], dim=1)
    low = both.amin(1, keepdim=True)
    high = both.amax(1, keepdim=True)
    true = draw_line(rescale(targets, low, high), height, width)
    predicted = draw_line(rescale(outputs, low, high), height, width)
    paper = 1 - torch.maximum(true, predicted)
    return torch.stack([torch.maximum(paper, predicted), paper, paper], dim=1)


def draw_line(values: Tensor, height: int, width: int) -> Tensor:
    """Return masks (samples, height, width) of lines through values (samples, points) in [0, 1]."""
    points = interpolate(values[:, None], width, mode="linear", align_corners=True)[:, 0]
    rows = (1 - points) * (height - 1)
    following = torch.cat([rows[:, 1:], rows[:, -1:]], dim=1)
    low = torch.minimum(rows, following).floor()[:, None]
    high = torch.maximum(rows, following).ceil()[:, None]
    row = torch.arange(height)[:, None]
    return ((row >= low) & (row <= high)).float()
