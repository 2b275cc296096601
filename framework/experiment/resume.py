"""Going on: with a run that was cut off (exactly), or from what another has learned (`init_from`)."""

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
from framework.runs import checkpoint
from framework.runs.folder import (
    RunFolder,
    read_config,
)
from framework.runs.status_file import status_of
from framework.training.optimizer_state import (
    check_state,
    group_settings,
    merged_groups,
    older_settings,
)

from .config_changes import changed_values, is_path_of_data, keeps_bits, observed_changes
from .find_run import MOST_NOTES, named_checkpoint
from .run_facts import unknown_content
from .weights import shapes

MOST_THREADS = 1024


@dataclass
class Resumed:
    """A run to go on with: its folder (locked), and its newest good checkpoint (None: it was cut off before one).

    data_moved: whether the data has another path than before.
    chosen: the checkpoint that the user named, if it is not to be the newest good one.
    """

    folder: RunFolder
    step: int = 0
    training: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    threads: int | None = None  # of an operation, when it was cut off
    config: dict[str, Any] = field(default_factory=dict)  # as it was until now
    chosen: Path | None = None
    data_moved: bool = False

    @property
    def done(self) -> bool:
        """Whether the run has nothing left to do, test included, and nothing new was asked of it."""
        return status_of(self.folder.path) == "done" and not self.changed and self.chosen is None

    def rewind(self) -> None:
        """Let the chosen checkpoint be the newest one, also for whoever resumes the run after a kill."""
        if self.chosen is None:
            return
        reason = f"goes on from step {self.step}"
        self.folder.write("status.json", {"status": "stopped", "reason": reason, "step": self.step})
        checkpoint.set_aside(self.folder.path / "checkpoints", self.chosen)

    def changes(self, path: str) -> bool:
        return path in self.changed


def open_folder(run: Path, spec: Spec, inexact: bool = False) -> Resumed:
    """Lock a run's folder and read its newest good checkpoint.

    Raises RunError when another process writes there, and when the spec differs from the run's own where its weights
    would come out otherwise (unless `inexact`).
    """
    folder = RunFolder.existing(run)
    before = read_config(run)
    changed = changed_values(before, spec.tree)
    breaking: list[str] = []
    data_moved = False
    for path, text in changed:
        if is_path_of_data(path, spec):
            data_moved = True
            breaking += unknown_content(
                run, text
            )  # if it is known, the data are compared when they are read
        elif not keeps_bits(path):
            breaking.append(text)
    breaking += list(observed_changes(changed, before, spec))
    if breaking and not inexact:
        advice = "leave it as it was, or allow it with --inexact"
        raise RunError(f"{run} cannot go on exactly with {'; '.join(breaking)}: {advice}")
    resumed = Resumed(folder)
    for path, text in changed:
        if not path.startswith(("run.", "plugins")):
            resumed.changed[path] = text
    resumed.config, resumed.data_moved = before, data_moved
    resumed.notes = [f"from here on {text}" for text in resumed.changed.values()]
    checkpoints = run / "checkpoints"
    checkpoint.refuse_links(checkpoints)
    if not checkpoints.is_dir():
        return resumed
    checkpoint.clean(checkpoints)
    newest = None if spec.resume == "auto" else named_checkpoint(spec.resume)
    if newest is not None:
        resumed.chosen = newest
        resumed.notes += later_notes(checkpoints, checkpoint.step_in(newest))
    else:
        newest, skipped = checkpoint.newest(checkpoints)
        resumed.notes += [f"skipped {why}" for why in skipped[:MOST_NOTES]]
        if len(skipped) > MOST_NOTES:
            resumed.notes.append(f"skipped {len(skipped) - MOST_NOTES} more checkpoints")
    if newest is not None:
        weights, resumed.training = checkpoint.load(newest)
        resumed.training["model"] = weights
        resumed.step = checkpoint.step_in(newest)
        manifest = checkpoint.read_manifest(newest)
        resumed.threads = threads_of(manifest)
        if manifest.get("torch") != torch.__version__:
            other = f"torch is {torch.__version__}, was {short(manifest.get('torch'))}"
            resumed.notes.append(f"{other}: the last bits may come out otherwise")
    return resumed


def later_notes(checkpoints: Path, step: int) -> Iterator[str]:
    """Yield what becomes of the checkpoints after the one that a run is resumed from."""
    later = [
        each.name for each in checkpoint.listed(checkpoints) if checkpoint.step_of(each) > step
    ]
    if later:
        yield f"set aside in {checkpoints}: {', '.join(later)} (now named *.aside; delete what you do not need)"


def threads_of(manifest: Mapping[str, Any]) -> int | None:
    """Return how many threads a checkpoint's run had, None if its manifest has no sensible number."""
    run = manifest.get("run")
    threads = run.get("threads") if isinstance(run, dict) else None
    return threads if type(threads) is int and 1 <= threads <= MOST_THREADS else None


def check_fits(resumed: Resumed, model: nn.Module, optimizer: Optimizer) -> None:
    """Raise RunError when its checkpoint is of another model or optimizer, which --inexact cannot mend."""
    if resumed.training is None:
        return
    check_form(resumed.training)
    saved, own = map(shapes, (resumed.training["model"], model.state_dict()))
    wrong = next((name for name in {**saved, **own} if saved.get(name) != own.get(name)), None)
    other = None
    if wrong is not None:
        other = f"another model: {wrong} has shape {saved.get(wrong)} in its checkpoint, and {own.get(wrong)} here"
    elif sizes(resumed.training["optimizer"]) != sizes(optimizer.state_dict()) or resumed.changes(
        "optimizer.name"
    ):
        other = "another optimizer, or other groups of parameters, of which something else is kept"
    if other is not None:
        run = resumed.folder.path
        weights = override("init_from", str(run))
        advice = f"A new run can begin with its weights: {weights}"
        raise RunError(f"{run} cannot go on with {other}. {advice}")


def check_form(training: Mapping[str, Any]) -> None:
    """Raise RunError when the training state of a checkpoint is of another form than what was saved."""
    state = training.get("optimizer")
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise RunError("its newest checkpoint is damaged: it holds no state of an optimizer")
    if not all(isinstance(group.get("params"), list) for group in groups):
        raise RunError(
            "its newest checkpoint is damaged: its optimizer has groups without parameters"
        )


def check_optimizer(resumed: Resumed, model: nn.Module, optimizer: Optimizer) -> None:
    """Raise SettingError when the optimizer cannot continue with the changed settings.

    A checkpoint of an earlier version does not hold the settings that the run was started with:
    they are derived from the changes in the config.
    """
    training = resumed.training
    if training is None:
        return
    groups, now = training["optimizer"]["param_groups"], group_settings(optimizer, model)
    if "optimizer_settings" not in training:
        changed = changed_settings(resumed)
        before = older_settings(groups, now)
        for each in before:
            for name in changed & each["settings"].keys():
                del each["settings"][name]
        training["optimizer_settings"] = before
    merged, names = merged_groups(groups, training["optimizer_settings"], now)
    if names:
        check_state(optimizer, training["optimizer"]["state"], merged, names)


def changed_settings(resumed: Resumed) -> set[str]:
    """Return the settings of parameter groups that the changes in the config may concern."""
    found: set[str] = set()
    for path in resumed.changed:
        section, _, setting = path.partition(".")
        if section == "optimizer":
            found.add(setting.partition(".")[0])
        if section == "parameters":
            found |= {"weight_decay", "name"}
    return found - {"lr"}


def sizes(optimizer: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in optimizer["param_groups"]]
