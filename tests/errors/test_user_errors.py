"""Errors in user code name the user's line; common mistakes give a line, not torch's exception."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import framework as fw
from framework import Callback, Metric, Step, Task, TensorSplit, Trainer, Transform
from framework.composition.compose import CommandLine, run_composed
from framework.errors import BuildError, DataError, FrameworkError, PluginError, SettingError
from framework.errors.user_code import describe
from framework.experiment.experiment import Experiment
from framework.registry.registry import Kind, Registry

X = torch.randn(13, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(13) % 3

ERRORS = {  # bodies of functions, and the messages of the errors that they raise in line 2
    "int('x')": "ValueError: invalid literal for int() with base 10: 'x'",
    "raise RuntimeError('bad thing')": "RuntimeError: bad thing",
    "'abc'.upper(1)": "TypeError: str.upper() takes no arguments (1 given)",
    "{}['width']": "KeyError: 'width'",
    "assert 1 == 2": "AssertionError: assert 1 == 2",
    "assert 1 == 2, 'one is not two'": "AssertionError: one is not two",
    "1 / 0": "ZeroDivisionError: division by zero",
    "next(iter(()))": "StopIteration: next(iter(()))",
    "fail()": "RecursionError: maximum recursion depth exceeded",
    "raise ValueError": "ValueError: raise ValueError",
    "raise ValueError('first\\n\\nsecond')": "ValueError: first second",
    "raise Mute('no')": "Mute: no text, since its __str__ raises ZeroDivisionError",
    "raise ExceptionGroup('several', [ValueError('one'), KeyError('two')])": (
        "ExceptionGroup: several (2 sub-exceptions), the first: ValueError: one"
    ),
    "torch.zeros(2).view(3)": "RuntimeError: shape '[3]' is invalid for input of size 2",
}
MUTE = "class Mute(Exception):\n    def __str__(self): return 1 / 0\n"


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """Write a file of the user in the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="mine.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


def run_file(file):
    space = {"torch": torch, "__name__": file.stem}
    exec(compile(file.read_text(), str(file), "exec"), space)
    return space


@pytest.mark.parametrize("body", ERRORS)
def test_an_error_is_one_line_with_its_place(user_file, body):
    fail = run_file(user_file(f"def fail():\n    {body}\n{MUTE}"))["fail"]
    parts = Registry(Kind("fault"))
    try:
        parts.register("faulty", fail)
        with pytest.raises(BuildError) as raised:
            parts.build("faulty")
    finally:
        del Registry.every["fault"]
    assert str(raised.value).endswith(f"cannot be built: {ERRORS[body]} (mine.py:2 in fail)")
    assert len(str(raised.value).splitlines()) == 1


def test_the_place_is_in_a_file_of_the_user_or_in_an_installed_package(user_file):
    package = run_file(user_file("def fail():\n    1 / 0\n", "lib/site-packages/thing/core.py"))
    with pytest.raises(ZeroDivisionError) as raised:
        (lambda: package["fail"]())()
    assert describe(raised.value).endswith("in <lambda>)")
    parts = Registry(Kind("fault"))
    try:
        parts.register("faulty", package["fail"])
        with pytest.raises(BuildError, match=r"division by zero \(thing/core.py:2 in fail\)$"):
            parts.build("faulty")
    finally:
        del Registry.every["fault"]


