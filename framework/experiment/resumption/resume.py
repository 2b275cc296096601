"""Resume a run exactly: compare the settings, read the checkpoint, check that it fits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from framework.composition.spec import Spec
from framework.errors import RunError, short
from framework.errors.paths import override
from framework.experiment.run_facts import unknown_content
from framework.experiment.weights import is_useful, shapes
from framework.runs import checkpoint
from framework.runs.folder import RunFolder, read_config
from framework.runs.run_state import read_status, status_of
from framework.training.optimizer_state import (
    check_state,
    group_settings,
    merged_groups,
    older_settings,
)

from .config_changes import compare_configs, is_path_of_data, keeps_bits, observed_changes
from .find_run import MOST_NOTES, named_checkpoint

MOST_THREADS = 1024
INEXACT_ADVICE = "undo the change, or allow it with --inexact"


@dataclass
class Resumed:
    """A run that is resumed.

    Attributes:
        folder: of the run, locked.
        config: of the run until now.
        changed: the text of each setting that differs from now on, by path.
        data_moved: whether the data has another path than before.
        notes: texts for the user.
        step: of the checkpoint; 0 without one.
        training: the state in the newest good checkpoint; None if the run was stopped before one.
        threads: for an operation, as before; None if unknown.
        chosen: the checkpoint that the user named, if any.
        inexact_changes: the texts of the changed settings that change the weights.
    """

    folder: RunFolder
    config: dict[str, Any]
    changed: dict[str, str]
    data_moved: bool
    notes: list[str] = field(default_factory=list)
    step: int = 0
    training: dict[str, Any] | None = None
    threads: int | None = None
    chosen: Path | None = None
    inexact_changes: list[str] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do, test included, and no setting has changed."""
        return status_of(self.folder.path) == "done" and not self.changed and self.chosen is None

    def rewind(self) -> None:
        """Make the chosen checkpoint the newest one, so that it is resumed again after a kill."""
        if self.chosen is None:
            return
        reason = f"continues from step {self.step}"
        status = {"status": "stopped", "reason": reason, "step": self.step}
        before = read_status(self.folder.path)
        if "time" in before:
            status["time"] = before["time"]
        self.folder.write("status.json", status)
        checkpoint.set_aside(self.folder.path / "checkpoints", self.chosen)


def open_folder(run: Path, spec: Spec, writes: bool = True) -> Resumed:
    """Lock the folder of a run and read its newest good checkpoint, or the one that the user named.

    Args:
        run: the folder.
        spec: the new experiment.
        writes: whether this process writes to the folder, and locks it.

    Raises:
        RunError: another process writes to the folder.
    """
    folder = RunFolder.existing(run, writes)
    config = read_config(run)
    changed = compare_configs(config, spec.tree)
    data_moved = any(is_path_of_data(path, spec) for path in changed)
    relevant = {
        path: text for path, text in changed.items() if not path.startswith(("run.", "plugins"))
    }
    resumed = Resumed(folder, config, relevant, data_moved)
    resumed.notes += [f"from here on {text}" for text in relevant.values()]
    resumed.inexact_changes = list(weight_changes(run, changed, config, spec))
    checkpoints = run / "checkpoints"
    checkpoint.refuse_links(checkpoints)
    if checkpoints.is_dir():
        if writes:
            checkpoint.clean(checkpoints)
        read_checkpoint(resumed, checkpoints, spec)
    return resumed


def weight_changes(
    run: Path, changed: Mapping[str, str], before: Mapping[str, Any], spec: Spec
) -> Iterator[str]:
    """Yield the changed settings that change the weights of a resumed run.

    Args:
        changed: the text of each change, by path.
        before: the earlier config.
        spec: the new config.
    """
    for path, text in changed.items():
        if is_path_of_data(path, spec):
            # The content of the data is compared after it is read, if that is possible.
            problem = unknown_content(run)
            if problem is not None:
                yield f"{text} ({problem})"
        elif not keeps_bits(path):
            yield text
    yield from observed_changes(changed, before, spec)


def read_checkpoint(resumed: Resumed, checkpoints: Path, spec: Spec) -> None:
    """Read the checkpoint that the user named, or the newest good one if there is one."""
    newest = None if spec.resume == "auto" else named_checkpoint(spec.resume)
    if newest is not None:
        resumed.chosen = newest
        resumed.notes += later_notes(checkpoints, checkpoint.step_in(newest))
    else:
        newest, skipped = checkpoint.newest(checkpoints)
        resumed.notes += [f"skipped {reason}" for reason in skipped[:MOST_NOTES]]
        if len(skipped) > MOST_NOTES:
            resumed.notes.append(f"skipped {len(skipped) - MOST_NOTES} more checkpoints")
    if newest is None:
        return
    weights, training = checkpoint.load(newest)
    resumed.training = training | {"model": weights}
    resumed.step = checkpoint.step_in(newest)
    manifest = checkpoint.read_manifest(newest)
    resumed.threads = threads_in(manifest)
    if manifest.get("torch") != torch.__version__:
        resumed.notes.append(
            f"torch is {torch.__version__}, was {short(manifest.get('torch'))}: "
            "results may differ in the last bits"
        )


