"""A trial that changes global state and fails does not affect the next trial."""

import logging
import os
import random
import shlex
import sys
import warnings
from pathlib import Path

import numpy
import pytest
import rich.style  # noqa: F401  # its import draws a random number
import torch

from framework.cli.main import main
from framework.tuning.sweep.isolation import GLOBAL_STATE, isolated
from sweeps import rows

PLUGIN = """\
import logging, os, random, sys, warnings
import numpy, torch
from framework import Callback, callbacks

def pollute():
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
    logging.getLogger("framework.polluted").setLevel(logging.ERROR)
    logging.getLogger("framework.polluted").propagate = False
    os.environ["POLLUTED"] = "1"
    sys.path.insert(0, "/polluted")

@callbacks.register("polluter")
class Polluter(Callback):
    def on_step_end(self, trainer):
        if trainer.seed == 1 and trainer.state.step == 2:
            pollute()
            raise ValueError("polluted")
"""


def global_state():
    """Return all state that the plugin changes."""
    root = logging.getLogger()
    polluted = logging.getLogger("framework.polluted")
    return {
        "globals": [get() for get, _ in GLOBAL_STATE],
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
            polluted.level,
            polluted.propagate,
        ),
        "process": (dict(os.environ), os.getcwd(), list(sys.path)),
    }


def test_global_state_is_restored_after_a_trial():
    namespace = {}
    before = global_state()
    exec(PLUGIN.partition("@callbacks")[0], namespace)
    with pytest.raises(ValueError, match="polluted"), isolated():
        namespace["pollute"]()
        os.chdir("/")
        during = global_state()
        raise ValueError("polluted")
    unchanged = [name for name in before if during[name] == before[name]]
    assert not unchanged
    assert global_state() == before


def test_a_logger_that_a_trial_created_is_reset():
    with isolated():
        logging.getLogger("framework.new").addHandler(logging.StreamHandler())
        logging.getLogger("framework.new").setLevel(logging.ERROR)
    assert logging.getLogger("framework.new").handlers == []
    assert logging.getLogger("framework.new").isEnabledFor(logging.WARNING)


def test_trials_after_a_polluting_one_give_their_results_when_alone(
    tmp_path, monkeypatch, capsys, forget_plugins
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "polluter.py").write_text(PLUGIN)
    line = "train --plugins polluter.py callbacks=[polluter,checkpoint] data=blobs model.width=8"
    line += " model.dropout=0.2 trainer.max_steps=4 loggers=[json_lines]"
    before = global_state()
    for trials in ("seed=0,1,2 sweep.name=together", "'seed=range(2,3)' sweep.name=alone"):
        with pytest.raises(SystemExit):
            main(shlex.split(f"{line} -m {trials}"))
    assert global_state() == before
    together = rows("together")
    ended = [row for row in together if row["state"] != "running"]
    assert [row["state"] for row in ended] == ["done", "failed", "done"]
    assert "ValueError: polluted (polluter.py:" in ended[1]["error"]
    assert without_times(ended[2]) == without_times(rows("alone")[-1])
    weights = "checkpoints/best/model.safetensors"
    after_polluter = Path("runs/default/together/002_seed-2", weights)
    alone = Path("runs/default/alone/000_seed-2", weights)
    assert after_polluter.read_bytes() == alone.read_bytes()


def without_times(row):
    return {name: value for name, value in row["metrics"].items() if "per_second" not in name}
