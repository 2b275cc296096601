"""The results of a search as text and charts: importance of hyperparameters, ranges of the best."""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import get_param_importances
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from framework.contracts.direction import direction_sign
from framework.runtime.display.drawing import BLACK, Canvas, Color

MIN_TRIALS = 4  # finished trials for an estimate of importances
BAR_WIDTH = 20  # characters
WORST = (196, 206, 222)
BEST = (178, 24, 43)
HEIGHT = 380  # pixels of the chart of parallel coordinates
AXIS_DISTANCE = 170
MARGIN = 70


def completed_trials(study: Study) -> list[FrozenTrial]:
    """Return the trials that were trained to their end."""
    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def ranked_trials(study: Study, objective: int = 0) -> list[FrozenTrial]:
    """Return the completed trials, best value of an objective first, of equal ones the earlier."""
    sign = objective_sign(study, objective)

    def rank(trial: FrozenTrial) -> tuple[float, int]:
        return -sign * trial.values[objective], trial.number

    return sorted(completed_trials(study), key=rank)


def objective_sign(study: Study, objective: int = 0) -> float:
    """Return the factor that makes high values of an objective the better ones."""
    is_minimized = study.directions[objective] == StudyDirection.MINIMIZE
    return direction_sign("min" if is_minimized else "max")


def importances(study: Study, objective: int = 0) -> dict[str, float]:
    """Return the importance of each hyperparameter for being among the best tenth of the trials.

    Computed by PED-ANOVA (Watanabe et al. 2023, arXiv:2304.10255).

    Returns:
        The share of each hyperparameter, the largest first; the sum is 1. Empty if there are fewer
        than four trials, or if all have the same value.
    """
    trials = completed_trials(study)
    sign = objective_sign(study, objective)
    if len(trials) < MIN_TRIALS or len({trial.values[objective] for trial in trials}) == 1:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns that low values of the target are the best
        return get_param_importances(study, target=lambda trial: -sign * trial.values[objective])