PLUGIN = """\
import torch
from torch import nn
from torch.nn import functional as F
from framework import *
from framework import Callback, Data, Logger, Metric, Schedule, Step, Task, TensorSplit, Transform

def fail(here, place):
    if here == place:
        raise KeyError("broken here")  # line 9

@models.register("m")
class M(nn.Module):
    def __init__(self, in_shape, out_shape, place: str = ""):
        super().__init__()
        fail("init", place)
        self.place, self.linear = place, nn.Linear(in_shape[0], out_shape[0])
    def forward(self, x):
        fail("dry run", self.place)
        fail("training" if self.training and len(x) > 1 else "-", self.place)
        fail("-" if self.training or len(x) == 1 else "evaluation", self.place)
        return self.linear(x)

@heads.register("h")
class H(nn.Module):
    def __init__(self, in_shape, out_shape): super().__init__()
    def forward(self, x): fail("head", "head")

@blocks.register("b")
class B(nn.Module):
    def __init__(self, in_shape): super().__init__()
    def forward(self, x): fail("block", "block")

@losses.register("l")
class L(nn.Module):
    def forward(self, outputs, targets): fail("loss", "loss")

@tasks.register("t")
class T(Task):
    def __init__(self, place: str = ""): self.place = place
    def check(self, data): fail("check", self.place)
    def count(self, batch):
        fail("count", self.place)
        return len(batch[0])
    def step(self, model, batch):
        fail("step", self.place)
        outputs = model(batch[0])
        return Step(F.cross_entropy(outputs, batch[1]), outputs, batch[1])

@metrics.register("e")
class E(Metric):
    name = "e"
    def __init__(self, place: str = ""): self.place = place
    def sums(self, outputs, targets):
        fail("sums", self.place)
        return outputs.sum().view(1)
    def compute(self, sums):
        fail("compute", self.place)
        return 1.0

@optimizers.register("o")
class O(torch.optim.SGD):
    def __init__(self, params, lr: float = 0.1): super().__init__(params, lr)
    def step(self, closure=None): fail("step", "step")

@schedulers.register("s")
class S(Schedule):
    def __init__(self, total_steps, place: str = ""): self.place = place
    def __call__(self, step):
        fail("call", self.place)
        return 1.0
    def observe(self, metrics): fail("observe", self.place)

@schedulers.register("forgetful")
def forgetful(total_steps): pass

@transforms.register("w")
class W(Transform):
    def __call__(self, batch): fail("transform", "transform")

class Samples(torch.utils.data.Dataset):
    def __init__(self, place): self.place = place
    def __len__(self):
        fail("len", self.place)
        return 9
    def __getitem__(self, index):
        fail("first" if index == 0 else "other", self.place)
        return torch.ones(4), torch.tensor(10 if self.place == "range" else index % 3)

@datasets.register("d")
class D(Data):
    def __init__(self, place: str = ""):
        fail("init", place)
        self.train, self.classes = Samples(place), list("abc")
        self.in_shape, self.out_shape = (4,), (3,)
        if place == "shape": self.out_shape = 3
        if place == "no shape": del self.in_shape
        if place == "generator": self.train = iter([])
        if place == "dict": self.train = [{"x": 1}]
    @classmethod
    def read_inputs(cls, path, facts): fail("read", "read")

@callbacks.register("c")
class C(Callback):
    def __init__(self, place: str = ""): self.place = place
    def on_fit_start(self, trainer): fail("fit_start", self.place)
    def on_gradients(self, trainer): fail("gradients", self.place)
    def on_step_done(self, trainer): fail("step_done", self.place)
    def on_exception(self, trainer): fail("exception", self.place)

@loggers.register("g")
class G(Logger):
    def scalars(self, values, *, step, epoch, wall_seconds): fail("scalars", "scalars")
"""
QUICK = "train --plugins mine.py run.name=x trainer.max_steps=1 scheduler=null transforms=[]"
QUICK += " trainer.max_epochs=1 loader.batch_size=8 data=blobs"


@pytest.fixture
def trained(user_file, command, forget_plugins):
    """Train with the parts of `PLUGIN`; return the exit status and the errors."""
    user_file(PLUGIN)

    def run(settings, verb=QUICK):
        defaults = [] if "callbacks" in settings else ["callbacks=[]"]
        defaults += [] if "loggers" in settings else ["loggers=[]"]
        given = [word.partition("=")[0] for word in settings.split()]
        others = [word for word in verb.split() if word.partition("=")[0] not in given]
        status, _, err = command(" ".join([*others, *defaults, settings]))
        return status, err

    return run


@pytest.mark.parametrize(
    ("settings", "situation"),
    [
        ("model=m model.place=init", r"model/m .*cannot be built: KeyError.*"),
        (
            "model=m '+model.place=dry run'",
            r"KeyError.*, while running M on one training sample of shape \(1, 2\).*",
        ),
        (
            "model=stack head=h",
            r"head \(h\): KeyError.*, while running it on an input of shape \(2,\).*",
        ),
        (
            "model=stack model.blocks=[b]",
            r"block 1 \(b\): KeyError.*, while running it on an input of shape \(2,\).*",
        ),
        (
            "loss=l",
            r"KeyError.*, while computing the loss L of outputs of shape \(2, 3\) and targets .*",
        ),
        ("task=t task.place=check", "KeyError.*"),
        ("data=d data.place=init", "data/d .*cannot be built: KeyError.*"),
        ("data=d data.place=len", "KeyError.*, while reading the length of a split of D.*"),
        ("data=d data.place=first", "KeyError.*, while reading the first training sample of D.*"),
        ("data=d data.place=other", r"sample \d cannot be read: KeyError.*"),
        ("data=d data.place=other loader.workers=1", r"sample \d cannot be read: KeyError.*"),
    ],
)
def test_an_error_before_training_names_the_line_and_the_situation(trained, settings, situation):
    status, err = trained(settings)
    assert status == 2, err
    (line,) = err.splitlines()
    place = r"KeyError: 'broken here' \(mine.py:9 in fail\)"
    assert re.fullmatch(f"framework: {situation.replace('KeyError', place)}", line), line


