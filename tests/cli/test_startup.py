"""What a command waits for: nothing is imported that it does not use, torch's compiler least of all."""

import os
import subprocess
import sys
from pathlib import Path

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
    command = [sys.executable, "-m", "framework", "train", "--plugins", "first_step.py", *line.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("line", "unused"),
    [
        ("+callbacks=first_step", {"rich", "sympy"}),
        ("callbacks=[first_step] loggers=[json_lines] data=blobs optimizer=sgd", {"rich", "sympy", "tensorboard"}),
    ],
)
def test_a_run_imports_nothing_that_it_does_not_use(line, unused, tmp_path):
    modules = imported(line, tmp_path)
    assert {"torch", "framework.training.trainer"} <= modules
    assert not modules & (unused | {"torch._dynamo", "torch._inductor", "sklearn", "scipy", "PIL", "pandas", "pyarrow"})


def python(text, folder):
    """Run a program of its own, as what is imported cannot be taken back."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    subprocess.run([sys.executable, "-c", text], cwd=folder, env=environment, check=True)


MARKS = """
import sys, torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.flop_counter import FlopCounterMode
import framework as fw
from framework.contracts.optimizer import build_optimizer

COMPILER = "torch._dynamo"
fw.discover()

def marks():
    classes = (SGD, Adam, AdamW, Optimizer)
    found = {(cls, name): method for cls in classes for name, method in vars(cls).items() if callable(method)}
    return {where: method for where, method in found.items() if where[1] != "step"}

def train(name, steps=3, **settings):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = build_optimizer(fw.optimizers.maker(name, **settings), model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    return optimizer, torch.cat([p.detach().flatten() for p in model.parameters()])

def step_of(cls):
    step = cls.step.__wrapped__ if getattr(cls.step, "hooked", False) else cls.step
    return step.__code__.co_name

before, recipes = marks(), [("adamw", {}), ("sgd", {"momentum": 0.9}), ("rmsprop", {}), ("lion", {}), ("muon", {})]
assert COMPILER not in sys.modules and ("Optimizer", "zero_grad") in {(c.__name__, n) for c, n in before}
"""


def test_an_optimizer_does_the_same_without_the_compiler(tmp_path):
    python(
        MARKS
        + """
without = [train(name, **settings)[1] for name, settings in recipes]
assert COMPILER not in sys.modules
import torch._dynamo
with_it = [train(name, **settings)[1] for name, settings in recipes]
assert all(map(torch.equal, without, with_it))
""",
        tmp_path,
    )


def test_once_the_compiler_is_imported_all_is_as_torch_made_it(tmp_path):
    python(
        MARKS
        + """
optimizer, _ = train("adamw")
seen = []
optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
optimizer.register_step_post_hook(lambda *_: seen.append("after"))
optimizer.step()
assert marks() != before and seen == ["before", "after"]
assert {step_of(cls) for cls in (SGD, Adam, AdamW)} == {"with_grad"}

import torch._dynamo
assert marks() == before and {step_of(cls) for cls in (SGD, Adam, AdamW)} == {"_use_grad"}
train("sgd")
assert marks() == before, "nothing is changed any more"
compiled = torch.compile(optimizer.step, backend="eager")
seen.clear()
optimizer.zero_grad()
compiled()
optimizer.step()
assert seen == ["before", "after"] * 2, "torch's hooks are called once a step, as before"
""",
        tmp_path,
    )


def test_flops_are_counted_without_the_compiler(tmp_path):
    python(
        MARKS
        + """
train("sgd", steps=0)
with FlopCounterMode(display=False) as counter:
    torch.nn.Linear(4, 4)(torch.randn(8, 4))
assert counter.get_total_flops() == 2 * 8 * 4 * 4 and COMPILER not in sys.modules
import torch._dynamo
with FlopCounterMode(display=False) as counter:
    torch.nn.Linear(4, 4)(torch.randn(8, 4))
assert counter.get_total_flops() == 2 * 8 * 4 * 4
""",
        tmp_path,
    )


def test_what_is_not_marked_as_torch_does_it_stays_as_it_is():
    from framework.contracts.optimizer import unmarked

    assert unmarked(Path.exists) is None
    assert unmarked(len) is None
    assert unmarked(3) is None


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
    done = subprocess.run([sys.executable, "-c", CYCLE], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "finalized\n"
