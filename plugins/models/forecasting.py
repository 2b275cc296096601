"""Models that forecast, a measure of forecasts, and a picture of predicted and true amounts.

Inputs are (lookback, channels), the first channel being what is forecast; outputs are its next values (horizon,).
"""

from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from framework import (
    Activation,
    BuildError,
    Callback,
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
    metrics,
    models,
    shapes,
)
from framework.contracts.alignment import same_shape
from framework.contracts.state import Cadence


class SeasonalNaive(nn.Module):
    """What was, one season before: the next `horizon` values of the first channel, each the newest of its phase."""

    def __init__(self, in_shape: Shape, out_shape: Shape, season: int, who: str):
        super().__init__()
        lookback, _ = shapes.expect(in_shape, "(T, D)", who)
        if season > lookback:
            raise BuildError(
                f"{who}: season={season} is longer than the {lookback} steps that it looks back on"
            )
        steps = torch.arange(prod(out_shape))
        self.register_buffer("rows", lookback - season + steps % season, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0].index_select(1, self.rows)


@models.register("linear_forecast", aliases=["nlinear"])
class LinearForecast(nn.Module):
    """One linear map from the past to the future, of differences to the last value.

    NLinear (Zeng et al. 2023, arXiv:2205.13504, section 3.3), of the first channel alone.
    """

    def __init__(self, in_shape: Shape, out_shape: Shape):
        super().__init__()
        lookback, _ = shapes.expect(in_shape, "(T, D)", "linear_forecast")
        self.linear = nn.Linear(lookback, prod(out_shape))

    def forward(self, x: Tensor) -> Tensor:
        past = x[:, :, 0]
        return past[:, -1:] + self.linear(past - past[:, -1:])


