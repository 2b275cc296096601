"""Signals: from the first import to the exit, in single runs and in sweeps with each launcher."""

import os
import signal
from pathlib import Path

import pytest
import torch

from framework.checkpoint import load, newest
from framework.tuning.stack import RowMeasures
from runs import logged
from sweeps import trials

TIMES = ("wall_seconds", "train/samples_per_second")
SMALL = "data=blobs model.width=8 model.depth=1 model.dropout=0.1 trainer.max_epochs=2 loader.batch_size=64"
SAVING = "callbacks.checkpoint.every=3steps callbacks.checkpoint.background=false loggers=[json_lines]"
PLUGIN = """\
import os
from pathlib import Path
from framework import Callback, callbacks

@callbacks.register("signalled")
class Signalled(Callback):
    changes_training = False

    def at(self, event, trainer):
        file = Path("signal")
        words = file.read_text().split() if file.exists() else []
        if words[:2] == [event, str(trainer.state.step)]:
            file.unlink()
            for number in words[2:]:
                os.kill(os.getpid(), int(number))

    def on_fit_start(self, trainer):
        self.at("fit_start", trainer)

    def on_step_end(self, trainer):
        self.at("step_end", trainer)
"""


@pytest.fixture
def command(command, tmp_path, forget_plugins):
    """Run a command beside the plugin."""
    (tmp_path / "signalled.py").write_text(PLUGIN)
    return command


def send(event, step, *numbers):
    """Have the next process that comes to an event of a step get signals there."""
    Path("signal").write_text(" ".join([event, str(step), *(str(int(number)) for number in numbers)]))


