"""Load weights into a model: from the checkpoints of a run, or from a file (`init_from`)."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from framework.errors import CheckpointError, RunError, did_you_mean
from framework.errors.paths import expanded
from framework.errors.user_code import text_of
from framework.runs import checkpoint
from framework.runs.folder import resolve_run
from framework.runs.run_files import RunFiles
from framework.runtime.dtensors import load_model_state


def load_weights(model: nn.Module, run: Path, which: str = "best") -> Path | None:
    """Load the weights of a checkpoint of a run, and return that checkpoint; None without one.

    Args:
        which: as for `find_checkpoint`.
    """
    found = find_checkpoint(run, which)
    if found is not None:
        load_into(model, found, run)
    return found


def find_checkpoint(run: Path, which: str = "best") -> Path | None:
    """Return a checkpoint of a run; None without a good one.

    Args:
        which: "best" (or the newest good one if there is no best), "last", the name of a checkpoint
            of this run, or the folder of a checkpoint.
    """
    folder = run / "checkpoints"
    if which not in ("best", "last"):
        named = folder / which
        if named.is_dir():
            return named
        path = expanded(which)
        if not os.path.lexists(path):
            saved = [each.name for each in checkpoint.listed(folder)] if folder.is_dir() else []
            suggestion = did_you_mean(which, ["best", "last", *saved])
            raise RunError(f"there is no checkpoint {which} of {run}; {suggestion}")
        return resolve_run(path)
    checkpoint.refuse_links(folder)
    best = folder / "best"
    if which == "best" and os.path.lexists(best) and checkpoint.target_of(best).is_dir():
        return best
    return checkpoint.newest(folder)[0] if folder.is_dir() else None


def no_checkpoint(run: Path) -> RunError:
    """Return the error of a run for which `find_checkpoint` finds no checkpoint."""
    folder = run / "checkpoints"
    skipped = checkpoint.newest(folder)[1] if folder.is_dir() else []
    if skipped:
        return RunError(f"{run} has no undamaged checkpoint: {skipped[0]}")
    files = RunFiles(run)
    if files.state in ("running", "paused"):
        return RunError(f"{run} has no checkpoint yet: it is {files.state}")
    if "callbacks.checkpoint" in files.settings and files.state != "done":
        return RunError(f"{run} has no checkpoint: it ended before the first one was saved")
    return RunError(f"{run} has no checkpoint: was it trained with callbacks.checkpoint?")


def load_into(model: nn.Module, saved: Path, run: Path) -> None:
    """Load the weights of a checkpoint.

    Raises:
        RunError: they do not fit the model.
    """
    weights = checkpoint.load_model(saved)
    try:
        load_model_state(model, weights)
    except RuntimeError as error:
        raise RunError(f"{saved} does not fit the model of {run}: {text_of(error)}") from error


def initialize_from(model: nn.Module, source: str) -> str:
    """Load the weights whose names and shapes match, and return a report of the others.

    Args:
        source: a run (its best checkpoint), a checkpoint or a .safetensors file.

    Raises:
        RunError: the source cannot be read, or nothing matches, or no weight matrix matches: biases
            and norms are useless without the matrices.
    """
    weights = read_weights(expanded(source))
    state = model.state_dict()
    own = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    fitting = {
        name: tensor
        for name, tensor in weights.items()
        if name in own and own[name].shape == tensor.shape
    }
    check_fitting(fitting, own, weights, source)
    model.load_state_dict(fitting, strict=False)
    return initialization_report(fitting, own, weights, source)


def check_fitting(
    fitting: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    source: str,
) -> None:
    """Raise RunError if none of the weights fits, or no weight matrix does.

    Args:
        fitting: the weights that fit.
        own: the tensors of the model.
        weights: all weights of the source.
    """
    if not fitting:
        raise RunError(
            f"init_from={source}: none of its {len(weights)} tensors has the name and shape of a "
            "tensor of the model"
        )
    axes = {name: tensor.ndim for name, tensor in own.items()}
    if not is_useful(fitting, axes):
        matrices = matrices_of(axes)
        first = matrices[0]
        raise RunError(
            f"init_from={source}: only {len(fitting)} of {len(own)} tensors match, and none of the "
            f"{len(matrices)} weight matrices: {first} is {shape_text(own[first])} in the "
            f"model, the source has {shape_text(weights.get(first))}"
        )


def is_useful(fitting: Collection[str], axes: Mapping[str, int]) -> bool:
    """Return whether weights fit, and among them a weight matrix if the model has one.

    Args:
        fitting: the names of the tensors that fit.
        axes: the number of axes of each tensor of the model.
    """
    matrices = matrices_of(axes)
    return bool(fitting) and (not matrices or not set(matrices).isdisjoint(fitting))


def matrices_of(axes: Mapping[str, int]) -> list[str]:
    """Return the names of the tensors that are weight matrices or kernels."""
    return [name for name, count in axes.items() if count > 1]


def initialization_report(
    fitting: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    source: str,
) -> str:
    """Return the number of loaded tensors, and the names of those that were not loaded.

    Args: as for `check_fitting`.
    """
    other_shapes = [
        f"{name} {shape_text(weights[name])} for {shape_text(own[name])}"
        for name in weights
        if name in own and name not in fitting
    ]
    others = {
        "of another shape": other_shapes,
        "left as initialized": sorted(own.keys() - weights.keys()),
        "not used": sorted(weights.keys() - own.keys()),
    }
    count = f"{len(fitting)} of {len(own)} tensors from {source}"
    loaded = sum(tensor.numel() for tensor in fitting.values())
    share = loaded / max(sum(tensor.numel() for tensor in own.values()), 1)
    if share < 0.5:
        count = f"only {count}, {share:.1%} of the model's numbers"
    lists = [f"{label}: {', '.join(names)}" for label, names in others.items() if names]
    return "; ".join([count, *lists])


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a run (its best checkpoint), a checkpoint or a .safetensors file.

    Raises:
        RunError: they cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            if not path.is_file():
                raise RunError(f"init_from={path}: no such file")
            checkpoint.check_memory(path, path.stat().st_size)
            return load_file(path)
        if not os.path.lexists(path):
            raise RunError(f"init_from={path}: there is no such run, checkpoint or file")
        path = resolve_run(path)
        if (path / "checkpoints").is_dir():
            found = find_checkpoint(path)
            if found is None:
                raise RunError(f"init_from={path}: {no_checkpoint(path)}")
            path = found
        return checkpoint.load_model(path)
    except (OSError, SafetensorError, CheckpointError) as error:
        raise RunError(
            f"init_from={path}: expected a run, a checkpoint or a .safetensors file: {error}"
        ) from error


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def shape_text(tensor: Tensor | None) -> str:
    """Return the shape of a tensor for a message."""
    return "no such tensor" if tensor is None else str(tuple(tensor.shape))
