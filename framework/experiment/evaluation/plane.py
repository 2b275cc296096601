"""Planes in the space of weights: two directions, and the checkpoints of a run projected onto them.

Directions change weight matrices and kernels only. Biases and the parameters of norms, which have
one axis, stay as they are ("biasbn" in the code of Li et al. 2018, arXiv:1712.09913).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framework.errors import BuildError
from framework.runtime import seeds

LEAST_CHECKPOINTS = 3  # for the main directions of a path

Weights = dict[str, Tensor]


@dataclass
class Plane:
    """The points center + x first + y second.

    Attributes:
        center: the weights of the model that directions change, by name.
        first, second: the directions, by name.
        kind: "pca" or "random".
        path: coordinates (x, y) of the checkpoints, nearest point of the plane.
        explained: the share of the squared distances between the checkpoints and the center that
            the plane contains; None without another checkpoint.
    """

    center: Weights
    first: Weights
    second: Weights
    kind: str
    path: list[tuple[float, float]]
    explained: float | None

    @contextmanager
    def moving(self, model: nn.Module) -> Iterator["Mover"]:
        """Yield an object that moves the weights of a model on the plane, and restore them."""
        mover = Mover(self, model)
        try:
            yield mover
        finally:
            mover.restore()


class Mover:
    """Moves the weights of a model, on its device, to points of a plane."""

    def __init__(self, plane: Plane, model: nn.Module):
        parameters = dict(model.named_parameters())
        self.moved = []
        for name, center in plane.center.items():
            parameter = parameters[name]
            tensors = [center, plane.first[name], plane.second[name]]
            self.moved.append((parameter, *[tensor.to(parameter.device) for tensor in tensors]))

    @torch.no_grad()
    def move_to(self, x: float, y: float) -> None:
        """Set the weights to those of the point (x, y)."""
        for parameter, center, first, second in self.moved:
            parameter.copy_(center + x * first + y * second)

    @torch.no_grad()
    def restore(self) -> None:
        """Set the weights to those of the center."""
        for parameter, center, _, _ in self.moved:
            parameter.copy_(center)


def movable_weights(model: nn.Module) -> Weights:
    """Return copies of the weight matrices and kernels of a model on the CPU.

    Raises:
        BuildError: they have less than two numbers together, or one that is not finite.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            found[name] = parameter.detach().cpu().clone()
            if not are_finite(found[name]):
                raise BuildError(f"the weights {name} of the model are not finite")
    numbers = sum(weight.numel() for weight in found.values())
    if numbers < 2:
        raise BuildError(
            f"{type(model).__name__}: a plane needs at least 2 numbers in weights with two axes or "
            f"more, got {numbers}"
        )
    return found


def are_finite(weight: Tensor) -> bool:
    """Return whether all numbers are finite."""
    return bool(weight.isfinite().all())


def random_plane(center: Weights, checkpoints: Sequence[Mapping[str, Tensor]], seed: int) -> Plane:
    """Return a plane of two random directions with the norms of the filters of the model.

    A direction is drawn from a normal distribution. Then each of its filters (the part of a weight
    for one output) is scaled to the norm of the filter of the model (Li et al. 2018, section 4).

    Args:
        center: the weights of the model.
        checkpoints: further weights, which are projected.
        seed: of the directions.
    """
    first = random_direction(center, seeds.generator(seed, "landscape", 1))
    second = random_direction(center, seeds.generator(seed, "landscape", 2))
    return with_path(center, first, second, "random", checkpoints)


def random_direction(center: Weights, generator: torch.Generator) -> Weights:
    """Return a random direction with normalized filters."""
    direction = {}
    for name, weight in center.items():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
        norms = weight.flatten(1).norm(dim=1)
        scale = norms / noise.flatten(1).norm(dim=1).clamp(min=1e-10)
        direction[name] = noise * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return direction


def main_plane(center: Weights, checkpoints: Sequence[Mapping[str, Tensor]]) -> Plane:
    """Return the plane of the two main directions of the checkpoints, seen from the center.

    They are the first right singular vectors of the matrix of the differences from the center, as
    unit vectors: x and y are distances in the space of weights (Li et al. 2018, section 7).

    Args:
        center: the weights of the model.
        checkpoints: further weights, at least two that are different from the center.
    """
    differences = torch.stack([difference(center, each) for each in checkpoints])
    _, _, rows = torch.linalg.svd(differences, full_matrices=False)
    first = as_weights(oriented(rows[0], differences), center)
    second = as_weights(oriented(rows[1], differences), center)
    return with_path(center, first, second, "pca", checkpoints)


def oriented(direction: Tensor, differences: Tensor) -> Tensor:
    """Return a direction with the sign that gives the first checkpoint a positive coordinate."""
    return -direction if float(differences[0] @ direction) < 0 else direction


def with_path(
    center: Weights,
    first: Weights,
    second: Weights,
    kind: str,
    checkpoints: Sequence[Mapping[str, Tensor]],
) -> Plane:
    """Return a plane with the path of the checkpoints, by least squares.

    Directions may be parallel or 0, such as those of weights of 0: then the coordinates are those
    with the smallest norm.
    """
    path: list[tuple[float, float]] = []
    kept = 0.0
    total = 0.0
    basis = torch.stack([flat(first), flat(second)], dim=1)  # (numbers, 2)
    gram = basis.T @ basis
    inverse = torch.linalg.pinv(gram, rtol=1e-6, hermitian=True)
    for checkpoint in checkpoints:
        moved = difference(center, checkpoint)
        coordinates = inverse @ (basis.T @ moved)
        x, y = coordinates.tolist()
        path.append((x, y))
        kept += float(coordinates @ gram @ coordinates)
        total += float(moved @ moved)
    return Plane(center, first, second, kind, path, kept / total if total > 0 else None)


def flat(weights: Mapping[str, Tensor]) -> Tensor:
    """Return all weights as one vector in float64."""
    return torch.cat([weight.double().flatten() for weight in weights.values()])


def difference(center: Weights, checkpoint: Mapping[str, Tensor]) -> Tensor:
    """Return the difference of a checkpoint from the center as one vector in float64."""
    moved = {name: checkpoint[name] for name in center}
    return flat(moved) - flat(center)


def as_weights(vector: Tensor, like: Weights) -> Weights:
    """Return a vector as weights by name."""
    pieces = vector.split([weight.numel() for weight in like.values()])
    weights = {}
    for (name, weight), piece in zip(like.items(), pieces, strict=True):
        weights[name] = piece.reshape(weight.shape).to(weight.dtype)
    return weights
