"""A plugin for the sweeps of `campaign_signals.py`: records the state of each trial in a file."""

import mmap
import os
import re
from pathlib import Path
from typing import Any

import framework as fw
from framework.runs.checkpoint import writing
from framework.training.trainer import Trainer

STATES = "campaign.states"  # the file, with one byte for each trial
FORGET = "CAMPAIGN_FORGET"  # environment variable: a resumed run loses a part of its state
BEGUN = 1
STEPS = 2
SAVING = 3
SIZE = 64


def note(folder: Path, state: int) -> None:
    """Record the state of the trial that a file or folder belongs to."""
    found = re.search(r"/(\d{3})_", f"{folder}/")
    if found is None or not Path(STATES).exists():
        return
    with open(STATES, "r+b") as file, mmap.mmap(file.fileno(), SIZE) as memory:
        memory[int(found[1])] = state


@fw.callbacks.register("witness")
class Witness(fw.Callback):
    """Record the start and the steps of a trial."""

    changes_training = False

    def on_fit_start(self, trainer: Trainer) -> None:
        note(trainer.folder or Path(), BEGUN)

    def on_step_end(self, trainer: Trainer) -> None:
        if trainer.state.step % 5 == 1:
            note(trainer.folder or Path(), STEPS)


def note_saves() -> None:
    """Record the time between the first file of a checkpoint and its final name."""
    write = writing.write
    publish = writing.publish

    def folder_of(arguments: tuple[Any, ...]) -> Path:
        return next((value for value in arguments if isinstance(value, Path)), Path())

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
    """Drop the random state and the optimizer's state of resumed runs if FORGET is set."""
    restore = Trainer.load_state_dict

    def without_state(self: Trainer, saved: dict[str, Any]) -> None:
        if os.environ.get(FORGET):
            fresh = self.state_dict()
            optimizer = saved["optimizer"] | {"state": fresh["optimizer"]["state"]}
            saved = saved | {"random": fresh["random"], "optimizer": optimizer}
        restore(self, saved)

    setattr(Trainer, "load_state_dict", without_state)  # noqa: B010 (a method is not assigned to)


note_saves()
forget_state()