@pytest.mark.parametrize(
    "settings",
    [
        "model=m model.place=training",
        "model=m model.place=evaluation",
        "task=t task.place=step",
        "task=t task.place=count",
        "metrics=[e] metrics.e.place=sums",
        "metrics=[e] metrics.e.place=compute",
        "optimizer=o",
        "scheduler=s scheduler.place=call",
        "scheduler=s scheduler.place=observe",
        "transforms=[w]",
        "callbacks=[c] callbacks.c.place=fit_start",
        "callbacks=[c] callbacks.c.place=gradients",
        "callbacks=[c] callbacks.c.place=step_done",
        "loggers=[g]",
    ],
)
def test_an_error_in_training_names_the_line_and_is_not_hidden(trained, settings):
    status, err = trained(settings)
    said = "KeyError: 'broken here' (mine.py:9 in fail)"
    assert (status, err) == (1, f"framework: {said}; --traceback shows the calls\n")
    file = json.loads(Path("runs/default/x/status.json").read_text())
    assert (file["status"], file["reason"]) == ("failed", said)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            "data=d data.place=shape",
            "D.out_shape: expected a tuple of ints, got 3",
        ),
        (
            "data=d '+data.place=no shape'",
            "D.in_shape: expected a tuple of ints, got None",
        ),
        (
            "data=d data.place=generator",
            "D.train: expected a split with __len__ and __getitem__, got a ",
        ),
        (
            "data=d data.place=dict",
            "a batch has the fields x (1,), but this task takes (inputs, targets): name its fields",
        ),
        (
            "data=d data.place=range",
            "a batch has the target 10, expected 0 to 2 (3 classes)",
        ),
        ("scheduler=forgetful", "expected a function from the step to a factor, got None"),
    ],
)
def test_a_part_that_breaks_its_contract_is_an_error(trained, settings, said):
    status, err = trained(settings)
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1


def test_an_error_in_on_exception_does_not_hide_the_first_error(trained):
    said = r"on_exception of a callback also failed: KeyError.*mine.py:9"
    with pytest.warns(UserWarning, match=said):
        status, err = trained("callbacks=[c] callbacks.c.place=exception optimizer=o")
    assert status == 1
    assert "(mine.py:9 in fail); --traceback" in err


def test_an_error_in_read_inputs_names_the_file(trained, command, tmp_path):
    assert trained("data=d callbacks=[checkpoint] callbacks.checkpoint.monitor=null")[0] == 0
    (tmp_path / "in.txt").touch()
    status, _, err = command("predict --plugins mine.py runs/default/x --input in.txt --output -")
    assert status == 2
    assert "KeyError: 'broken here' (mine.py:9 in fail), while reading in.txt" in err


# values that a callback logs


class Log(Callback):
    """Logs some values after each step."""

    def __init__(self, values):
        self.values = values

    def on_step_end(self, trainer):
        trainer.log(self.values)


