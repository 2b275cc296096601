"""Trials that train as one stacked model: each one gives its results when trained alone."""

import copy
import signal
from contextlib import nullcontext
from functools import partial, partialmethod
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback
from framework.contracts.callback import EVENTS
from framework.training.acceleration import cuda_graph
from framework.tuning.vectorized.stacked_forward import TrialMeasures
from framework.tuning.vectorized.stacked_update import GroupSlot, pure_update
from framework.tuning.vectorized.trainer import StackedTrainer
from stacked import (
    OPTIMIZERS,
    alone,
    assert_not_stackable,
    assert_same,
    assert_stacked_as_alone,
    network,
    together,
    trial,
)

fw.discover()


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_a_stacked_trial_gives_its_results_when_alone(optimizer):
    assert_stacked_as_alone({"lr": 1.0}, {"lr": 0.3}, {"lr": 2.0}, optimizer=optimizer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_a_stacked_trial_on_a_gpu_gives_its_results_when_alone(optimizer):
    def make(seed, **settings):
        callbacks = [
            fw.callbacks.build("non_finite"),
            fw.callbacks.build("ema"),
            StopsAt(7 if seed == 2 else 500),
        ]
        settings |= {"max_epochs": 5, "device": "cuda"}
        return trial(seed, optimizer=optimizer, callbacks=callbacks, **settings)

    trained, errors = together(make(1), make(2), make(3), make(4, lr=1e308))
    assert [type(error).__name__ for error in errors] == ["NoneType"] * 3 + ["Diverged"]
    assert all(parameter.isfinite().all() for parameter in trained[3].model.parameters())
    for trainer, seed in zip(trained[:3], (1, 2, 3), strict=True):
        assert_same(trainer, alone(make(seed)))


def test_each_seed_has_its_own_weights_and_sample_order():
    assert_stacked_as_alone({"seed": 1}, {"seed": 2}, {"seed": 3, "lr": 0.5})


class Replayed:
    """A stand-in for a CUDA graph: it runs again, into the tensors of the first run."""

    def __init__(self, run):
        self.run = run
        self.outputs = run()

    def replay(self):
        for tensor, value in zip(self.outputs[:3], self.run()[:3], strict=True):
            tensor.detach().copy_(value)


def test_the_step_of_all_trials_is_replayed_as_a_cuda_graph(monkeypatch):
    def record_graph(run):
        graph = Replayed(run)
        return graph, graph.outputs

    monkeypatch.setattr(cuda_graph, "side_stream", torch.enable_grad)
    monkeypatch.setattr(cuda_graph, "record_graph", record_graph)
    recipes = [
        {"seed": 0, "max_epochs": 34},
        {"seed": 1, "max_epochs": 20},
        {"seed": 2, "max_epochs": 34},
    ]
    trainers, fits = zip(*[trial(**recipe) for recipe in recipes], strict=True)
    for trainer in trainers:
        trainer.cuda_graph = "on"  # on a CPU it is off
    errors = {}
    stacked = StackedTrainer(trainers, fits, errors.__setitem__)
    stacked.run()
    assert errors == {0: None, 1: None, 2: None}
    assert sum(stacked.graphed.seen.values()) == 102
    assert len(stacked.graphed.seen) == 4, "two sizes of batch, for three trials and for two"
    for trainer, recipe in zip(trainers, recipes, strict=True):
        assert_same(trainer, alone(trial(**recipe)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_trial_has_its_own_schedule_clipping_and_averages(accumulate):
    def make(number):
        callbacks = [
            fw.callbacks.build("clip_gradients", norm=0.1 * number),
            fw.callbacks.build("ema", decay=0.8),
            fw.callbacks.build("non_finite"),
            fw.callbacks.build("gradient_norm"),
        ]
        schedule = fw.schedulers.build("cosine", 40 * number)
        settings = {"lr": number, "accumulate": accumulate, "max_epochs": 9}
        return trial(callbacks=callbacks, schedule=schedule, **settings)

    assert_stacked_as_alone({"number": 1}, {"number": 2}, {"number": 3}, make=make)


def test_each_trial_has_its_own_batch_statistics():
    def make(seed):
        model = network(seed, norm=True)
        return trial(seed, model=model, optimizer=OPTIMIZERS[1], max_epochs=5)

    assert_stacked_as_alone({"seed": 1}, {"seed": 2}, make=make)


def cross_entropy(**settings):
    return lambda: fw.losses.build("cross_entropy", **settings).double()


def test_label_smoothing_may_differ():
    recipes = [{"loss": cross_entropy(label_smoothing=value)} for value in (0.0, 0.1, 0.5)]
    assert_stacked_as_alone(*recipes, max_epochs=9)


@pytest.mark.parametrize("seeds", [(0, 0, 0), (1, 2, 3)], ids=["one order", "an order each"])
@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1}, {"ignore_index": 1}], ids=str)
def test_class_weights_may_differ(seeds, settings):
    """The mean is over the weights of the targets, so counts differ, most in the last batch."""
    recipes = []
    weights = ([1.0, 1.0, 1.0], [1.0, 2.0, 5.0], [0.5, 0.1, 3.0])
    for seed, weight in zip(seeds, weights, strict=True):
        recipes.append({"seed": seed, "loss": cross_entropy(weight=weight, **settings)})
    assert_stacked_as_alone(*recipes, max_epochs=4)