def later_notes(checkpoints: Path, step: int) -> Iterator[str]:
    """Yield a note on the checkpoints after the one that a run is resumed from."""
    saved = checkpoint.listed(checkpoints)
    later = [path.name for path in saved if checkpoint.step_of(path) > step]
    if later:
        yield (
            f"set aside in {checkpoints}: {', '.join(later)} "
            "(renamed to *.aside; delete them if you do not need them)"
        )


def threads_in(manifest: Mapping[str, Any]) -> int | None:
    """Return the number of threads in the manifest of a checkpoint; None without a valid one."""
    run = manifest.get("run")
    threads = run.get("threads") if isinstance(run, dict) else None
    return threads if type(threads) is int and 1 <= threads <= MOST_THREADS else None


def check_fits(resumed: Resumed, model: nn.Module, optimizer: Optimizer) -> None:
    """Raise RunError if the checkpoint is of another model or optimizer, even with --inexact."""
    if resumed.training is None:
        return
    check_form(resumed.training)
    saved = shapes(resumed.training["model"])
    own = shapes(model.state_dict())
    difference = model_difference(saved, own)
    if difference is None:
        same_groups = group_sizes(resumed.training["optimizer"]) == group_sizes(
            optimizer.state_dict()
        )
        if not same_groups or "optimizer.name" in resumed.changed:
            difference = "another optimizer, or other groups of parameters, whose state differs"
    if difference is not None:
        run = resumed.folder.path
        raise RunError(f"{run} cannot be resumed with {difference}; {new_run(run, saved, own)}")


def check_exact(resumed: Resumed) -> None:
    """Raise RunError if a changed setting changes the weights of the resumed run."""
    if resumed.inexact_changes:
        raise RunError(
            f"{resumed.folder.path} cannot be resumed exactly with "
            f"{'; '.join(resumed.inexact_changes)}: {INEXACT_ADVICE}"
        )


def new_run(
    run: Path, saved: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]
) -> str:
    """Return the advice to start a new run, with the weights of `run` if they fit its model.

    Args:
        saved: the shapes of the tensors in the checkpoint of the run.
        own: the shapes of those of the model.
    """
    fitting = [name for name, shape in own.items() if saved.get(name) == shape]
    if not is_useful(fitting, {name: len(shape) for name, shape in own.items()}):
        return "start a new run with `framework train`"
    weights = override("init_from", str(run))
    return f"start a new run with `framework train {weights}`, which loads the weights that fit"


def model_difference(
    saved: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Return the first difference in the shapes of two models; None if they are equal."""
    for name in {**saved, **own}:
        if name not in own:
            return f"another model: it has no {name}, which is in the checkpoint"
        if name not in saved:
            return f"another model: its {name} is not in the checkpoint"
        if saved[name] != own[name]:
            return (
                f"another model: {name} has shape {saved[name]} in the checkpoint "
                f"and {own[name]} in the config"
            )
    return None


def group_sizes(optimizer: Mapping[str, Any]) -> list[int]:
    """Return the number of parameters in each group of an optimizer's state."""
    return [len(group["params"]) for group in optimizer["param_groups"]]


def check_form(training: Mapping[str, Any]) -> None:
    """Raise RunError if a training state has no groups of an optimizer."""
    state = training.get("optimizer")
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise RunError("its newest checkpoint is damaged: it has no state of an optimizer")
    if not all(isinstance(group.get("params"), list) for group in groups):
        raise RunError(
            "its newest checkpoint is damaged: its optimizer has groups without parameters"
        )


def check_optimizer(resumed: Resumed, model: nn.Module, optimizer: Optimizer) -> None:
    """Raise SettingError if the optimizer cannot continue with the changed settings.

    A checkpoint of an earlier version does not have the settings with which the run began: they are
    derived from the changes in the config.
    """
    training = resumed.training
    if training is None:
        return
    groups = training["optimizer"]["param_groups"]
    now = group_settings(optimizer, model)
    if "optimizer_settings" not in training:
        changed = changed_group_settings(resumed)
        before = older_settings(groups, now)
        for group in before:
            for name in changed & group["settings"].keys():
                del group["settings"][name]
        training["optimizer_settings"] = before
    merged, names = merged_groups(groups, training["optimizer_settings"], now)
    if names:
        check_state(optimizer, training["optimizer"]["state"], merged, names)


def changed_group_settings(resumed: Resumed) -> set[str]:
    """Return the settings of parameter groups that the changes in the config may affect."""
    settings: set[str] = set()
    for path in resumed.changed:
        section, _, setting = path.partition(".")
        if section == "optimizer":
            settings.add(setting.partition(".")[0])
        if section == "parameters":
            settings |= {"weight_decay", "name"}
    return settings - {"lr"}