def fit(model=None, data=None, task=None, optimizer=None, settings=None, **arguments):
    """Fit a small model on 13 samples in batches of 4; return the trainer."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3) if model is None else model
    make = optimizer or (lambda params: torch.optim.SGD(params, lr=0.1))
    trainer = Trainer(**{"max_epochs": 1, "device": "cpu"} | (settings or {}))
    data = DataLoader(TensorDataset(X, Y), batch_size=4) if data is None else data
    task = nn.CrossEntropyLoss() if task is None else task
    trainer.fit(model, data, task=task, optimizer=make(model.parameters()), **arguments)
    return trainer


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"a": torch.ones(3)},
            r"log\('a'\): expected a number .*, got a float32 tensor of shape \(3,\)",
        ),
        ({"a": torch.tensor(1j)}, r"log\('a'\): .*, got a complex64 tensor of shape \(\)"),
        ({"a": "text"}, r"log\('a'\): .*, got 'text'"),
        ({"a": "3.5"}, r"log\('a'\): .*, got '3.5'"),
        ({"a": None}, r"log\('a'\): .*, got None"),
        ({"a": {}}, r"log\('a'\): .*, got a value of type dict"),
        ({"a": 1j}, r"log\('a'\): .*, got 1j"),
        ({"a": np.complex64(1)}, r"log\('a'\): .*, got a value of type complex64"),
        ({"a": object()}, r"log\('a'\): .*, got a value of type object"),
        ({"": 1.0}, r"log: expected a text as tag, got ''"),
        ({3: 1.0}, r"log: expected a text as tag, got 3"),
        (3.0, r"log: expected a dict of values by tag, got 3.0"),
    ],
)
def test_an_invalid_logged_value_is_an_error_with_tag_line_and_callback(values, said):
    place = r"test_user_errors.py:\d+ in on_step_end of the callback Log\)"
    with pytest.raises(SettingError, match=rf"trainer\.{said} \(.*{place}$"):
        fit(settings={"callbacks": [Log(values)]})


def test_numbers_of_all_types_can_be_logged():
    values = {
        "int": 3,
        "bool": True,
        "numpy": np.float32(2.5),
        "tensor": torch.ones(1, requires_grad=True),
    }
    values |= {"nan": float("nan"), "array": np.array(4)}
    trainer = fit(settings={"callbacks": [Log(values)]})
    logged = trainer.state.metrics
    assert math.isnan(logged.pop("nan"))
    expected = {"int": 3.0, "bool": 1.0, "numpy": 2.5, "tensor": 1.0, "array": 4.0}
    assert {name: logged[name] for name in expected} == expected
    assert all(type(value) is float for value in logged.values())


def test_replacing_a_value_of_the_trainer_gives_a_warning():
    said = r"trainer\.log\('train/loss'\): it replaces .*of the callback Log"
    with pytest.warns(UserWarning, match=said):
        fit(settings={"callbacks": [Log({"train/loss": 99.0})]})


# arguments of a Trainer


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"metrics": "accuracy"},
            r"metrics: expected a list, got 'accuracy'; .*fw\.metrics\.build\('accuracy'\)",
        ),
        (
            {"metrics": fw.metrics.build("accuracy")},
            r"metrics: expected a list, got a single Accuracy",
        ),
        (
            {"metrics": [fw.metrics.get("accuracy").part]},
            r"metrics: .* got the class Accuracy; write Accuracy\(",
        ),
        ({"metrics": None}, "metrics: expected a list, got None"),
        (
            {"callbacks": Log({})},
            r"callbacks: expected a list, got a single Log; write callbacks=\[\.\.\.\]",
        ),
        (
            {"callbacks": "ema"},
            r"callbacks: expected a list, got 'ema'; .*fw\.callbacks\.build\('ema'\)",
        ),
        (
            {"callbacks": [Log]},
            r"callbacks: expected an instance, got the class Log; write Log\(\.\.\.\)",
        ),
        (
            {"loggers": ["tensorboard"]},
            r"loggers: .* got 'tensorboard'; .*fw\.loggers\.build\('tensorboard'\)",
        ),
        ({"loggers": fw.Logger()}, "loggers: expected a list, got a single Logger"),
        ({"folder": 3}, "folder: expected a path, got 3"),
        (
            {"folder": Path(__file__) / "runs"},
            "folder=.*: expected a folder, but .*test_user_errors.py is a file",
        ),
        ({"model": nn.Linear}, r"model: expected an instance, got the class Linear"),
        (
            {"model": "mlp"},
            r"model: .* got 'mlp'; .*fw\.models\.build\('mlp', in_shape, out_shape\)",
        ),
        (
            {"task": nn.CrossEntropyLoss},
            "task: expected an instance, got the class CrossEntropyLoss",
        ),
        ({"schedule": fw.Schedule}, "schedule: expected an instance, got the class Schedule"),
        (
            {"val": "digits"},
            "val: expected a split, a Data or an iterable of batches, got 'digits'",
        ),
        ({"val": 5}, "val: expected a split, a Data or an iterable of batches, got 5"),
        (
            {"val": X},
            r"val: expected batches of \(inputs, targets\), got a Tensor; framework.TensorSplit",
        ),
        (
            {"val": (X, Y)},
            r"val: expected batches of \(inputs, targets\), got a tuple; framework.TensorSplit",
        ),
        ({"val": {"x": X}}, "val: expected a split, got a dict of x"),
        ({"val": [1, 2]}, "expected a batch of tensors, .*, got int"),
        ({"val": []}, "the validation data has no batch"),
        ({"data": 5}, "data: expected a split, a Data or an iterable of batches, got 5"),
        ({"data": TensorDataset}, "data: expected a split, .*, got TensorDataset"),
        ({"batch_size": 0}, "batch_size=0: expected an int >= 1"),
        (
            {"resume": "runs/x"},
            r"resume: expected .*`Trainer\.state_dict\(\)`, got 'runs/x'",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_step(arguments, said):
    names = arguments.keys() & {"callbacks", "loggers", "folder"}
    settings = {name: arguments[name] for name in names}
    others = {name: value for name, value in arguments.items() if name not in names}
    model = nn.Linear(5, 3)
    before = model.weight.clone()
    right = {"model": model, "data": TensorSplit(X, Y), "task": nn.CrossEntropyLoss()}
    right["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FrameworkError, match=f"^{said}"):
        Trainer(max_epochs=1, **settings).fit(**right | others)
    assert torch.equal(before, model.weight)


# losses, schedules, metrics, transforms


class Changed(nn.Module):
    """A linear model; a function changes its outputs."""

    def __init__(self, change):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.change = change

    def forward(self, x):
        return self.change(self.linear(x))


class Made(Task):
    """A task; a function makes its steps."""

    def __init__(self, change=None, count=len):
        self.change = change
        self.counted = count

    def step(self, model, batch):
        outputs = model(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        make = self.change or Step
        return make(loss, outputs, batch[1])

    def count(self, batch):
        return self.counted(batch[0])


class Measured(Metric):
    """A metric made of two functions."""

    name = "measured"

    def __init__(self, sums=lambda outputs: outputs.sum().view(1), compute=lambda sums: 1.0):
        self.summed = sums
        self.computed = compute

    def sums(self, outputs, targets):
        return self.summed(outputs)

    def compute(self, sums):
        return self.computed(sums)


class Nothing(Transform):
    def __call__(self, batch):
        return None


def frozen():
    return nn.Linear(5, 3).requires_grad_(False)


def no_mean(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": frozen()}, "model: every parameter of the optimizer is frozen"),
        ({"model": Changed(torch.Tensor.detach)}, "the loss CrossEntropyLoss has no gradient"),
        (
            {"model": Changed(lambda outputs: None)},
            "the loss CrossEntropyLoss takes one tensor, but the model returns None",
        ),
        (
            {"task": lambda *_: None},
            "the loss <lambda>: expected a tensor with one number, got None",
        ),
        (
            {"task": lambda *_: 1.5},
            "the loss <lambda>: expected a tensor with one number, got a float",
        ),
        (
            {"task": no_mean},
            r"the loss no_mean: expected one real number, .*, got float32 of shape \(4,\)",
        ),
        ({"task": Made(lambda *_: None)}, r"Made\.step: expected a framework\.Step\(.*, got None"),
        (
            {"task": Made(lambda loss, *_: loss)},
            r"Made\.step: expected a framework\.Step\(.*, got Tensor",
        ),
        (
            {"task": Made(lambda *parts: Step(*parts, {"a": 3.0}))},
            "the task's value 'a': expected a tensor",
        ),
        (
            {"task": Made(count=lambda inputs: None)},
            r"Made\.count: expected an int or a tensor .*, got None",
        ),
        ({"schedule": lambda step: None}, "schedule: expected a factor .*, got None for step 0"),
        ({"schedule": lambda step: -1.0}, "schedule: expected a factor .*, got -1.0 for step 0"),
        (
            {"schedule": lambda step: float("nan")},
            "schedule: expected a factor .*, got nan for step 0",
        ),
        (
            {"schedule": lambda step: torch.ones(2)},
            r"schedule: .*, got a tensor of shape \(2,\) for step 0",
        ),
        (
            {"metrics": [Measured(compute=lambda sums: None)]},
            "Measured.compute: .* got None",
        ),
        (
            {"metrics": [Measured(compute=lambda sums: torch.ones(2))]},
            r"Measured.compute: .*\(2,\)",
        ),
        (
            {"metrics": [Measured(lambda outputs: outputs[:, 0])]},
            r"Measured.sums: .* shape \(4,\) .* got \(1,\)",
        ),
        (
            {"settings": {"callbacks": [Nothing()]}},
            "the transform Nothing: expected a batch .*, got None",
        ),
    ],
)
def test_a_wrong_return_value_of_user_code_is_an_error(arguments, said):
    with pytest.raises(FrameworkError, match=f"^{said}"):
        fit(**arguments)


def test_a_loss_that_depends_on_no_parameter_gives_a_warning():
    with pytest.warns(UserWarning, match="does not depend on any parameter of the optimizer"):
        fit(task=lambda *_: torch.ones((), requires_grad=True))


@pytest.mark.parametrize("factor", [torch.tensor(0.5), np.float32(0.5), np.array(0.5)])
def test_a_learning_rate_factor_may_be_a_tensor_or_an_array(factor):
    expected = fit(schedule=lambda step: 0.5).model.weight
    assert torch.equal(fit(schedule=lambda step: factor).model.weight, expected)
    assert type(fit(schedule=lambda step: 1).optimizer.param_groups[0]["lr"]) is float


@pytest.mark.parametrize(("shift", "wrong"), [(1, 3), (-1, -1)])
def test_a_target_out_of_range_is_named(shift, wrong):
    data = DataLoader(TensorDataset(X, Y + shift), batch_size=13)
    said = f"^a batch has the target {wrong}, expected 0 to 2"
    with pytest.raises(DataError, match=said):
        fit(data=data)
    with pytest.raises(DataError, match=said):
        fit().evaluate(data)


def normalised():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def batches(**settings):
    return DataLoader(TensorDataset(X, Y), **{"batch_size": 4} | settings)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"data": batches()}, r"batch_size=4 makes a batch of one sample \(the last of 13"),
        ({"data": TensorSplit(X, Y), "batch_size": 6}, "batch_size=6 makes a batch of one sample"),
        ({"data": batches(batch_size=1)}, "batch_size=1 makes a batch of one sample"),
        ({"data": batches(batch_size=13), "settings": {"micro_batch": 4}}, "micro_batch=4 makes"),
        ({"data": [(X[:4], Y[:4]), (X[:1], Y[:1])]}, "a batch of one sample in training"),
    ],
)
def test_a_batch_norm_of_one_sample_is_refused(arguments, said):
    """If the sizes of batches are known, before the first step."""
    model = normalised()
    before = model[0].weight.clone()
    with pytest.raises(DataError, match=f"^{said}.*batch norm"):
        fit(model=model, **arguments)
    assert torch.equal(before, model[0].weight) == ("in training" not in said)


def test_a_batch_of_one_sample_is_allowed_without_a_norm_over_the_batch():
    positions = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.BatchNorm1d(1), nn.Flatten())
    over_positions = nn.Sequential(positions, nn.Linear(5, 3))
    assert fit(model=over_positions).state.step == 4
    assert fit(model=normalised(), data=batches(drop_last=True)).state.step == 3
    assert fit(model=normalised(), data=batches(batch_size=13)).state.step == 1


# optimizers


class Closure(torch.optim.SGD):
    """Needs a closure, like sharpness-aware optimizers."""

    def step(self, closure=None):
        if closure is None:
            raise ValueError("it requires closure")


class Hessian(torch.optim.SGD):
    """Differentiates gradients, like AdaHessian."""

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        gradients = [p.grad for p in parameters]
        torch.autograd.grad(gradients, parameters, [torch.ones_like(each) for each in gradients])


class WithoutRate(torch.optim.Optimizer):
    """Gradient descent without "lr" in its groups."""

    def __init__(self, params, pace=0.1):
        super().__init__(params, {"pace": pace})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["pace"])


class Flagged(torch.optim.SGD):
    """Needs groups with a flag, like implementations of Muon."""

    def __init__(self, params, lr=0.1):
        for group in params:
            assert "use_muon" in group
        super().__init__(params, lr)


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (torch.optim.LBFGS, r"optimizer=LBFGS: its step\(\) needs a closure"),
        (
            Closure,
            r"optimizer=Closure: its first step fails: ValueError: it requires .*without a closure",
        ),
        (
            Hessian,
            r"optimizer=Hessian: its first step fails: RuntimeError: .*without create_graph=True",
        ),
        (
            torch.optim.SparseAdam,
            r"optimizer=SparseAdam: its first step fails: RuntimeError: .*dense gradients",
        ),
    ],
)
def test_an_optimizer_that_needs_more_than_a_step_is_refused(optimizer, said):
    model = nn.Linear(5, 3)
    before = model.weight.clone()
    with pytest.raises(SettingError, match=f"^{said}"):
        fit(model=model, optimizer=optimizer)
    assert torch.equal(before, model.weight)


def test_an_error_in_an_optimizer_of_the_user_keeps_its_type():
    class Faulty(torch.optim.SGD):
        def step(self, closure=None):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        fit(optimizer=Faulty)


def test_an_optimizer_without_a_learning_rate_trains():
    watching = {"callbacks": [fw.callbacks.build("learning_rate")]}
    trainer = fit(
        optimizer=lambda params: WithoutRate([{"params": [p]} for p in params]),
        settings=watching,
    )
    assert torch.equal(trainer.model.weight, fit().model.weight)
    assert not [name for name in trainer.state.metrics if "learning_rate" in name]
    with pytest.raises(SettingError, match=r"^schedule: WithoutRate has no learning rate"):
        fit(optimizer=WithoutRate, schedule=lambda step: 1.0)
    with pytest.raises(SettingError, match=r"^schedule_free needs a learning rate"):
        fit(optimizer=WithoutRate, settings={"callbacks": [fw.callbacks.build("schedule_free")]})


OPTIMIZERS = """\
from framework import optimizers
import test_user_errors as here
for name in ("WithoutRate", "Flagged"):
    optimizers.register(name.lower(), getattr(here, name))
