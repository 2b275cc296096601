"""Compose, interrupt and read runs, for tests that compare runs."""

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
    """Return the rows of metrics.jsonl without the measurements of time."""
    rows = []
    for line in (Path(run) / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key in TIMES:
            row.pop(key, None)
        rows.append(row)
    return rows


def composed(overrides, plugins=()):
    """Return the spec of a command line."""
    specs = []
    compose(CommandLine(list(overrides), list(plugins)), lambda job: specs.append(job.spec))
    return specs[0]


class Stop(fw.Callback):
    """Ends the training at a step like a kill: nothing is closed or saved."""

    def __init__(self, step):
        self.step = step

    def on_step_done(self, trainer):
        if trainer.state.step == self.step:
            raise KeyboardInterrupt


@contextmanager
def cut_off_at(step, monkeypatch):
    """Interrupt the training of experiments in this context at a step."""
    make_trainer = Experiment.trainer

    def stopped(experiment):
        trainer = make_trainer(experiment)
        trainer.callbacks.append(Stop(step))
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "trainer", stopped)
        with pytest.raises(KeyboardInterrupt):
            yield


def run_line(line, task):
    """Compose a command line, and run a task on its job or on the jobs of its sweep."""
    (sweep if line.multirun else compose)(line, task)
