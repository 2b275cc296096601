"""The loss of a trained run on a plane through its weights (Li et al. 2018, arXiv:1712.09913)."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from framework.data.dataset import Data, GatheredSplit, is_in_memory, split_of
from framework.data.workers import Split
from framework.errors import CheckpointError, Facts, FrameworkError, RunError, wrong_option
from framework.errors.terminal import note
from framework.experiment.build import build_loader
from framework.experiment.trained.load import Trained
from framework.runs import checkpoint
from framework.runtime import seeds
from framework.runtime.batch import Batch

from .plane import (
    LEAST_CHECKPOINTS,
    Plane,
    are_finite,
    main_plane,
    movable_weights,
    random_plane,
)

MARGIN = 0.25  # around the path, as a share of its extent
MOST_POINTS = 201
MOST_CHECKPOINTS = 64  # of a path; of more, evenly spaced ones
Directions = Literal["auto", "pca", "random"]


@dataclass
class Landscape:
    """The loss at the points of a grid on a plane.

    Attributes:
        run: the folder.
        checkpoint: the one at the center, (0, 0).
        directions: "pca" or "random", see `plane`.
        split: the split of the samples.
        samples: the number of samples.
        seed: of samples and random directions.
        x, y: coordinates of the grid.
        losses: for each y, the loss at each x; NaN or infinite where it is not finite.
        center: the loss at the center.
        path: the checkpoints: step, x, y, and the loss of the checkpoint itself, which may be off
            the plane.
        explained: see `Plane`.
    """

    run: Path
    checkpoint: str
    directions: str
    split: str
    samples: int
    seed: int
    x: list[float]
    y: list[float]
    losses: list[list[float]]
    center: float
    path: list[dict[str, float]]
    explained: float | None


class Surface:
    """The plane of a run and the samples on which its loss is measured.

    Args:
        trained: an open run.
        data: its data.
        split: the name of a split.
        samples: the number of samples to use; all, if the split has fewer.
        seed: of the choice of samples and of random directions.
        directions: "auto" is "pca" with at least 3 checkpoints.

    Raises:
        FrameworkError: the run has too few checkpoints for "pca".
    """

    def __init__(
        self,
        trained: Trained,
        data: Data,
        split: str,
        samples: int,
        seed: int,
        directions: Directions,
    ):
        self.trained = trained
        self.split = split
        self.seed = seed
        loader = build_loader(trained.spec, trained.model, data, split)  # checks the name
        if samples < len(loader.split):
            chosen = copy.copy(data)
            setattr(chosen, split, random_part(loader.split, samples, seed))
            loader = build_loader(trained.spec, trained.model, chosen, split)
        self.evaluator = trained.trainer()
        with self.evaluator.reading(loader, model=trained.model, task=trained.task):
            loader.to(self.evaluator.device)
            self.batches: list[Batch] = [loader.keep(batch) for batch in loader.epoch()]
        self.samples = len(loader.split)
        center = movable_weights(trained.model)
        self.steps, checkpoints = read_path(trained, center)
        moved = [each for each in checkpoints if any_different(each, center)]
        if directions == "pca" and len(moved) < LEAST_CHECKPOINTS - 1:
            error = FrameworkError(
                f"--directions pca: {trained.run} has {len(moved) + 1} checkpoints with different "
                f"weights, expected at least {LEAST_CHECKPOINTS} (callbacks.checkpoint.keep)"
            )
            raise error.with_facts(Facts("--directions", "pca"))
        if directions == "auto":
            directions = "pca" if len(moved) >= LEAST_CHECKPOINTS - 1 else "random"
        self.checkpoints = checkpoints
        if directions == "pca":
            self.plane: Plane = main_plane(center, checkpoints)
        else:
            self.use_random_directions()

    def use_random_directions(self) -> None:
        """Replace the plane by one of random directions."""
        center = movable_weights(self.trained.model)
        self.plane = random_plane(center, self.checkpoints, self.seed)

    def loss(self) -> float:
        """Return the loss of the present weights on the samples, as `eval` measures it."""
        values = self.evaluator.evaluate(
            self.batches,
            model=self.trained.model,
            task=self.trained.task,
            metrics=(),
            name=self.split,
        )
        return values[f"{self.split}/loss"]

    def extent(self) -> tuple[list[float], list[float]]:
        """Return the lowest and highest x and y of the path, with the center."""
        xs = [0.0, *(x for x, _ in self.plane.path)]
        ys = [0.0, *(y for _, y in self.plane.path)]
        return [min(xs), max(xs)], [min(ys), max(ys)]

    def measure(
        self, x: Sequence[float], y: Sequence[float], done: Callable[[], None]
    ) -> Landscape:
        """Measure the loss on a grid.

        Args:
            x: coordinates along the first direction.
            y: coordinates along the second direction.
            done: called after each point.
        """
        model = self.trained.model
        losses: list[list[float]] = []
        with self.plane.moving(model) as mover:
            for up in y:
                losses.append([])
                for across in x:
                    mover.move_to(across, up)
                    losses[-1].append(self.loss())
                    done()
        center = self.loss()
        return Landscape(
            run=self.trained.run,
            checkpoint=self.trained.checkpoint.name,
            directions=self.plane.kind,
            split=self.split,
            samples=self.samples,
            seed=self.seed,
            x=list(x),
            y=list(y),
            losses=losses,
            center=center,
            path=self.measure_path(),
            explained=self.plane.explained,
        )

    def measure_path(self) -> list[dict[str, float]]:
        """Return step, coordinates and loss of the checkpoints."""
        model = self.trained.model
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        path = []
        try:
            for step, weights, (x, y) in zip(
                self.steps, self.checkpoints, self.plane.path, strict=True
            ):
                model.load_state_dict(weights, strict=False)
                path.append({"step": step, "x": x, "y": y, "loss": self.loss()})
        finally:
            model.load_state_dict(own)
        return path


def measure_landscapes(
    surfaces: Sequence[Surface],
    points: int,
    span: float | None,
    done: Callable[[], None] = lambda: None,
) -> list[Landscape]:
    """Measure the loss of runs on grids with the same coordinates and directions of one kind.

    Args:
        surfaces: of one run or of several.
        points: of an axis of the grid.
        span: the grid is from -span to span; None: around the paths, or from -1 to 1 for random
            directions.
        done: called after each point of each grid.

    Raises:
        FrameworkError: points or span cannot be used.
    """
    if not 3 <= points <= MOST_POINTS:
        raise wrong_option("--points", points, f"an integer from 3 to {MOST_POINTS}")
    if span is not None and not (0 < span < math.inf):
        raise wrong_option("--span", span, "a number above 0")
    if len({surface.plane.kind for surface in surfaces}) > 1:  # one has too few checkpoints
        for surface in surfaces:
            surface.use_random_directions()
    ranges = [[-1.0, 1.0], [-1.0, 1.0]]
    if span is not None:
        ranges = [[-span, span], [-span, span]]
    elif surfaces[0].plane.kind == "pca":
        extents = [surface.extent() for surface in surfaces]
        for axis in range(2):
            low = min(extent[axis][0] for extent in extents)
            high = max(extent[axis][1] for extent in extents)
            ranges[axis] = [low, high]
        width = max(high - low for low, high in ranges) or 1.0
        ranges = [[low - MARGIN * width, high + MARGIN * width] for low, high in ranges]
    x = grid(ranges[0][0], ranges[0][1], points)
    y = grid(ranges[1][0], ranges[1][1], points)
    return [surface.measure(x, y, done) for surface in surfaces]


def grid(low: float, high: float, points: int) -> list[float]:
    """Return evenly spaced numbers from about low to high, with 0 among them."""
    step = (high - low) / (points - 1)
    before = min(points - 1, max(0, round(-low / step)))
    return [(index - before) * step for index in range(points)]


def check_comparable(first: Trained, second: Trained) -> None:
    """Raise RunError unless the losses of two runs are of the same kind and on the same data."""

    def data_of(run: Trained) -> Any:
        facts = dict(run.facts.get("data") or {})
        facts.pop("in_shape", None)  # the same pixels as an image or as a vector
        return run.spec.parts["data"].entry.name, facts

    checks: dict[str, Callable[[Trained], Any]] = {
        "data": data_of,
        "task": lambda run: run.spec.parts["task"].entry.name,
        "loss": lambda run: type(run.task.criterion).__name__,
    }
    for name, value in checks.items():
        if value(first) != value(second):
            error = RunError(
                f"--against {second.run}: its {name} differs from that of {first.run}, so that the "
                "losses cannot be compared"
            )
            raise error.with_facts(Facts("--against", str(second.run)))


def read_path(
    trained: Trained, center: Mapping[str, Tensor]
) -> tuple[list[int], list[dict[str, Tensor]]]:
    """Return the steps and weights of the checkpoints of a run.

    Damaged ones, and those with another model or numbers that are not finite, are left out.

    Args:
        trained: an open run.
        center: the weights of the model that directions change, by name.
    """
    found = checkpoint.listed(trained.run / "checkpoints")
    if len(found) > MOST_CHECKPOINTS:
        last = len(found) - 1
        places = [round(i * last / (MOST_CHECKPOINTS - 1)) for i in range(MOST_CHECKPOINTS)]
        found = [found[place] for place in places]
    shapes = {name: tuple(each.shape) for name, each in trained.model.state_dict().items()}
    steps = []
    weights = []
    for each in found:
        try:
            state = checkpoint.load_model(each)
        except CheckpointError as error:
            note(f"{error}; the path is drawn without it")
            continue
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
            note(f"{each} has other weights than the model of the run; the path is without it")
            continue
        if not all(are_finite(state[name]) for name in center):
            note(f"{each} has weights that are not finite; the path is drawn without it")
            continue
        steps.append(checkpoint.step_of(each))
        weights.append(state)
    return steps, weights


def any_different(weights: dict[str, Tensor], center: dict[str, Tensor]) -> bool:
    """Return whether weights differ from those at the center."""
    return any(not torch.equal(weights[name].to(each), each) for name, each in center.items())


class GatheredPart(GatheredSplit):
    """Some samples of a split that makes its batches.

    Args:
        split: the split.
        indices: those that `split.gather` takes, shape (samples,).
    """

    def __init__(self, split: GatheredSplit, indices: Tensor):
        self.split = split
        self.indices = indices
        self.bytes_per_sample = split.bytes_per_sample
        self.reuses_memory = split.reuses_memory
        self.place = split.place

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> "GatheredPart":
        """Make further batches on a device, and return this split."""
        self.split = self.split.to(device)
        self.device = device
        return self

    def gather(self, indices: Tensor) -> Batch:
        """Return the samples at indices as one batch."""
        return self.split.gather(self.indices[indices])


def random_part(split: Split, count: int, seed: int) -> Split:
    """Return some samples of a split in their order, drawn without replacement."""
    order = torch.randperm(len(split), generator=seeds.generator(seed, "landscape", "samples"))
    rows = order[:count].sort().values
    if isinstance(split, GatheredSplit):
        return GatheredPart(split, split.indices_of(rows))
    if is_in_memory(split):
        return split_of(split[rows])
    return torch.utils.data.Subset(split, rows.tolist())  # type: ignore[arg-type]