def test_other_tensors_and_numbers_of_a_loss_may_differ():
    def make(gamma, alpha):
        loss = partial(fw.losses.build, "focal", gamma=gamma, alpha=alpha)
        return trial(loss=lambda: loss().double(), max_epochs=4)

    first = {"gamma": 2.0, "alpha": [0.2, 0.5, 0.3]}
    second = {"gamma": 0.5, "alpha": [1.0, 0.1, 0.1]}
    assert_stacked_as_alone(first, second, make=make)


def test_the_weights_of_goals_may_differ_and_each_goal_is_logged():
    def make(reconstruction):
        torch.manual_seed(0)
        goals = {"reconstruction": reconstruction, "loss": lambda: nn.CrossEntropyLoss()}
        return trial(
            model=nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3 + 6)).double(),
            task=partial(fw.tasks.build, "multi_task", **goals),
            max_epochs=4 if reconstruction else 2,
        )

    recipes = [{"reconstruction": weight} for weight in (0.0, 1.0, 7.0)]
    for trainer in assert_stacked_as_alone(*recipes, make=make):
        assert any("val/reconstruction" in values for _, _, values in trainer.recorder.lines)


class Scale(nn.Module):
    """Scales by a number that `store` puts into a container and `load` reads from the module."""

    def __init__(self, store, load, factor):
        super().__init__()
        self.stored = store(factor)
        self._private = factor
        self.load = load

    def forward(self, inputs):
        return inputs * self.load(self)


class Holder:
    def __init__(self, number):
        self.number = number


def scaled(store, load, factor):
    model = network()
    model.insert(2, Scale(store, load, factor))
    return trial(model=model, max_epochs=4)


