"""What a command waits for: nothing is imported that it does not use, torch's compiler least of all."""

import os
import subprocess
import sys

import pytest

FIRST_STEP = '''
import os, sys
from framework import Callback, callbacks

@callbacks.register("first_step")
class FirstStep(Callback):
    """Says what is imported when the first step is done, and ends the process."""

    def on_step_end(self, trainer):
        print(*sys.modules, flush=True)
        os._exit(0)
'''


def imported(line, folder):
    """Return the modules that are imported when the first step of `framework train LINE` is done."""
    (folder / "first_step.py").write_text(FIRST_STEP)
    command = [
        sys.executable,
        "-m",
        "framework",
        "train",
        "--plugins",
        "first_step.py",
        *line.split(),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("line", "unused"),
    [
        ("+callbacks=first_step", {"rich", "sympy"}),
        (
            "callbacks=[first_step] loggers=[json_lines] data=blobs optimizer=sgd",
            {"rich", "sympy", "tensorboard"},
        ),
    ],
)
def test_a_run_imports_nothing_that_it_does_not_use(line, unused, tmp_path):
    modules = imported(line, tmp_path)
    assert {"torch", "framework.training.trainer"} <= modules
    assert not modules & (
        unused
        | {"torch._dynamo", "torch._inductor", "sklearn", "scipy", "PIL", "pandas", "pyarrow"}
    )


CYCLE = """
import sys
from framework.cli.parsers import importing_torch

class Cycle:
    def __init__(self):
        self.itself = self

    def __del__(self):
        print("finalized")

assert "torch" not in sys.modules
with importing_torch():
    pass
Cycle()
"""


def test_at_exit_objects_in_cycles_are_finalized(tmp_path):
    """Libraries such as nanobind report as leaks what the last garbage collection has not found."""
    done = subprocess.run(
        [sys.executable, "-c", CYCLE], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "finalized\n"