import torch
optimizers.register("lbfgs", torch.optim.LBFGS)
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train optimizer=lbfgs", "framework: optimizer=LBFGS: its step() needs a closure"),
        ("train optimizer=withoutrate", "framework: schedule: WithoutRate has no learning rate"),
        (
            "find lr optimizer=withoutrate scheduler=null",
            "framework: schedule: WithoutRate has no learning rate",
        ),
        (
            "train optimizer=withoutrate scheduler=null parameters.layer_decay=0.5",
            "framework: parameters.layer_decay: optimizer/withoutrate has no learning rate",
        ),
        ("train optimizer=flagged", "an optimizer receives a list of "),
        ("plan optimizer=withoutrate scheduler=null", ""),
    ],
)
def test_optimizers_on_the_command_line(user_file, command, forget_plugins, line, said):
    user_file(OPTIMIZERS)
    verb, *rest = line.split()
    status, out, err = command(f"{verb} {' '.join(rest)} --plugins mine.py data=blobs")
    assert said in err
    assert status == (2 if said else 0)
    assert not Path("runs").exists()
    assert "learning rate" not in out


# sparse and complex gradients

INDICES = torch.randint(0, 9, (12, 4), generator=torch.Generator().manual_seed(1))
WORDS = TensorSplit(INDICES, Y[:12])


