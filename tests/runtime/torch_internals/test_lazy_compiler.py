"""Training without torch's compiler, and unchanged methods of torch after its import."""

import os
import subprocess
import sys
from pathlib import Path

from framework.runtime.torch_internals.lazy_compiler import undecorated


def python(text, folder):
    """Run a program in a new process, since an import cannot be undone."""
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

COMPILER = "torch._dynamo"
fw.discover()

def marks():
    classes = (SGD, Adam, AdamW, Optimizer)
    found = {}
    for cls in classes:
        for name, method in vars(cls).items():
            if callable(method) and name != "step":
                found[cls, name] = method
    return found

def train(name, steps=3, **settings):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = fw.optimizers.maker(name, **settings)(model.parameters())
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

before = marks()
optimizers = [
    ("adamw", {}), ("sgd", {"momentum": 0.9}), ("rmsprop", {}), ("lion", {}), ("muon", {}),
]
assert COMPILER not in sys.modules
assert (Optimizer, "zero_grad") in before
"""


def test_an_optimizer_gives_the_same_weights_without_the_compiler(tmp_path):
    python(
        MARKS
        + """
without = [train(name, **settings)[1] for name, settings in optimizers]
assert COMPILER not in sys.modules
import torch._dynamo
with_it = [train(name, **settings)[1] for name, settings in optimizers]
assert all(map(torch.equal, without, with_it))
""",
        tmp_path,
    )


def test_the_import_of_the_compiler_restores_the_methods_of_torch(tmp_path):
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
assert marks() == before, "no further change"
compiled = torch.compile(optimizer.step, backend="eager")
seen.clear()
optimizer.zero_grad()
compiled()
optimizer.step()
assert seen == ["before", "after"] * 2, "each hook is called once in a step, as before"
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


def test_other_functions_are_not_changed():
    assert undecorated(Path.exists) is None
    assert undecorated(len) is None
    assert undecorated(3) is None


def test_an_environment_variable_leaves_torch_unchanged(tmp_path, monkeypatch):
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
