"""What a search has learned: which hyperparameters matter, where the best trials lie; in words and in pictures."""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import get_param_importances
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

FEWEST = 4  # finished trials, below which nothing is said
BAR = 20
Color = tuple[int, int, int]
INK, FAINT, WORST, BEST = (40, 40, 40), (225, 225, 225), (196, 206, 222), (178, 24, 43)
HEIGHT, STEP, MARGIN = 380, 170, 70


def finished(study: Study) -> list[FrozenTrial]:
    """Return the trials that trained to their end."""
    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def ranked_trials(study: Study, objective: int = 0) -> list[FrozenTrial]:
    """Return the finished trials, the best of one objective first; of equals, the earlier one."""
    sign = sign_of(study, objective)
    return sorted(finished(study), key=lambda trial: (sign * trial.values[objective], trial.number))


def sign_of(study: Study, objective: int) -> int:
    """Return what an objective is multiplied by so that less is better."""
    return 1 if study.directions[objective] == StudyDirection.MINIMIZE else -1


def importances(study: Study, objective: int = 0) -> dict[str, float]:
    """Return how much of what parts the best tenth of the trials from the rest each hyperparameter explains, together
    1, the largest first: PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255). Nothing, of too few or equal trials.
    """
    trials, sign = finished(study), sign_of(study, objective)
    if len(trials) < FEWEST or len({trial.values[objective] for trial in trials}) == 1:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a low target is the good one
        return get_param_importances(study, target=lambda trial: sign * trial.values[objective])


def report(study: Study, metrics: Sequence[str]) -> Iterator[str]:
    """Yield lines: for each metric a table of hyperparameters, with bars, the best value and where the best lie."""
    for objective, metric in enumerate(metrics):
        shares, best = importances(study, objective), ranked_trials(study, objective)
        if not shares:
            continue
        rows = [("", f"matters for {metric}", "best", "best quarter")]
        for name, share in shares.items():
            value = best[0].params.get(name)
            bar = f"{'█' * round(share * BAR):<{BAR}} {share:4.0%}"
            rows.append(
                (
                    name,
                    bar,
                    "" if value is None else brief(value),
                    span(best[: math.ceil(len(best) / 4)], name),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        yield ""
        for row in rows:
            yield "  ".join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            ).rstrip()


def span(trials: Sequence[FrozenTrial], name: str) -> str:
    """Return what a hyperparameter is in some trials: from least to most, or the choices, the commonest first."""
    values = [trial.params[name] for trial in trials if name in trial.params]
    if not values:
        return ""
    if all(isinstance(value, int | float) for value in values):
        low, high = brief(min(values)), brief(max(values))
        return low if low == high else f"{low} to {high}"
    return ", ".join(
        sorted(set(map(str, values)), key=lambda each: -sum(str(value) == each for value in values))
    )


def brief(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def pictures(study: Study, metrics: Sequence[str]) -> dict[str, Tensor]:
    """Return pictures (1, 3, H, W) by tag: importances, and every trial as a line through its values."""
    drawn = {}
    for objective, metric in enumerate(metrics):
        shares = importances(study, objective)
        if shares:
            drawn[f"search/importance of hyperparameters for {metric}"] = draw_bars(shares)
            drawn[f"search/parallel coordinates, {metric}"] = draw_parallel(
                study, list(shares), metric, objective
            )
    return drawn


class Canvas:
    """A white picture, drawn at twice its size so that lines are smooth."""

    def __init__(self, width: int, height: int):
        from PIL import (
            Image,
            ImageDraw,
            ImageFont,
        )  # not at the top: only a search that ends needs it

        self.image = Image.new("RGB", (2 * width, 2 * height), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(24)

    def line(self, points: Sequence[tuple[float, float]], color: Color, width: int = 2) -> None:
        self.draw.line([(2 * x, 2 * y) for x, y in points], fill=color, width=width, joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        self.draw.rectangle((2 * left, 2 * top, 2 * right, 2 * bottom), fill=color)

    def text(self, x: float, y: float, text: str, anchor: str = "mm") -> None:
        self.draw.text((2 * x, 2 * y), text, fill=INK, anchor=anchor, font=self.font)

    def tensor(self) -> Tensor:
        """Return the picture as (1, 3, H, W) in [0, 1]."""
        small = self.image.reduce(2)
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        return pixels.reshape(1, small.height, small.width, 3).permute(0, 3, 1, 2) / 255


def draw_bars(shares: dict[str, float]) -> Tensor:
    canvas = Canvas(640, 40 + 32 * len(shares))
    for row, (name, share) in enumerate(shares.items()):
        middle = 36 + 32 * row
        canvas.text(235, middle, name, "rm")
        canvas.box(245, middle - 9, 245 + 330 * share, middle + 9, BEST)
        canvas.text(252 + 330 * share, middle, f"{share:.0%}", "lm")
    return canvas.tensor()


class AxisScale:
    """Where values lie on an upright axis, from 0 (below) to 1, and the labels beside it."""

    def __init__(self, values: Sequence[Any], drawn: BaseDistribution | None = None):
        self.choices = list(drawn.choices) if isinstance(drawn, CategoricalDistribution) else []
        if self.choices:
            return
        self.low, self.high = float(min(values)), float(max(values))
        wide = self.low > 0 and self.high > 100 * self.low
        self.log = bool(getattr(drawn, "log", False)) or (drawn is None and wide)

    def __call__(self, value: Any) -> float:
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        low, high, value = (
            math.log(each) if self.log else each for each in (self.low, self.high, float(value))
        )
        return 0.5 if low == high else (value - low) / (high - low)

    def labels(self) -> list[tuple[float, str]]:
        ends = self.choices or ([self.low] if self.low == self.high else [self.low, self.high])
        return [(self(value), brief(value)) for value in ends]


def draw_parallel(study: Study, names: Sequence[str], metric: str, objective: int = 0) -> Tensor:
    """Draw each trial as a line over an axis for each hyperparameter and one for the metric; good ones are red.

    A trial that has no such hyperparameter passes its axis by.
    """
    best = ranked_trials(study, objective)
    scales = [
        AxisScale([t.params[n] for t in best if n in t.params], last_distribution(best, n))
        for n in names
    ]
    scales.append(AxisScale([trial.values[objective] for trial in best]))
    canvas = Canvas(2 * MARGIN + STEP * len(names), HEIGHT)
    for number, trial in reversed(list(enumerate(best))):
        share = number / max(len(best) - 1, 1)
        values = [trial.params.get(name) for name in names] + [trial.values[objective]]
        points = [
            (MARGIN + STEP * axis, place(scales[axis](value)))
            for axis, value in enumerate(values)
            if value is not None
        ]
        canvas.line(points, mixed(share), 5 if number == 0 else 2)
    for axis, (name, scale) in enumerate(zip([*names, metric], scales, strict=True)):
        x = MARGIN + STEP * axis
        canvas.line([(x, place(0)), (x, place(1))], INK)
        canvas.text(x, 18, name)
        for height, label in scale.labels():
            canvas.text(x + 6, place(height), label, "lm")
    return canvas.tensor()


def last_distribution(trials: Sequence[FrozenTrial], name: str) -> BaseDistribution | None:
    return next(
        (trial.distributions[name] for trial in trials if name in trial.distributions), None
    )


def place(height: float) -> float:
    return HEIGHT - 24 - height * (HEIGHT - 74)


def mixed(share: float) -> Color:
    """Return a color from that of the best (0) to that of the worst (1)."""
    share = min(1.0, 2 * share)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(BEST, WORST, strict=True))
    return red, green, blue