class NBeatsBlock(nn.Module):
    """Linear layers, and from them what a block explains of the past and says of the future."""

    def __init__(
        self,
        inputs: int,
        lookback: int,
        horizon: int,
        width: int,
        layers: int,
        activation,
        dropout: float,
    ):
        super().__init__()
        rest = {"width": width, "activation": activation, "dropout": dropout}
        makers = [blocks.maker("linear", **rest) for _ in range(layers)]
        sizes = [inputs, *[width] * (layers - 1)]
        self.body = nn.Sequential(
            *(maker((size,)) for maker, size in zip(makers, sizes, strict=True))
        )
        self.backcast, self.forecast = nn.Linear(width, lookback), nn.Linear(width, horizon)

    def forward(self, past: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(torch.cat([past, now], dim=1))
        return self.backcast(hidden), self.forecast(hidden)


@models.register("nbeats")
class NBeats(nn.Module):
    """Blocks that each take away what they explain of the past, and add to the forecast: the generic N-BEATS.

    Oreshkin et al. 2020, arXiv:1905.10437, section 3. Added to it: all blocks see the other channels of the last step
    (the calendar), the past is given as differences to its last value, and the forecast starts from that value, or with
    a `season` from the values one season before.
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
        """Build the blocks; at first the forecast is the naive one, for their last layers are zero.

        Args:
            season: steps of a season that the forecast starts from; 0: it starts from the last value.
            depth: blocks.
            layers: linear layers of a block.
            width: features of each.
            activation: after each.
            dropout: probability of zeroing a feature.
        """
        super().__init__()
        lookback, channels = shapes.expect(in_shape, "(T, D)", "nbeats")
        sizes = (lookback + channels - 1, lookback, prod(out_shape), width, layers)
        self.naive = SeasonalNaive(in_shape, out_shape, season or 1, "nbeats")
        self.blocks = nn.ModuleList(NBeatsBlock(*sizes, activation, dropout) for _ in range(depth))
        for block in self.blocks:
            nn.init.zeros_(block.forecast.weight)
            nn.init.zeros_(block.forecast.bias)

    def forward(self, x: Tensor) -> Tensor:
        past, now, forecast = x[:, :, 0] - x[:, -1:, 0], x[:, -1, 1:], self.naive(x)
        for block in self.blocks:
            explained, more = block(past, now)
            past, forecast = past - explained, forecast + more
        return forecast


@metrics.register("mape")
class MeanAbsolutePercentageError(Metric):
    """The mean absolute difference of outputs and targets, in per cent of the targets, without those that are 0."""

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
class Predictions(Callback):
    """Gives the loggers pictures of predictions on the validation split: of amounts, against the true ones; of curves.

    For one value a sample, predicted (upwards) against true (to the right), dark where there are many, red where they
    are equal. For several, such as a forecast, a few samples as curves: the true one black, the predicted one red.
    """

    changes_training = False

    def __init__(
        self, every: Every = "1epoch", curves: PositiveInt = 4, samples: PositiveInt = 4096
    ):
        """Say how often and how many.

        Args:
            every: how often.
            curves: samples that are shown as curves, evenly spaced over the split.
            samples: most samples whose one value is shown.
        """
        self.cadence, self.curves, self.samples = Cadence(every), curves, samples

    def on_fit_start(self, trainer: Context) -> None:
        split = None if trainer.val_batches is None else trainer.val_batches.split
        missing = None
        if trainer.val_batches is None:
            missing = "there is no validation split"
        elif not isinstance(split, TensorSplit):
            missing = "the validation split is not in memory"
        elif not split.tensors[-1].is_floating_point():
            missing = "the targets here are classes (callbacks.confusion shows those)"
        if missing is not None:
            said = "it shows predicted values beside the targets of a validation split in memory"
            raise SettingError(f"callbacks.predictions: {said}; {missing}")

    def on_step_end(self, trainer: Context) -> None:
        if self.cadence.due(trainer.state, epoch_end=trainer.state.batch == 0):
            self._show(trainer)

    @torch.no_grad()
    def _show(self, trainer: Context) -> None:
        split = trainer.val_batches.split  # type: ignore[union-attr]
        several = split.tensors[-1][0].numel() > 1
        count = min(self.curves if several else self.samples, len(split))
        inputs, targets = split[torch.linspace(0, len(split) - 1, count).long()]
        with trainer.precision.inference(trainer.model):
            outputs = trainer.model(inputs.to(trainer.device)).float().cpu().flatten(1)
        draw = curves if several else scatter
        pictures = draw(outputs, targets.float().cpu().flatten(1))
        for logger in trainer.loggers:
            logger.images("predictions", pictures, trainer.state.step)


def scatter(outputs: Tensor, targets: Tensor, size: int = 160) -> Tensor:
    """Return a picture (1, 3, size, size) of outputs against targets, from the lowest to the highest target."""
    low, high = targets.min(), targets.max()
    across, up = (
        ((x - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * (size - 1)
        for x in (targets, outputs)
    )
    cells = (size - 1 - up.round().long()) * size + across.round().long()
    counts = cells.flatten().bincount(minlength=size * size).reshape(size, size).float()
    ink = counts.log1p() / counts.max().log1p()
    equal = torch.eye(size).flip(1)
    return torch.stack([1 - ink, (1 - ink) * (1 - equal), (1 - ink) * (1 - equal)])[None]


def curves(outputs: Tensor, targets: Tensor, height: int = 120, width: int = 320) -> Tensor:
    """Return a picture (samples, 3, height, width) of each sample's outputs, red, over its targets, black."""
    both = torch.cat([outputs, targets], dim=1)
    low, high = both.amin(1, keepdim=True), both.amax(1, keepdim=True)
    true, predicted = (
        line((x - low) / (high - low).clamp_min(1e-12), height, width) for x in (targets, outputs)
    )
    paper = 1 - torch.maximum(true, predicted)
    return torch.stack([torch.maximum(paper, predicted), paper, paper], dim=1)


def line(shares: Tensor, height: int, width: int) -> Tensor:
    """Return lines through points at even distances, (samples, points) from 0 to 1, as ink (samples, height, width)."""
    points = interpolate(shares[:, None], width, mode="linear", align_corners=True)[:, 0]
    rows = (1 - points) * (height - 1)
    after = torch.cat([rows[:, 1:], rows[:, -1:]], dim=1)
    low, high = (
        torch.minimum(rows, after).floor()[:, None],
        torch.maximum(rows, after).ceil()[:, None],
    )
    row = torch.arange(height)[:, None]
    return ((row >= low) & (row <= high)).float()