def importance_table(study: Study, metrics: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a table for each metric.

    A row has a hyperparameter, its importance as a bar, its best value, and the range of its values
    in the best quarter of the trials.
    """
    for objective, metric in enumerate(metrics):
        shares = importances(study, objective)
        if not shares:
            continue
        ranked = ranked_trials(study, objective)
        best_quarter = ranked[: math.ceil(len(ranked) / 4)]
        rows = [("", f"matters for {metric}", "best", "best quarter")]
        for name, share in shares.items():
            bar = f"{'█' * round(share * BAR_WIDTH):<{BAR_WIDTH}} {share:4.0%}"
            value = ranked[0].params.get(name)
            best = "" if value is None else short_value(value)
            rows.append((name, bar, best, value_range(best_quarter, name)))
        yield ""
        yield from aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a line for each row, with cells padded to the width of their column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = map(str.ljust, row, widths)
        yield "  ".join(cells).rstrip()


def value_range(trials: Sequence[FrozenTrial], name: str) -> str:
    """Return the values of a hyperparameter as text.

    That is "lowest to highest" for numbers, and otherwise the choices, the most frequent first.
    """
    values = [trial.params[name] for trial in trials if name in trial.params]
    if not values:
        return ""
    if all(isinstance(value, int | float) for value in values):
        low = short_value(min(values))
        high = short_value(max(values))
        return low if low == high else f"{low} to {high}"
    counts = Counter(map(str, values))
    return ", ".join(choice for choice, _ in counts.most_common())


def short_value(value: Any) -> str:
    """Return a value as text, a real number with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def charts(study: Study, metrics: Sequence[str]) -> dict[str, Tensor]:
    """Return charts of a search, (1, 3, H, W) in [0, 1], by tag.

    For each metric there is one of the importances, and one with each trial as a line through the
    values of its hyperparameters.
    """
    drawn = {}
    for objective, metric in enumerate(metrics):
        shares = importances(study, objective)
        if not shares:
            continue
        drawn[f"search/importance of hyperparameters for {metric}"] = draw_bars(shares)
        parallel = draw_parallel(study, list(shares), metric, objective)
        drawn[f"search/parallel coordinates, {metric}"] = parallel
    return drawn


def draw_bars(shares: dict[str, float]) -> Tensor:
    """Draw a bar for each hyperparameter."""
    canvas = Canvas(420, 40 + 32 * len(shares))  # TensorBoard shows it about 330 pixels wide
    for row, (name, share) in enumerate(shares.items()):
        middle = 36 + 32 * row
        canvas.text(190, middle, name, "rm")
        canvas.box(198, middle - 9, 198 + 170 * share, middle + 9, BEST)
        canvas.text(204 + 170 * share, middle, f"{share:.0%}", "lm")
    return canvas.tensor()


class AxisScale:
    """Maps the values of a hyperparameter or metric to heights on an axis, from 0 to 1."""

    def __init__(self, values: Sequence[Any], distribution: BaseDistribution | None = None):
        self.choices: list[Any] = []
        if isinstance(distribution, CategoricalDistribution):
            self.choices = list(distribution.choices)
            return
        self.low = float(min(values))
        self.high = float(max(values))
        if distribution is None:
            self.log = self.low > 0 and self.high > 100 * self.low
        else:
            self.log = bool(getattr(distribution, "log", False))

    def __call__(self, value: Any) -> float:
        """Return the height of a value."""
        if self.choices:
            return (self.choices.index(value) + 0.5) / len(self.choices)
        transform = math.log if self.log else float
        low = transform(self.low)
        high = transform(self.high)
        return 0.5 if low == high else (transform(float(value)) - low) / (high - low)

    def labels(self) -> list[tuple[float, str]]:
        """Return the height and text of each label."""
        values = self.choices or sorted({self.low, self.high})
        return [(self(value), short_value(value)) for value in values]


def draw_parallel(study: Study, names: Sequence[str], metric: str, objective: int = 0) -> Tensor:
    """Draw each trial as a line over an axis for each hyperparameter and one for the metric.

    Good trials are red. The line of a trial without a hyperparameter skips the axis.
    """
    ranked = ranked_trials(study, objective)
    scales = []
    for name in names:
        values = [trial.params[name] for trial in ranked if name in trial.params]
        scales.append(AxisScale(values, find_distribution(ranked, name)))
    scales.append(AxisScale([trial.values[objective] for trial in ranked]))
    canvas = Canvas(2 * MARGIN + AXIS_DISTANCE * len(names), HEIGHT)
    for rank in reversed(range(len(ranked))):  # the best on top
        trial = ranked[rank]
        values = [trial.params.get(name) for name in names]
        values.append(trial.values[objective])
        points = []
        for axis, (value, scale) in enumerate(zip(values, scales, strict=True)):
            if value is not None:
                points.append((MARGIN + AXIS_DISTANCE * axis, y_position(scale(value))))
        color = rank_color(rank / max(len(ranked) - 1, 1))
        canvas.line(points, color, 5 if rank == 0 else 2)
    for axis, (name, scale) in enumerate(zip([*names, metric], scales, strict=True)):
        x = MARGIN + AXIS_DISTANCE * axis
        canvas.line([(x, y_position(0)), (x, y_position(1))], BLACK)
        canvas.text(x, 18, name)
        for height, label in scale.labels():
            canvas.text(x + 6, y_position(height), label, "lm")
    return canvas.tensor()


def find_distribution(trials: Sequence[FrozenTrial], name: str) -> BaseDistribution | None:
    """Return the distribution of a hyperparameter in the first trial that has it."""
    for trial in trials:
        if name in trial.distributions:
            return trial.distributions[name]
    return None


def y_position(height: float) -> float:
    """Return the pixel row of a height on an axis."""
    return HEIGHT - 24 - height * (HEIGHT - 74)


def rank_color(rank: float) -> Color:
    """Return the color of a relative rank, from 0 (best) to 1 (worst)."""
    share = min(1.0, 2 * rank)
    red, green, blue = (
        round(best + (worst - best) * share) for best, worst in zip(BEST, WORST, strict=True)
    )
    return red, green, blue