CONTAINERS = {
    "private attribute": (lambda factor: None, lambda module: module._private),
    "dict": (lambda factor: {"factor": factor}, lambda module: module.stored["factor"]),
    "dict in a list": (
        lambda factor: [1, {"factor": factor}],
        lambda module: module.stored[1]["factor"],
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_numbers_may_differ_in_any_attribute_dict_or_list(container):
    make = partial(scaled, *CONTAINERS[container])
    assert_stacked_as_alone({"factor": 0.5}, {"factor": 2.0}, make=make)


@pytest.mark.parametrize(
    ("store", "load"),
    [
        (lambda factor: lambda: factor, lambda module: module.stored()),
        (lambda factor: partial(float, factor), lambda module: module.stored()),
        (lambda factor: (factor, 1), lambda module: module.stored[0]),
        (Holder, lambda module: module.stored.number),
        (lambda factor: torch.tensor(factor), lambda module: module.stored),
        (
            lambda factor: torch.Generator().manual_seed(int(factor)),
            lambda module: module.stored.initial_seed(),
        ),
    ],
    ids=["closure", "partial", "tuple", "object", "tensor", "generator"],
)
def test_a_difference_that_no_tensor_can_replace_is_refused(store, load):
    message = r"^model\.2\.stored differs between trials: .{1,80}$"
    recipes = [{"factor": 1.0}, {"factor": 2.0}]
    assert_not_stackable(message, *recipes, make=partial(scaled, store, load))


def test_equal_objects_are_no_difference():
    class Cyclic:
        def __init__(self):
            self.own = self
            self.parts = {"names": ("".join(["a", "b"]), 0.5), "function": lambda: self}

    def store(factor):
        return [Cyclic(), partial(max, 1)]

    recipes = [scaled(store, lambda module: 1.0, 1.0) for _ in range(2)]
    assert together(*recipes)[1] == [None, None]


class DroppedShare(nn.Module):
    """The first output is the share of numbers that dropout has set to zero."""

    def __init__(self, p):
        super().__init__()
        self.dropout = nn.Dropout(p)
        self.last = nn.Linear(1, 3, bias=False).double()

    def forward(self, inputs):
        ones = torch.ones(len(inputs), 400, dtype=inputs.dtype)
        share = (self.dropout(ones) == 0).double().mean(1)
        outputs = torch.stack([share, inputs[:, 0], inputs[:, 1]], 1)
        return self.last.weight.sum() * 0 + outputs


class DroppedSum(fw.Metric):
    name = "dropped"
    targets = ("class",)

    def sums(self, outputs, targets):
        return outputs[:, 0].sum().reshape(1)

    def compute(self, sums):
        return float(sums[0])


def test_dropout_rates_may_differ_and_each_trial_has_its_own_masks():
    recipes = [trial(model=DroppedShare(p), max_epochs=2) for p in (0.2, 0.2, 0.7)]
    for trainer, fit in recipes:
        trainer.metrics = fit["metrics"] = [DroppedSum()]
    trained, _ = together(*recipes)
    dropped = []
    for trainer in trained:
        values = [line[2] for line in trainer.recorder.lines]
        dropped.append([each["train/dropped"] for each in values if "train/dropped" in each])
        assert {each["val/dropped"] for each in values if "val/dropped" in each} == {0}
    assert dropped[0] != dropped[1]
    samples = 140  # two epochs
    for values, p in zip(dropped, (0.2, 0.2, 0.7), strict=True):
        assert sum(values) / samples == pytest.approx(p, abs=0.02)


class StopsAt(Callback):
    changes_training = False

    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            trainer.state.stop = "enough"


def test_a_trial_that_is_done_leaves_and_the_others_go_on():
    trained = assert_stacked_as_alone(
        {"seed": 1, "max_epochs": 3},
        {"seed": 2, "callbacks": [StopsAt(7)]},
        {"seed": 3, "callbacks": [StopsAt(500)]},
        {"seed": 4, "callbacks": [StopsAt(500)], "lr": 2.0},
        make=lambda callbacks=(), **recipe: trial(callbacks=callbacks or [StopsAt(500)], **recipe),
    )
    assert [trainer.state.step for trainer in trained] == [9, 7, 102, 102]


def test_the_last_trials_may_end_together_within_an_epoch():
    assert_stacked_as_alone({"seed": 1}, {"seed": 2}, callbacks=[StopsAt(7)])


class Fails(Callback):
    changes_training = False

    def on_epoch_end(self, trainer):
        if trainer.state.epoch == 2 and trainer.seed == 3:
            raise RuntimeError("a fault of this trial")


def test_a_trial_that_fails_or_diverges_does_not_change_the_others():
    def make(seed):
        callbacks = [fw.callbacks.build("non_finite"), Fails()]
        lr = 1e308 if seed == 2 else 1.0
        return trial(seed, lr, OPTIMIZERS[0], callbacks)

    trained, errors = together(*map(make, (1, 2, 3, 4)))
    names = [type(error).__name__ for error in errors]
    assert names == ["NoneType", "Diverged", "RuntimeError", "NoneType"]
    assert "non_finite: the loss is" in str(errors[1])
    assert_same(trained[0], alone(make(1)))
    assert_same(trained[3], alone(make(4)))


def resumed(recipe, state):
    trainer, fit = trial(**recipe)
    return trainer, fit | {"resume": copy.deepcopy(state)}


def test_trials_resume_alone_and_as_one():
    recipes = [{"seed": 1}, {"seed": 2, "lr": 0.5}]
    half, _ = together(*[trial(**recipe, max_epochs=5) for recipe in recipes])
    states = [copy.deepcopy(trainer.state_dict()) for trainer in half]
    expected = [alone(trial(**recipe)).model.state_dict() for recipe in recipes]
    single = alone(resumed(recipes[1], states[1]))
    stacked, _ = together(*map(resumed, recipes, states))
    for trainer, weights in zip([*stacked, single], [*expected, expected[1]], strict=True):
        for name, tensor in trainer.model.state_dict().items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-10)


class ReadsValues(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs if inputs.sum() > 0 else -inputs)


def reading(seed):
    return trial(seed, model=ReadsValues(6, 3).double())


def with_metric(k):
    trainer, fit = trial()
    return trainer, fit | {"metrics": [fw.metrics.build("top_k", k=k)]}


def skipping():
    return trial(callbacks=[fw.callbacks.build("non_finite", policy="skip")])


@pytest.mark.parametrize(
    ("makers", "reason"),
    [
        ([partial(reading, 0), partial(reading, 1)], "data-dependent control flow"),
        (
            [partial(trial, optimizer=("muon", {"lr": 0.1}))] * 2,
            "Muon has no update for stacked trials",
        ),
        ([trial, lambda: trial(model=nn.Linear(6, 3).double())], "model.* differs"),
        ([skipping, trial], "NonFinite works with a single trial"),
        ([trial, partial(trial, optimizer=OPTIMIZERS[0])], "optimizers, .* differ"),
        ([partial(trial, log_every="1epoch"), trial], "log_every"),
        ([partial(with_metric, 1), partial(with_metric, 2)], "metrics differ"),
    ],
    ids=["control flow", "optimizer", "model", "callback", "optimizers", "log_every", "metrics"],
)
def test_the_reason_why_trials_cannot_be_stacked_is_named(makers, reason):
    recipes = [{"maker": maker} for maker in makers]
    assert_not_stackable(reason, *recipes, make=lambda maker: maker())


def test_an_update_without_any_trial_does_nothing():
    """All trials of a step may be left out, on any device."""
    state = SimpleNamespace(weights=torch.empty(2, 3, device="meta"))
    update = pure_update(lambda *arguments: pytest.fail("no rows to update"))
    update(state, [{}, {}], [], GroupSlot(slice(0, 3), 0, 1))


# resumed runs that are stopped before their first step


class Stop(Callback):
    """Stops a run as a signal does: after a step, or before the first one."""

    changes_training = False

    def __init__(self, step=None):
        self.step = step

    def on_fit_start(self, trainer):
        if self.step is None:
            trainer.stop("signal", "SIGINT", signal.SIGINT)

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            trainer.stop("signal", "SIGTERM", signal.SIGTERM)


STATEFUL = [
    "ema",
    "swa",
    "early_stop",
    "clip_gradients",
    "gradient_norm",
    "health",
    "non_finite",
    "freeze",
    "accumulation",
    "sam",
]
VARIANTS = {name: {"callbacks": [name]} for name in STATEFUL} | {
    "plain": {},
    "momentum": {"optimizer": OPTIMIZERS[1]},
    "fused": {"optimizer": OPTIMIZERS[4]},
    "plateau": {"schedule": "reduce_on_plateau"},
    "accumulate": {"accumulate": 2},
    "half": {"precision": "bf16"},
}
CALLBACK_SETTINGS = {
    "freeze": {"patterns": ["0.*"]},
    "accumulation": {"schedule": {"0": 2}},
    "swa": {"start": 1},
}
SINGLE = ("swa", "freeze", "accumulation", "sam")  # callbacks that work with a single trial only


def stopped_trial(variant, seed, step, resume=None):
    """Return a trial that stops after a step, or without one before the first step."""
    settings = {"log_every": "7steps"} | VARIANTS[variant]
    callbacks = [Stop(step)]
    for name in settings.pop("callbacks", []):
        callbacks.insert(0, fw.callbacks.build(name, **CALLBACK_SETTINGS.get(name, {})))
    if "schedule" in settings:
        settings["schedule"] = fw.schedulers.build(settings["schedule"], total_steps=100)
    trainer, fit = trial(seed, callbacks=callbacks, **settings)
    fit["resume"] = copy.deepcopy(resume)
    return trainer, fit


def comparable(state):
    """Return a state that == can compare, without times."""
    if isinstance(state, torch.Tensor):
        return state.dtype, state.tolist()
    if isinstance(state, dict):
        times = ("wall_seconds", "train/samples_per_second")
        return {key: comparable(value) for key, value in state.items() if key not in times}
    if isinstance(state, list | tuple):
        return list(map(comparable, state))
    return state


def fit_alone(recipes):
    return [alone(recipe).state_dict() for recipe in recipes]


def fit_together(recipes):
    trainers, errors = together(*recipes)
    assert errors == [None] * len(recipes)
    return [trainer.state_dict() for trainer in trainers]


def check_stopped_resume(fit, variant):
    before = fit([stopped_trial(variant, seed, 8) for seed in (0, 1)])
    after = fit([stopped_trial(variant, seed, None, before[seed]) for seed in (0, 1)])
    assert [state["counters"]["step"] for state in before] == [8, 8]
    assert comparable(after) == comparable(before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_trial_stopped_before_its_first_step_changes_nothing(variant):
    check_stopped_resume(fit_alone, variant)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in SINGLE])
