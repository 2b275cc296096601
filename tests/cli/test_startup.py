"""A command imports only the modules that it uses, and never torch's compiler."""

import os
import subprocess
import sys

import pytest

FIRST_STEP = '''
import os, sys
from framework import Callback, callbacks

@callbacks.register("first_step")
class FirstStep(Callback):
    """Print the imported modules after the first step, and end the process."""

    def on_step_end(self, trainer):
        print(*sys.modules, flush=True)
        os._exit(0)
'''


def imported(line, folder):
    """Return the modules that are imported after the first step of `framework train LINE`."""
    (folder / "first_step.py").write_text(FIRST_STEP)
    framework = [sys.executable, "-m", "framework"]
    command = [*framework, "train", "--plugins", "first_step.py", *line.split()]
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
def test_a_run_imports_no_module_that_it_does_not_use(line, unused, tmp_path):
    modules = imported(line, tmp_path)
    assert {"torch", "framework.training.trainer"} <= modules
    compiler = {"torch._dynamo", "torch._inductor"}
    libraries = {"sklearn", "scipy", "PIL", "pandas", "pyarrow"}
    assert not modules & (unused | compiler | libraries)


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
    """Otherwise libraries such as nanobind report them as leaks."""
    done = subprocess.run(
        [sys.executable, "-c", CYCLE], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "finalized\n"
