"""A trial that changes all that a process shares, and fails: the next one feels nothing of it."""

import json
import logging
import os
import random
import shlex
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import rich.style  # noqa: F401  # it draws a number when it is imported
import torch

from framework.cli.main import main
from framework.tuning.sweep.isolation import GLOBALS, isolated

NASTY = """\
import logging, os, random, sys, warnings
import numpy, torch
from framework import Callback, callbacks

def spoil():
    random.seed(9), numpy.random.seed(9), torch.manual_seed(9)
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.autograd.set_detect_anomaly(True)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    warnings.simplefilter("error")
    logging.disable(logging.CRITICAL)
    logging.getLogger().setLevel(logging.DEBUG)
    logging.getLogger().addHandler(logging.StreamHandler())
    logging.getLogger("framework.spoilt").setLevel(logging.ERROR)
    logging.getLogger("framework.spoilt").propagate = False
    os.environ["SPOILT"] = "1"
    sys.path.insert(0, "/spoilt")

@callbacks.register("nasty")
class Nasty(Callback):
    def on_step_end(self, trainer):
        if trainer.seed == 1 and trainer.state.step == 2:
            spoil()
            raise ValueError("spoilt")
"""


def shared():
    """All that the nasty trial changes."""
    root, spoilt = logging.getLogger(), logging.getLogger("framework.spoilt")
    return {
        "globals": [read() for read, _ in GLOBALS],
        "generators": (
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
        ),
        "cudnn": torch.backends.cudnn.benchmark,
        "warnings": list(warnings.filters),
        "loggers": (
            root.level,
            list(root.handlers),
            root.manager.disable,
            spoilt.level,
            spoilt.propagate,
        ),
        "process": (dict(os.environ), os.getcwd(), list(sys.path)),
    }


def test_all_that_a_trial_changed_is_taken_back():
    space, before = {}, shared()
    exec(NASTY.partition("@callbacks")[0], space)
    with pytest.raises(ValueError, match="spoilt"), isolated():
        space["spoil"]()
        os.chdir("/")
        during = shared()
        raise ValueError("spoilt")
    assert not [name for name in before if during[name] == before[name]], "each of them was changed"
    assert shared() == before


def test_a_logger_that_a_trial_made_is_as_new():
    with isolated():
        logging.getLogger("framework.new").addHandler(logging.StreamHandler())
        logging.getLogger("framework.new").setLevel(logging.ERROR)
    assert logging.getLogger("framework.new").handlers == []
    assert logging.getLogger("framework.new").isEnabledFor(logging.WARNING)


def test_trials_around_a_nasty_one_are_as_if_alone(tmp_path, monkeypatch, capsys, forget_plugins):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nasty.py").write_text(NASTY)
    line = "train --plugins nasty.py callbacks=[nasty,checkpoint] data=blobs model.width=8 model.dropout=0.2"
    before = shared()
    for trials in ("seed=0,1,2 sweep.name=together", "'seed=range(2,3)' sweep.name=alone"):
        with pytest.raises(SystemExit):
            main(shlex.split(f"{line} trainer.max_steps=4 loggers=[json_lines] -m {trials}"))
    assert shared() == before
    rows = [
        json.loads(line)
        for line in Path("runs/default/together/sweep.jsonl").read_text().splitlines()
    ]
    assert [row["state"] for row in rows if row["state"] != "running"] == ["done", "failed", "done"]
    assert "ValueError: spoilt (nasty.py:" in rows[3]["error"]
    alone = json.loads(Path("runs/default/alone/sweep.jsonl").read_text().splitlines()[-1])
    measured = [
        {k: v for k, v in row["metrics"].items() if "per_second" not in k}
        for row in (rows[-1], alone)
    ]
    assert measured[0] == measured[1]
    weights = [
        Path(f"runs/default/{run}/checkpoints/best/model.safetensors").read_bytes()
        for run in ("together/002_seed-2", "alone/000_seed-2")
    ]
    assert weights[0] == weights[1]
