"""A part that calls `sys.exit` is an error of the command."""

import sys

import pytest

import framework as fw
from framework.errors import BuildError
from framework.errors.exits import no_exit

PARTS = """
import os, sys
import torch
from framework import Callback, activations, callbacks, datasets
from framework.data.dataset import Data, TensorSplit

@activations.register("leaving")
class Leaving(torch.nn.Module):
    def __init__(self):
        sys.exit(0)

@callbacks.register("leaving")
class LeavingCallback(Callback):
    changes_training = alone = False
    def __init__(self, at: int = 1, only: int = -1):
        self.at, self.only = at, only
    def on_step_end(self, trainer):
        if trainer.state.step == self.at and self.only in (-1, trainer.seed):
            sys.exit(0)

class Leave:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        if index == 3:
            sys.exit(0)
        return torch.ones(2), torch.tensor(0)

@datasets.register("leaving")
class LeavingData(Data):
    def __init__(self):
        self.train, self.in_shape, self.out_shape, self.target = Leave(), (2,), (2,), "class"
        self.classes = ["a", "b"]
"""
SMALL = "trainer.max_steps=2 loader.limit=2 model.width=4 model.depth=1 loggers=[json_lines]"


@pytest.fixture
def parts(tmp_path, forget_plugins):
    (tmp_path / "parts.py").write_text(PARTS)


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        ("sys.exit(0)", "list"),
        ("sys.exit()", "train"),
        ("raise SystemExit", "eval runs/none"),
        ("exit(0)", "plan"),
        ("raise Odd", "check"),
    ],
)
def test_a_plugin_that_ends_the_program_is_an_error(
    command, tmp_path, raised, line, forget_plugins
):
    (tmp_path / "quits.py").write_text(f"import sys\nclass Odd(BaseException): ...\n{raised}\n")
    status, out, err = command(f"{line} --plugins quits.py")
    assert (status, out) == (2, "")
    assert "quits.py:3" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("chosen", "place"),
    [
        ("model.activation=leaving", "parts.py:10"),
        ("+callbacks=leaving", "parts.py:19"),
        ("data=leaving metrics=[]", "parts.py:26"),
    ],
)
def test_a_part_that_ends_the_program_is_an_error(command, parts, chosen, place):
    status, _, err = command(f"train --plugins parts.py {chosen} {SMALL}")
    assert status == 2
    assert place in err.splitlines()[-1]


@pytest.mark.parametrize("launcher", ["one_by_one", "vectorized hydra.launcher.processes=1"])
def test_a_trial_that_ends_the_program_fails_and_the_others_continue(command, parts, launcher):
    line = f"train --plugins parts.py -m +callbacks=leaving callbacks.leaving.only=1 {SMALL}"
    status, out, err = command(f"{line} seed=0,1,2 hydra/launcher={launcher}")
    assert status == 2, err
    assert "trials   3: 2 done, 1 failed" in out
    assert "1 of 3 trials failed" in err
    assert "parts.py:19" in out


def test_a_part_built_in_python_may_not_end_the_program():
    def leaving():
        sys.exit(3)

    fw.schedulers.register("leaving", lambda total_steps: leaving())
    try:
        with pytest.raises(BuildError, match=r"sys.exit\(3\) is called at .*test_exits.py:\d+"):
            fw.schedulers.build("leaving", 10)
    finally:
        del fw.schedulers._entries["leaving"]


def test_the_framework_itself_may_end_the_program(command):
    status, out, _ = command("train --help")
    assert (status, out[:5]) == (0, "usage")
    with pytest.raises(SystemExit), no_exit():
        fw.cli.main.main(["--version"])
