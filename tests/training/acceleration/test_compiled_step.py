"""A step as one function, from the batch to the new weights: what it does is what the eager one does."""

from functools import partial

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, Trainer
from framework.errors import FrameworkError
from framework.runtime.torch_internals.compiler import CompiledFunction
from framework.training.acceleration import compiled_step
from framework.training.acceleration.compiled_step import Compiled

fw.discover()
DATA = fw.TensorSplit(
    torch.randn(64, 5, generator=torch.Generator().manual_seed(3)), torch.arange(64) % 3
)
RECIPES = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("adam", {"lr": 0.01}),
    ("adamw", {"lr": 0.01}),
    ("rmsprop", {"lr": 0.01}),
    ("adagrad", {"lr": 0.1}),
    ("lion", {"lr": 0.001}),
]
compiles = pytest.mark.slow  # tens of seconds each


@pytest.fixture
def uncompiled(monkeypatch):
    """The function itself runs, in place of what the compiler would make of it; returns how often."""
    calls = []

    def plainly(self, *given):
        calls.append(self.function)
        return self.function(*given)

    def keep(self, function, what, clock):
        self.function = function

    monkeypatch.setattr(Compiled, "__init__", keep)
    monkeypatch.setattr(Compiled, "__call__", plainly)
    return calls


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).double()


def fit(
    *callbacks, optimizer=("adamw", {"lr": 0.01}), data=DATA, resume=None, model=None, **settings
):
    model = network() if model is None else model
    trainer = Trainer(
        callbacks=callbacks, **({"max_steps": 12, "seed": 5, "device": "cpu"} | settings)
    )
    trainer.fit(
        model,
        fw.TensorSplit(data[:][0].double(), data[:][1]),
        task=nn.CrossEntropyLoss(),
        optimizer=fw.optimizers.build(optimizer[0], list(model.parameters()), **optimizer[1]),
        schedule=lambda step: 1 / (1 + step),
        metrics=[fw.metrics.build("accuracy")],
        batch_size=24,
        resume=resume,
    )
    return trainer


def single_call(trainer):
    """The compiled whole step."""
    return trainer._training_step.forward_backward.step.single_call.compiled


def assert_same(one, other):
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert one.state.metrics["train/loss"] == pytest.approx(
        other.state.metrics["train/loss"], rel=1e-9
    )


@pytest.mark.parametrize("optimizer", RECIPES, ids=str)
def test_a_whole_step_does_what_the_eager_one_does(optimizer, uncompiled):
    whole = fit(fw.callbacks.build("non_finite"), optimizer=optimizer, compile="step")
    first = (
        "_step" if optimizer in (RECIPES[0], RECIPES[5]) else "_gradients"
    )  # no state, or there from the beginning
    assert [call.__name__ for call in uncompiled] == [first] + ["_step"] * 11
    assert_same(whole, fit(optimizer=optimizer))


def test_a_compiled_run_goes_on_as_an_eager_one(uncompiled):
    half = fit(compile="step", max_steps=5).state_dict()
    resumed = fit(compile="step", resume=half)
    assert_same(resumed, fit())


class Looks(Callback):
    def __init__(self):
        self.seen = []

    def on_gradients(self, trainer):
        self.seen.append(trainer.state.step)


class LooksAtSome(Looks):
    def needs_gradients(self, trainer):
        return trainer.state.step in (3, 7)


def test_who_looks_at_gradients_gets_them(uncompiled):
    looks, some = Looks(), LooksAtSome()
    assert_same(fit(looks, compile="step"), fit(some, compile="step"))
    assert looks.seen == list(range(12))
    assert some.seen == [0, 3, 7]  # the first step is never whole: it makes the optimizer's state
    fit(fw.callbacks.build("clip_gradients", norm=0.1), compile="step")
    assert uncompiled[-1].__name__ == "_gradients"


def test_gradient_norms_are_those_of_the_eager_run(uncompiled):
    logged = [
        fit(fw.callbacks.build("gradient_norm"), log_every="4steps", compile=c)
        for c in ("step", "off")
    ]
    norms = [trainer.state.metrics["train/gradient_norm"] for trainer in logged]
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)


def spoiled(row=40):
    inputs = DATA[:][0].clone()
    inputs[row] = float("nan")
    return fw.TensorSplit(inputs, DATA[:][1])


def test_no_update_is_made_from_what_is_not_finite(uncompiled):
    with pytest.raises(FrameworkError, match=r"first gradient not finite is of 0\.weight"):
        fit(
            fw.callbacks.build("non_finite"),
            data=spoiled(),
            compile="step",
            model=(model := network()),
        )
    assert all(p.isfinite().all() for p in model.parameters())


def test_skipped_steps_are_those_of_the_eager_run(uncompiled):
    made = [
        fit(fw.callbacks.build("non_finite", policy="skip"), data=spoiled(), compile=c)
        for c in ("step", "off")
    ]
    assert_same(*made)
    assert made[0].callbacks[0].skipped == made[1].callbacks[0].skipped == 4


@compiles
@pytest.mark.parametrize("optimizer", [RECIPES[1], RECIPES[3], RECIPES[4]], ids=str)
def test_a_compiled_whole_step_does_what_the_eager_one_does(optimizer):
    made = fit(fw.callbacks.build("non_finite"), optimizer=optimizer, compile="step")
    assert_same(made, fit(optimizer=optimizer))
    assert single_call(made).compilations == 2  # for batches, and for the last one of an epoch
    assert made.clock.seconds["compiling"] > 0.1


@compiles
def test_it_is_said_when_and_why_a_step_is_compiled_again():
    class Growing(nn.Linear):
        calls = 0

        def forward(self, inputs):
            Growing.calls += 1
            return super().forward(inputs) * Growing.calls

    with pytest.warns(UserWarning, match=r"compile=step: compiled for the third time|3"):
        fit(compile="step", model=Growing(5, 3).double(), max_steps=6)


@pytest.fixture
def backend(monkeypatch):
    """The compiler traces functions, and runs what it has traced eagerly."""
    monkeypatch.setattr(
        compiled_step, "CompiledFunction", partial(CompiledFunction, backend="eager")
    )


def test_each_run_of_a_process_may_be_compiled_as_often(backend):
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=3):  # torch's own is 8
        for _ in range(3):
            assert single_call(fit(compile="step")).compilations == 2


@pytest.mark.parametrize("compile", ["step", "model"])
def test_a_fit_leaves_functions_alone_that_the_user_has_compiled(compile, backend):
    import torch._dynamo

    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    @torch.compile(backend=count)
    def users_own(x):
        return x.square().sum()

    def config():
        return {
            name: getattr(torch._dynamo.config, name, None)
            for name in ("trace_autograd_ops", "recompile_limit")
        }

    before = config()
    users_own(torch.ones(3))
    assert len(compiled) == 1
    fit(compile=compile)
    users_own(torch.ones(3))
    assert len(compiled) == 1
    assert config() == before
