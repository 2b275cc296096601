"""Compose, interrupt and read runs, for tests that compare runs."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

import framework as fw
from framework.composition.compose import CommandLine, run_composed as compose
from framework.errors import DataError
from framework.experiment.experiment import Experiment, train
from framework.tuning.sweep.sweep import sweep
from framework_plugins.datasets.readers.fetched import data_folder

TIMES = ("wall_seconds", "train/samples_per_second", "train/seconds_per_epoch")
TIMES += ("speed/data_wait", "speed/memory_gib", "speed/tokens_per_second", "speed/mfu")
TIMES += ("train/communication", "train/waiting", "train/slowest_process")  # several processes


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


def run_training(*overrides):
    """Train the experiment of a command line in this process; return the result."""
    jobs = []
    compose(CommandLine(["loggers=json_lines", *overrides]), jobs.append)
    return train(jobs[0].spec, jobs[0].experiment, jobs[0].overrides, say=lambda line: None)


def require_data(name):
    """Return the folder of fetched data; skip the test without the data."""
    try:
        return data_folder(name, "", "")
    except DataError as error:
        pytest.skip(str(error))


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

    def stopped(*args):
        trainer = make_trainer(*args)
        trainer.callbacks.append(Stop(step))
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(Experiment, "trainer", stopped)
        with pytest.raises(KeyboardInterrupt):
            yield


def run_line(line, task):
    """Compose a command line, and run a task on its job or on the jobs of its sweep."""
    (sweep if line.multirun else compose)(line, task)
