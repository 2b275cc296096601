"""Training without the import of torch's compiler, and torch as it was once it is imported."""

import os
import subprocess
import sys
from pathlib import Path

from framework.runtime.torch_internals.lazy_compiler import undecorated


def python(text, folder):
    """Run a program of its own, as what is imported cannot be taken back."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }
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
    assert undecorated(Path.exists) is None
    assert undecorated(len) is None
    assert undecorated(3) is None


def test_a_switch_leaves_torch_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("FRAMEWORK_LAZY_COMPILER", "off")
    python(
        MARKS
        + """
train("adamw")
assert COMPILER in sys.modules and marks() == before
assert {step_of(cls) for cls in (SGD, Adam, AdamW)} == {"_use_grad"}
""",
        tmp_path,
    )
