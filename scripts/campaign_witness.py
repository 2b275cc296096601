"""The plugin of sweeps that `campaign_signals.py` disturbs: it notes in a shared file where each trial is."""

import mmap
import os
import re
from pathlib import Path
from typing import Any

import framework as fw
from framework.runs.checkpoint import writing
from framework.training.trainer import Trainer

STATES = "campaign.states"  # the file, a byte for each trial
FORGET = (
    "CAMPAIGN_FORGET"  # the environment variable with which a resumed run loses a part of its state
)
BEGUN, STEPS, SAVING = 1, 2, 3
SIZE = 64


def note(folder: Path, state: int) -> None:
    """Note the state of the trial in whose folder a file or folder is."""
    found = re.search(r"/(\d{3})_", f"{folder}/")
    if found is None or not Path(STATES).exists():
        return
    with open(STATES, "r+b") as file, mmap.mmap(file.fileno(), SIZE) as memory:
        memory[int(found[1])] = state


@fw.callbacks.register("witness")
class Witness(fw.Callback):
    """Notes when a trial begins and makes steps."""

    changes_training = False

    def on_fit_start(self, trainer: Trainer) -> None:
        note(trainer.folder or Path(), BEGUN)

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.step % 5 == 1:
            note(trainer.folder or Path(), STEPS)


def note_saves() -> None:
    """Note while the files of a checkpoint are written and get their name."""
    write, publish = writing.write, writing.publish

    def folder_of(arguments: tuple[Any, ...]) -> Path:
        return next((each for each in arguments if isinstance(each, Path)), Path())

    def noted_write(*arguments: Any) -> Any:
        note(folder_of(arguments), SAVING)
        return write(*arguments)

    def noted_publish(*arguments: Any) -> Any:
        try:
            return publish(*arguments)
        finally:
            note(folder_of(arguments), STEPS)

    vars(writing).update(write=noted_write, publish=noted_publish)


def forget_state() -> None:
    """Let a resumed run lose its random state and what the optimizer keeps, where the environment says so."""
    restore = Trainer.load_state_dict

    def without_state(self: Trainer, saved: dict[str, Any]) -> None:
        if not os.environ.get(FORGET):
            return restore(self, saved)
        fresh = self.state_dict()
        optimizer = saved["optimizer"] | {"state": fresh["optimizer"]["state"]}
        restore(self, saved | {"random": fresh["random"], "optimizer": optimizer})

    setattr(Trainer, "load_state_dict", without_state)  # noqa: B010 (a method is not assigned to)


note_saves()
forget_state()
