"""Composes runs, cuts them off and reads what they left, for the tests that compare runs."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

import framework as fw
from framework.composition.compose import CommandLine, run_composed as compose
from framework.experiment.experiment import Experiment
from framework.tuning.sweep.sweep import sweep

TIMES = ("wall_seconds", "train/samples_per_second", "train/seconds_per_epoch")


def logged(run):
    """The lines of metrics.jsonl, but for what tells of time."""
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def composed(overrides, plugins=()):
    """The spec of a command line."""
    specs = []
    compose(CommandLine(list(overrides), list(plugins)), lambda job: specs.append(job.spec))
    return specs[0]


class Stop(fw.Callback):
    """Ends the process of training at a step, as a kill would: nothing is closed, nothing more is saved."""

    def __init__(self, step):
        self.step = step

    def on_step_done(self, trainer):
        if trainer.state.step == self.step:
            raise KeyboardInterrupt


@contextmanager
def cut_off_at(step, monkeypatch):
    """What trains an experiment here is cut off at a step."""
    whole = Experiment.trainer

    def stopped(experiment):
        trainer = whole(experiment)
        trainer.callbacks.append(Stop(step))
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "trainer", stopped)
        with pytest.raises(KeyboardInterrupt):
            yield


def run_line(line, task):
    """Compose a command line and run a task on its job, or on those of its sweep."""
    (sweep if line.multirun else compose)(line, task)
