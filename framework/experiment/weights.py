"""Load the weights of a run or a file into a model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from framework.errors import CheckpointError, RunError
from framework.errors.paths import expanded
from framework.runs import checkpoint
from framework.runs.folder import (
    resolve_run,
)
from framework.system.files import first_words

if TYPE_CHECKING:
    pass


def start_from(model: nn.Module, source: str) -> str:
    """Fill a model with the weights of a run (its best checkpoint), a checkpoint or a .safetensors file, where names
    and shapes match; returns a report of what did not.

    Raises RunError when there is no such thing, when nothing matches, and when no matrix of the
    model does: biases and norms are useless without the weights that they belong to.
    """
    weights = read_weights(expanded(source))
    state = model.state_dict()
    own = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    fitting = {
        name: tensor
        for name, tensor in weights.items()
        if name in own and own[name].shape == tensor.shape
    }
    if not fitting:
        raise RunError(
            f"init_from={source}: none of its {len(weights)} tensors has the name and shape of one here"
        )
    matrices = [name for name, tensor in own.items() if tensor.ndim > 1]
    if matrices and not fitting.keys() & set(matrices):
        raise RunError(
            f"init_from={source}: only {len(fitting)} of {len(own)} tensors match, and none of the "
            f"{len(matrices)} weight matrices: {matrices[0]} is {shape_text(own[matrices[0]])} "
            f"here, and {shape_text(weights.get(matrices[0]))} there"
        )
    model.load_state_dict(fitting, strict=False)
    taken = sum(tensor.numel() for tensor in fitting.values())
    share = taken / max(sum(tensor.numel() for tensor in own.values()), 1)
    shapes = [
        f"{n} {tuple(weights[n].shape)} for {tuple(own[n].shape)}"
        for n in weights
        if n in own.keys() - fitting
    ]
    groups = {
        "of another shape": shapes,
        "left as initialized": sorted(own.keys() - weights.keys()),
        "not used": sorted(weights.keys() - own.keys()),
    }
    said = [f"{what}: {', '.join(names)}" for what, names in groups.items() if names]
    count = f"{len(fitting)} of {len(own)} tensors from {source}"
    if share < 0.5:
        count = f"only {count}, {share:.1%} of the model's numbers"
    return "; ".join([count, *said])


def load_weights(model: nn.Module, run: Path, which: str = "best") -> Path | None:
    """Load the best (or last, or a named) checkpoint's weights; returns which one, None when there is none."""
    chosen = chosen_checkpoint(run, which)
    if chosen is not None:
        fill(model, chosen, run)
    return chosen


def fill(model: nn.Module, chosen: Path, run: Path) -> None:
    """Load the weights of a checkpoint. Raises RunError when they do not fit the model."""
    weights = checkpoint.load_model(chosen)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise RunError(f"{chosen} does not fit the model of {run}: {first_words(error)}") from error


def chosen_checkpoint(run: Path, which: str = "best") -> Path | None:
    """Return a run's best checkpoint, or else its newest good one (`last`: at once).

    Any other word is the folder of a checkpoint, or the name of one of this run.
    """
    folder = run / "checkpoints"
    if which not in ("best", "last"):
        named = folder / which
        return named if named.is_dir() else resolve_run(expanded(which))
    checkpoint.refuse_links(folder)
    if (
        which == "best"
        and os.path.lexists(folder / "best")
        and checkpoint.target_of(folder / "best").is_dir()
    ):
        return folder / "best"
    return checkpoint.newest(folder)[0] if folder.is_dir() else None


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            if not path.is_file():
                raise RunError(f"init_from={path}: there is no such file")
            checkpoint.check_memory(path, path.stat().st_size)
            return load_file(path)
        path = resolve_run(path)
        if (path / "checkpoints").is_dir():
            chosen = chosen_checkpoint(path)
            if chosen is None:
                raise RunError(f"init_from={path}: the run has no good checkpoint")
            path = chosen
        return checkpoint.load_model(path)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise RunError(
            f"init_from={path}: should be a run, a checkpoint or a .safetensors file: {error}"
        ) from error


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def shape_text(tensor: Tensor | None) -> str:
    return "no such tensor" if tensor is None else str(tuple(tensor.shape))