class Bag(nn.Module):
    """The mean of embeddings and a linear layer; batches contain indices several times."""

    def __init__(self, sparse):
        super().__init__()
        self.embedding = nn.Embedding(9, 3, sparse=sparse)
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(self.embedding(x).mean(1))


class Keep:
    """A logger that keeps histograms."""

    def __init__(self):
        self.histograms = {}

    def histogram(self, tag, values, step):
        self.histograms.setdefault(tag, values)

    def __getattr__(self, name):
        return lambda *given, **named: None


def fit_bag(sparse, name, **settings):
    torch.manual_seed(0)
    model = Bag(sparse)
    logger = Keep()
    chosen = [fw.callbacks.build(name, **settings)]
    limits = {"max_epochs": 2, "callbacks": chosen, "loggers": [logger], "log_every": "1steps"}
    trainer = fit(model, WORDS, settings=limits, batch_size=4)
    return trainer, logger


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gradient_norm", {}),
        ("clip_gradients", {"norm": 0.05}),
        ("clip_gradients", {"norm": None, "value": 0.01}),
        ("clip_gradients", {"norm": 0.5, "value": 0.01}),
        ("non_finite", {}),
        ("noise_scale", {"every": "1step", "parts": 2}),
    ],
)
def test_callbacks_treat_sparse_gradients_as_dense_ones(name, settings):
    sparse, _ = fit_bag(True, name, **settings)
    dense, _ = fit_bag(False, name, **settings)
    for one, other in zip(sparse.model.parameters(), dense.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    logged = "train/gradient_norm"
    if name == "gradient_norm" or settings.get("norm"):
        assert sparse.state.metrics[logged] == pytest.approx(dense.state.metrics[logged], rel=1e-5)
    if name == "noise_scale":
        one = sparse.callbacks[0]
        other = dense.callbacks[0]
        assert (one.trace, one.squared) == pytest.approx((other.trace, other.squared), rel=1e-4)


def test_histograms_of_a_sparse_gradient_contain_its_stored_values():
    _, sparse = fit_bag(True, "histograms")
    _, dense = fit_bag(False, "histograms")
    stored = sparse.histograms["gradients/embedding.weight"]
    full = dense.histograms["gradients/embedding.weight"]
    torch.testing.assert_close(stored, full[full != 0])


def test_sam_refuses_sparse_gradients():
    with pytest.raises(SettingError, match=r"^sam does not support sparse gradients"):
        fit_bag(True, "sam")


def test_values_of_complex_gradients_are_clipped_in_both_parts():
    clip = fw.callbacks.build("clip_gradients", norm=None, value=0.5)
    weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    weight.grad = torch.tensor([3 - 4j, 0.1j, 0.2])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    clip.on_gradients(type("T", (), {"optimizer": optimizer})())
    assert torch.equal(weight.grad, torch.tensor([0.5 - 0.5j, 0.1j, 0.2]))


# lazy modules


LAZY = """\
from torch import nn
from framework import models

@models.register("lazy")
class Lazy(nn.Module):
    def __init__(self, in_shape, out_shape):
        super().__init__()
        self.linear = nn.LazyLinear(out_shape[0])
    def forward(self, x): return self.linear(x)
"""


def test_an_initializer_fills_lazy_weights(user_file, forget_plugins):
    user_file(LAZY)
    jobs = []
    run_composed(
        CommandLine(["model=lazy", "initializer=ones", "data=blobs"], ["mine.py"]), jobs.append
    )
    assert Experiment(jobs[0].spec).model.linear.weight.unique().tolist() == [1.0]


@pytest.mark.parametrize("name", ["ema", "lookahead", "schedule_free"])
def test_callbacks_that_need_initialized_parameters_refuse_lazy_ones(name):
    def lazy():
        return nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3))

    assert fit(model=lazy()).state.step == 4
    settings = {"callbacks": [fw.callbacks.build(name)]}
    said = r"0\.weight is uninitialized .*call the model on a batch"
    with pytest.raises(SettingError, match=said):
        fit(model=lazy(), settings=settings)
    ready = lazy()
    ready(X)
    assert fit(model=ready, settings=settings).state.step == 4