def test_resumed_stacked_trials_stopped_before_their_first_step_change_nothing(variant):
    check_stopped_resume(fit_together, variant)


def test_sums_that_ignore_those_of_the_checkpoint_fail_the_check(monkeypatch):
    """A control: the sums come from a checkpoint, and those of all trials are still empty."""

    def sum_up(self):
        if self.stacked is None:
            return
        _, sums, _ = self.stacked.take(self.row)
        if self.sums:
            sums = [total + new for total, new in zip(self.sums, sums, strict=True)]
        self.sums = sums

    monkeypatch.setattr(TrialMeasures, "_sum_up", sum_up)
    with pytest.raises(ValueError, match="zip"):
        check_stopped_resume(fit_together, "plain")


class EventRecorder(Callback):
    """Records all events with their steps; raises an error at the end of a step."""

    alone = False

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.events = []

    def receive(self, trainer, event):
        self.events.append((trainer.state.step, event))
        if event == "step_done" and trainer.state.step == self.fails_at:
            raise ValueError("at the end of a step")


for each in EVENTS:
    setattr(EventRecorder, f"on_{each}", partialmethod(EventRecorder.receive, event=each))

NOT_EMITTED_FOR_STACKED_TRIALS = set()
"""Events of single trials that cannot apply to stacked ones, each with its reason: none so far."""


@pytest.mark.parametrize("fails_at", [None, 4])
def test_stacked_trials_emit_the_events_of_a_single_trial(fails_at):
    """`training/step.py` and `tuning/vectorized/trainer.py` have a training step each."""
    single = EventRecorder(fails_at)
    failure = nullcontext()
    if fails_at is not None:
        failure = pytest.raises(ValueError, match="end of a step")
    with failure:
        alone(trial(callbacks=[single], max_epochs=2))
    stacked = EventRecorder(fails_at)
    other = EventRecorder()
    _, errors = together(
        trial(0, callbacks=[stacked], max_epochs=2), trial(1, callbacks=[other], max_epochs=2)
    )
    assert [isinstance(error, ValueError) for error in errors] == [fails_at is not None, False]

    emitted = {event for _, event in single.events}
    missing = {"exception"} if fails_at is None else {"train_end", "fit_end"}
    assert emitted == set(EVENTS) - missing
    expected = [each for each in single.events if each[1] not in NOT_EMITTED_FOR_STACKED_TRIALS]
    assert stacked.events == expected
