"""A compiled step, from the batch to the new weights, equals the eager step."""

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, Trainer
from framework.errors import FrameworkError
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
    """Run functions without compiling them; return the list of calls."""
    calls = []

    def init(self, function, setting, clock):
        self.function = function

    def call(self, *inputs):
        calls.append(self.function)
        return self.function(*inputs)

    monkeypatch.setattr(Compiled, "__init__", init)
    monkeypatch.setattr(Compiled, "__call__", call)
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


def single_call_step(trainer):
    """Return the step with its update."""
    return trainer._training_step.forward_backward.step.single_call


def single_call(trainer):
    """Return the compiled step with its update."""
    return single_call_step(trainer).compiled


def assert_same(one, other):
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert one.state.metrics["train/loss"] == pytest.approx(
        other.state.metrics["train/loss"], rel=1e-9
    )


@pytest.mark.parametrize("optimizer", RECIPES, ids=str)
def test_a_step_with_its_update_equals_the_eager_one(optimizer, uncompiled):
    whole = fit(fw.callbacks.build("non_finite"), optimizer=optimizer, compile="step")
    # These two have no state, or all of it before the first step.
    first = "_step" if optimizer in (RECIPES[0], RECIPES[5]) else "_gradients"
    assert [call.__name__ for call in uncompiled] == [first] + ["_step"] * 11
    assert_same(whole, fit(optimizer=optimizer))


def test_a_resumed_compiled_run_equals_an_eager_one(uncompiled):
    half = fit(compile="step", max_steps=5).state_dict()
    resumed = fit(compile="step", resume=half)
    assert_same(resumed, fit())


class Pause(Callback):
    """Freezes a parameter for some steps, so that its number of steps differs from the others'."""

    def on_step_end(self, trainer):
        first = next(trainer.model.parameters())
        first.requires_grad_(trainer.state.step not in (3, 4, 5))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_bias_corrections_follow_the_steps_of_each_parameter(name, uncompiled):
    recipe = (name, {"lr": 0.01})
    compiled = fit(Pause(), optimizer=recipe, compile="step")
    assert_same(compiled, fit(Pause(), optimizer=recipe))
    steps = {int(state["step"]) for state in compiled.optimizer.state.values()}
    assert steps == {9, 12}
    numbers = single_call_step(compiled).group_numbers()
    assert [set(group) for group in numbers] == [{"lr"}]
    numbers = single_call_step(fit(optimizer=recipe, compile="step")).group_numbers()
    assert [set(group) for group in numbers] == [
        {"lr", "bias_correction1", "bias_correction2_sqrt"}
    ]


class Idle(nn.Module):
    """Has a parameter without effect on the loss while `idle` is true."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.idle = False

    def forward(self, inputs):
        outputs = self.linear(inputs)
        return outputs if self.idle else outputs * self.scale


class Switch(Callback):
    def on_step_start(self, trainer):
        trainer.model.idle = trainer.state.step in (4, 5, 6)


def test_a_parameter_without_a_gradient_does_not_count_the_step(uncompiled):
    def run(**settings):
        torch.manual_seed(0)
        return fit(Switch(), model=Idle().double(), **settings)

    compiled = run(compile="step")
    assert_same(compiled, run())
    steps = {int(state["step"]) for state in compiled.optimizer.state.values()}
    assert steps == {9, 12}


class Watching(Callback):
    def __init__(self):
        self.seen = []

    def on_gradients(self, trainer):
        self.seen.append(trainer.state.step)


class WatchingSome(Watching):
    def needs_gradients(self, trainer):
        return trainer.state.step in (3, 7)


def test_callbacks_receive_the_gradients_that_they_need(uncompiled):
    every = Watching()
    some = WatchingSome()
    assert_same(fit(every, compile="step"), fit(some, compile="step"))
    assert every.seen == list(range(12))
    assert some.seen == [0, 3, 7]  # 0, since the first step creates the optimizer's state
    fit(fw.callbacks.build("clip_gradients", norm=0.1), compile="step")
    assert uncompiled[-1].__name__ == "_gradients"


def test_gradient_norms_are_those_of_the_eager_run(uncompiled):
    norms = []
    for mode in ("step", "off"):
        callback = fw.callbacks.build("gradient_norm")
        trainer = fit(callback, log_every="4steps", compile=mode)
        norms.append(trainer.state.metrics["train/gradient_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)


def test_health_observes_a_compiled_step_as_an_eager_one(uncompiled):
    observed = []
    for mode in ("step", "off"):
        callback = fw.callbacks.build("health", every="4steps")
        fit(callback, compile=mode)
        observed.append(callback.history)
        if mode == "step":
            names = [call.__name__ for call in uncompiled]
            assert [step for step, name in enumerate(names, 1) if name == "_gradients"] == [
                1,
                4,
                8,
                12,
            ]
    assert observed[0].isfinite().any(0).any(1).all()
    torch.testing.assert_close(*observed, equal_nan=True)


def data_with_nan(row=40):
    inputs = DATA[:][0].clone()
    inputs[row] = float("nan")
    return fw.TensorSplit(inputs, DATA[:][1])


def test_gradients_that_are_not_finite_make_no_update(uncompiled):
    model = network()
    non_finite = fw.callbacks.build("non_finite")
    with pytest.raises(FrameworkError, match=r"first gradient .* 0\.weight"):
        fit(non_finite, data=data_with_nan(), compile="step", model=model)
    assert all(p.isfinite().all() for p in model.parameters())


def test_skipped_steps_are_those_of_the_eager_run(uncompiled):
    compiled = fw.callbacks.build("non_finite", policy="skip")
    eager = fw.callbacks.build("non_finite", policy="skip")
    assert_same(
        fit(compiled, data=data_with_nan(), compile="step"),
        fit(eager, data=data_with_nan(), compile="off"),
    )
    assert compiled.skipped == eager.skipped == 4


@compiles
@pytest.mark.parametrize("optimizer", [RECIPES[1], RECIPES[3], RECIPES[4]], ids=str)
def test_a_compiled_step_with_its_update_equals_the_eager_one(optimizer):
    compiled = fit(fw.callbacks.build("non_finite"), optimizer=optimizer, compile="step")
    assert_same(compiled, fit(optimizer=optimizer))
    assert single_call(compiled).compilations == 2  # also for the last batch of an epoch
    assert compiled.clock.seconds["compiling"] > 0.1


@compiles
def test_a_step_that_is_compiled_again_gives_a_warning():
    class Growing(nn.Linear):
        calls = 0

        def forward(self, inputs):
            Growing.calls += 1
            return super().forward(inputs) * Growing.calls

    with pytest.warns(UserWarning, match=r"compile=step: compiled \d times"):
        fit(compile="step", model=Growing(5, 3).double(), max_steps=6)


def test_the_limit_of_compilations_is_for_each_run(eager_backend):
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=3):  # torch's own is 8
        for _ in range(3):
            assert single_call(fit(compile="step")).compilations == 2


@pytest.mark.parametrize("mode", ["step", "model"])
def test_a_fit_keeps_the_compiled_functions_of_the_user(mode, eager_backend):
    import torch._dynamo

    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    @torch.compile(backend=count)
    def of_user(x):
        return x.square().sum()

    def config():
        names = ("trace_autograd_ops", "recompile_limit")
        return {name: getattr(torch._dynamo.config, name, None) for name in names}

    before = config()
    of_user(torch.ones(3))
    assert len(compiled) == 1
    fit(compile=mode)
    of_user(torch.ones(3))
    assert len(compiled) == 1
    assert config() == before