# plugins that import each other

HELPER = "from framework import activations\nfrom torch import nn\nSLOPE = 0.5\n"
HELPER += 'activations.register("{}", nn.ReLU)\n'
USER = "from .{} import SLOPE\nfrom framework import activations\nfrom torch import nn\n"
USER += 'activations.register("{}", nn.ReLU)\n'


@pytest.mark.parametrize("helper", ["a_helper", "z_helper"])
@pytest.mark.parametrize("init", ["", "from .{} import SLOPE\nSIZE = 3\n"])
def test_plugins_of_a_folder_import_each_other(user_file, forget_plugins, helper, init):
    """Each file is loaded once, in any order, also file by file."""
    user_file(HELPER.format("helper_act"), f"parts/{helper}.py")
    user_file(USER.format(helper, "user_act"), "parts/mine.py")
    if init:
        user_file(init.format(helper), "parts/__init__.py")
        user_file("from . import SIZE\nassert SIZE == 3\n", "parts/other.py")
    fw.discover(["parts"])
    fw.discover(["parts/mine.py", f"parts/{helper}.py"])
    assert {"helper_act", "user_act"} <= set(fw.activations.names())
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    assert len([file for file in files if file.endswith(f"parts/{helper}.py")]) == 1


def test_an_absolute_import_of_another_plugin_file_gives_advice(user_file, forget_plugins):
    user_file("x = 1\n", "parts/helper.py")
    user_file("\nfrom helper import x\n", "parts/mine.py")
    advice = r"helper\.py .*write `from \.helper import \.\.\.` \(parts/mine\.py:2\)"
    with pytest.raises(PluginError, match=advice):
        fw.discover(["parts/mine.py"])
