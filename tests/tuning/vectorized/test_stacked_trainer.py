"""Trials that train as one: each comes out as it would alone."""

import copy
import signal
from functools import partial

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback
from framework.training.acceleration import cuda_graph
from framework.tuning.vectorized.stacked_forward import RowMeasures
from framework.tuning.vectorized.stacked_update import NotStackable
from framework.tuning.vectorized.trainer import StackedTrainer
from stacked import OPTIMIZERS, alone, assert_same, network, together, trial

fw.discover()


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_each_trial_comes_out_as_alone(optimizer):
    recipes = [{"seed": 0, "lr": 1.0}, {"seed": 0, "lr": 0.3}, {"seed": 0, "lr": 2.0}]
    trained, outcomes = together(*(trial(optimizer=optimizer, **recipe) for recipe in recipes))
    assert outcomes == [None] * 3
    for trainer, recipe in zip(trained, recipes, strict=True):
        assert_same(trainer, alone(trial(optimizer=optimizer, **recipe)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_on_a_gpu_each_trial_comes_out_as_alone(optimizer):
    def made(seed, **more):
        watching = [
            fw.callbacks.build("non_finite"),
            fw.callbacks.build("ema"),
            StopsAt(7 if seed == 2 else 500),
        ]
        return trial(
            seed, optimizer=optimizer, callbacks=watching, max_epochs=5, device="cuda", **more
        )

    trained, outcomes = together(made(1), made(2), made(3), made(4, lr=1e308))
    assert [type(outcome).__name__ for outcome in outcomes] == ["NoneType"] * 3 + ["Diverged"]
    assert all(parameter.isfinite().all() for parameter in trained[3].model.parameters())
    for trainer, seed in zip(trained[:3], (1, 2, 3), strict=True):
        assert_same(trainer, alone(made(seed)))


def test_each_seed_has_its_own_weights_and_order():
    recipes = [{"seed": 1}, {"seed": 2}, {"seed": 3, "lr": 0.5}]
    trained, _ = together(*(trial(**recipe) for recipe in recipes))
    for trainer, recipe in zip(trained, recipes, strict=True):
        assert_same(trainer, alone(trial(**recipe)))


def test_what_all_trials_do_may_be_replayed_as_a_graph(monkeypatch):
    """On a CUDA device; here a stand-in does what was recorded again, into the tensors of the first time."""

    class Again:
        def __init__(self, run):
            self.run, self.made = run, run()

        def replay(self):
            for old, new in zip(self.made[:3], self.run()[:3], strict=True):
                old.detach().copy_(new)

    monkeypatch.setattr(cuda_graph, "side_stream", torch.enable_grad)
    monkeypatch.setattr(cuda_graph, "record", lambda run: (again := Again(run), again.made))
    recipes = [
        {"seed": 0, "max_epochs": 34},
        {"seed": 1, "max_epochs": 20},
        {"seed": 2, "max_epochs": 34},
    ]
    made = [trial(**recipe) for recipe in recipes]
    for trainer, _ in made:
        trainer.cuda_graph = "on"  # which on a CPU is off
    outcomes = {}
    stacked = StackedTrainer([t for t, _ in made], [fit for _, fit in made], outcomes.__setitem__)
    stacked.run()
    assert outcomes == {0: None, 1: None, 2: None}
    assert sum(stacked.graphed.seen.values()) == 102
    assert len(stacked.graphed.seen) == 4, "two sizes of batch, for three trials and for two"
    for (trainer, _), recipe in zip(made, recipes, strict=True):
        assert_same(trainer, alone(trial(**recipe)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedules_clipping_and_averages_are_each_trials_own(accumulate):
    def recipe(number):
        callbacks = [
            fw.callbacks.build("clip_gradients", norm=0.1 * number),
            fw.callbacks.build("ema", decay=0.8),
        ]
        callbacks += [fw.callbacks.build("non_finite"), fw.callbacks.build("gradient_norm")]
        schedule = fw.schedulers.build("cosine", 40 * number)
        return {
            "lr": number,
            "callbacks": callbacks,
            "schedule": schedule,
            "accumulate": accumulate,
            "max_epochs": 9,
        }

    trained, outcomes = together(*(trial(**recipe(number)) for number in (1, 2, 3)))
    assert outcomes == [None] * 3
    for trainer, number in zip(trained, (1, 2, 3), strict=True):
        assert_same(trainer, alone(trial(**recipe(number))))


def test_batch_norms_keep_the_statistics_of_their_trial():
    plain = {"optimizer": OPTIMIZERS[1], "max_epochs": 5}
    recipes = [(seed, {"model": network(seed, norm=True), "seed": seed} | plain) for seed in (1, 2)]
    trained, _ = together(*(trial(**recipe) for _, recipe in recipes))
    for trainer, (seed, recipe) in zip(trained, recipes, strict=True):
        assert_same(trainer, alone(trial(**(recipe | {"model": network(seed, norm=True)}))))


def smoothed(smoothing):
    return lambda: fw.losses.build("cross_entropy", label_smoothing=smoothing)


def test_the_smoothing_of_labels_may_differ():
    recipes = [{"loss": smoothed(smoothing), "max_epochs": 9} for smoothing in (0.0, 0.1, 0.5)]
    trained, _ = together(*(trial(**recipe) for recipe in recipes))
    for trainer, recipe in zip(trained, recipes, strict=True):
        assert_same(trainer, alone(trial(**recipe)))


def weighted(weight, smoothing=0.0, ignored=None):
    return lambda: fw.losses.build(
        "cross_entropy", weight=weight, label_smoothing=smoothing, ignore_index=ignored
    ).double()


@pytest.mark.parametrize("seeds", [(0, 0, 0), (1, 2, 3)], ids=["one order", "an order each"])
@pytest.mark.parametrize("more", [{}, {"smoothing": 0.1}, {"ignored": 1}], ids=str)
def test_the_weights_of_classes_may_differ(seeds, more):
    """A mean is over the weights of the targets, so each trial's batches count differently, the last one most."""
    weights = ([1.0, 1.0, 1.0], [1.0, 2.0, 5.0], [0.5, 0.1, 3.0])
    recipes = [
        {"seed": seed, "loss": weighted(weight, **more), "max_epochs": 4}
        for seed, weight in zip(seeds, weights, strict=True)
    ]
    trained, _ = together(*(trial(**recipe) for recipe in recipes))
    for trainer, recipe in zip(trained, recipes, strict=True):
        assert_same(trainer, alone(trial(**recipe)))


def test_other_tensors_and_numbers_of_a_loss_may_differ():
    losses = [
        ("focal", {"gamma": 2.0, "alpha": [0.2, 0.5, 0.3]}),
        ("focal", {"gamma": 0.5, "alpha": [1.0, 0.1, 0.1]}),
    ]
    recipes = [
        {"loss": lambda a=a, b=b: fw.losses.build(a, **b).double(), "max_epochs": 4}
        for a, b in losses
    ]
    trained, _ = together(*(trial(**recipe) for recipe in recipes))
    for trainer, recipe in zip(trained, recipes, strict=True):
        assert_same(trainer, alone(trial(**recipe)))


def test_the_weights_of_goals_may_differ_and_each_goal_is_logged():
    def recipe(reconstruction):
        torch.manual_seed(0)
        goals = {"reconstruction": reconstruction, "loss": lambda: nn.CrossEntropyLoss()}
        return {
            "model": nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3 + 6)).double(),
            "task": lambda: fw.tasks.build("multi_task", **goals),
            "max_epochs": 4 if reconstruction else 2,
        }

    weights = (0.0, 1.0, 7.0)
    trained, _ = together(*(trial(**recipe(weight)) for weight in weights))
    for trainer, weight in zip(trained, weights, strict=True):
        assert_same(trainer, alone(trial(**recipe(weight))))
        assert any("val/reconstruction" in values for _, _, values in trainer.recorder.lines)


class Scales(nn.Module):
    """Scales by a number that `keep` puts away, and that `found` finds there."""

    def __init__(self, keep, found, by):
        super().__init__()
        self.kept, self._hidden, self.found = keep(by), by, found

    def forward(self, inputs):
        return inputs * self.found(self)


class Thing:
    def __init__(self, number):
        self.number = number


def scaled(keep, found, by):
    model = network()
    model.insert(2, Scales(keep, found, by))
    return model


KEPT = {
    "hidden": (lambda by: None, lambda module: module._hidden),
    "in a dict": (lambda by: {"by": by}, lambda module: module.kept["by"]),
    "in a list of dicts": (lambda by: [1, {"by": by}], lambda module: module.kept[1]["by"]),
}


@pytest.mark.parametrize("way", KEPT)
def test_numbers_may_differ_wherever_a_module_keeps_them(way):
    recipes = [
        lambda by=by: {"model": scaled(*KEPT[way], by), "max_epochs": 4} for by in (0.5, 2.0)
    ]
    trained, _ = together(*(trial(**recipe()) for recipe in recipes))
    for trainer, recipe in zip(trained, recipes, strict=True):
        assert_same(trainer, alone(trial(**recipe())))


@pytest.mark.parametrize(
    ("keep", "found"),
    [
        (lambda by: lambda: by, lambda module: module.kept()),
        (lambda by: partial(float, by), lambda module: module.kept()),
        (lambda by: (by, 1), lambda module: module.kept[0]),
        (Thing, lambda module: module.kept.number),
        (lambda by: torch.tensor(by), lambda module: module.kept),
        (
            lambda by: torch.Generator().manual_seed(int(by)),
            lambda module: module.kept.initial_seed(),
        ),
    ],
    ids=["closure", "partial", "tuple", "object", "tensor", "generator"],
)
def test_what_differs_where_no_tensor_can_be_put_is_refused(keep, found):
    with pytest.raises(NotStackable, match=r"^model\.2\.kept is not the same: .{1,80}$"):
        together(*(trial(model=scaled(keep, found, by)) for by in (1.0, 2.0)))


def test_what_is_alike_but_not_the_same_is_no_difference():
    class Thing:
        def __init__(self):
            self.own, self.parts = self, {"names": ("".join(["a", "b"]), 0.5), "f": lambda: self}

    made = [
        trial(model=scaled(lambda by: [Thing(), partial(max, 1)], lambda module: 1.0, 1.0))
        for _ in range(2)
    ]
    assert together(*made)[1] == [None, None]


def test_dropout_rates_may_differ_and_each_trial_drops_its_own():
    class Shares(nn.Module):
        """A model whose outputs are the shares of its dropped inputs."""

        def __init__(self, p):
            super().__init__()
            self.dropout, self.last = nn.Dropout(p), nn.Linear(1, 3, bias=False).double()

        def forward(self, inputs):
            dropped = (
                (self.dropout(torch.ones(len(inputs), 400, dtype=inputs.dtype)) == 0)
                .double()
                .mean(1)
            )
            return self.last.weight.sum() * 0 + torch.stack(
                [dropped, inputs[:, 0], inputs[:, 1]], 1
            )

    class Keep(fw.Metric):
        name, targets = "kept", ("class",)

        def sums(self, outputs, targets):
            return outputs[:, 0].sum().reshape(1)

        def compute(self, sums):
            return float(sums[0])

    recipes = [trial(model=Shares(p), max_epochs=2) for p in (0.2, 0.2, 0.7)]
    for trainer, fit in recipes:
        trainer.metrics = fit["metrics"] = [Keep()]
    trained, _ = together(*recipes)
    lines = [
        [values for _, _, values in trainer.recorder.lines if "train/kept" in values]
        for trainer in trained
    ]
    first, second, third = ([values["train/kept"] for values in each] for each in lines)
    assert first != second  # masks of their own
    assert sum(first) / 140 == pytest.approx(0.2, abs=0.02)  # 2 epochs of 70 samples
    assert sum(second) / 140 == pytest.approx(0.2, abs=0.02)
    assert sum(third) / 140 == pytest.approx(0.7, abs=0.02)
    assert all(
        line[2]["val/kept"] == 0 for line in trained[2].recorder.lines if "val/kept" in line[2]
    )


class StopsAt(Callback):
    changes_training = False

    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer):
        if trainer.state.step == self.step:
            trainer.state.stop = "enough"


def test_a_trial_that_is_done_leaves_and_the_others_go_on():
    stops = [{"callbacks": [StopsAt(step)]} for step in (500, 7, 500, 500)]
    recipes = [{"seed": 1, "max_epochs": 3}, {"seed": 2}, {"seed": 3}, {"seed": 4, "lr": 2.0}]
    recipes = [recipe | stop for recipe, stop in zip(recipes, stops, strict=True)]
    trained, outcomes = together(*(trial(**recipe) for recipe in recipes))
    assert outcomes == [None] * 4
    assert [trainer.state.step for trainer in trained] == [9, 7, 102, 102]
    for trainer, recipe in zip(trained, recipes, strict=True):
        assert_same(trainer, alone(trial(**recipe)))


def test_the_last_trials_may_all_be_done_within_an_epoch():
    recipes = [{"seed": seed, "callbacks": [StopsAt(7)]} for seed in (1, 2)]
    trained, outcomes = together(*(trial(**recipe) for recipe in recipes))
    assert outcomes == [None] * 2
    for trainer, recipe in zip(trained, recipes, strict=True):
        assert_same(trainer, alone(trial(**recipe)))


class Fails(Callback):
    changes_training = False

    def on_epoch_end(self, trainer):
        if trainer.state.epoch == 2 and trainer.seed == 3:
            raise RuntimeError("a fault of this trial")


def test_a_trial_that_fails_or_diverges_leaves_the_others_alone():
    recipes = [
        {"seed": seed, "callbacks": [fw.callbacks.build("non_finite"), Fails()]}
        for seed in (1, 2, 3, 4)
    ]
    recipes[1]["lr"] = 1e308
    trained, outcomes = together(*(trial(optimizer=OPTIMIZERS[0], **recipe) for recipe in recipes))
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "NoneType",
        "Diverged",
        "RuntimeError",
        "NoneType",
    ]
    assert "non_finite: the loss is" in str(outcomes[1])
    for number in (0, 3):
        assert_same(trained[number], alone(trial(optimizer=OPTIMIZERS[0], **recipes[number])))


def test_a_trial_can_go_on_alone_and_trials_can_go_on_together():
    recipes = [{"seed": 1}, {"seed": 2, "lr": 0.5}]
    half, _ = together(*(trial(**recipe, max_epochs=5) for recipe in recipes))
    saved = [copy.deepcopy(trainer.state_dict()) for trainer in half]
    expected = [alone(trial(**recipe)).model.state_dict() for recipe in recipes]
    one = trial(**recipes[1])
    one[1]["resume"] = copy.deepcopy(saved[1])
    for name, tensor in alone(one).model.state_dict().items():
        torch.testing.assert_close(tensor, expected[1][name], rtol=0, atol=1e-10)
    again = [trial(**recipe) for recipe in recipes]
    for (_, fit), state in zip(again, saved, strict=True):
        fit["resume"] = state
    for trainer, weights in zip(together(*again)[0], expected, strict=True):
        for name, tensor in trainer.model.state_dict().items():
            torch.testing.assert_close(tensor, weights[name], rtol=0, atol=1e-10)


def measured_by(metric):
    trainer, fit = trial()
    return trainer, fit | {"metrics": [metric]}


def test_what_cannot_be_done_for_many_at_once_is_named():
    class Reads(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs if inputs.sum() > 0 else -inputs)

    cases = [
        (
            [trial(seed, model=Reads(6, 3).double()) for seed in range(2)],
            "data-dependent control flow",
        ),
        ([trial(optimizer=("muon", {"lr": 0.1})) for _ in range(2)], "Muon has no pure update"),
        ([trial(), trial(model=nn.Linear(6, 3).double())], "model.* is not the same"),
        (
            [trial(callbacks=[fw.callbacks.build("non_finite", policy="skip")]), trial()],
            "NonFinite works with a trial",
        ),
        ([trial(), trial(optimizer=OPTIMIZERS[0])], "optimizer is not the same"),
        ([trial(log_every="1epoch"), trial()], "log_every"),
        (
            [measured_by(fw.metrics.build("top_k", k=k)) for k in (1, 2)],
            "their metrics are not the same",
        ),
    ]
    for recipes, why in cases:
        with pytest.raises(NotStackable, match=why):
            together(*recipes)


# stopped before the first step of a resume


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
    "non_finite",
    "freeze",
    "accumulation",
    "sam",
]
RESUMED = {name: {"callbacks": [name]} for name in STATEFUL} | {
    "plain": {},
    "momentum": {"optimizer": OPTIMIZERS[1]},
    "fused": {"optimizer": OPTIMIZERS[4]},
    "plateau": {"schedule": "reduce_on_plateau"},
    "accumulate": {"accumulate": 2},
    "half": {"precision": "bf16"},
}
SETTINGS = {
    "freeze": {"patterns": ["0.*"]},
    "accumulation": {"schedule": {"0": 2}},
    "swa": {"start": 1},
}
ALONE = ("swa", "freeze", "accumulation", "sam")  # they work with a trial of its own


def resumed_recipe(twist, seed, step, resume=None):
    settings = dict(RESUMED[twist])
    made = [
        fw.callbacks.build(name, **SETTINGS.get(name, {})) for name in settings.pop("callbacks", [])
    ]
    if "schedule" in settings:
        settings["schedule"] = fw.schedulers.build(settings["schedule"], total_steps=100)
    trainer, fit = trial(
        seed, callbacks=[*made, Stop(step)], **(settings | {"log_every": "7steps"})
    )
    fit["resume"] = resume
    return trainer, fit


def comparable(state):
    """A state as something that == compares; times apart."""
    if isinstance(state, torch.Tensor):
        return state.dtype, state.tolist()
    if isinstance(state, dict):
        times = ("wall_seconds", "train/samples_per_second")
        return {key: comparable(value) for key, value in state.items() if key not in times}
    return [comparable(value) for value in state] if isinstance(state, list | tuple) else state


def fit_all(fits, recipes):
    """Fit trials one by one or together; returns their states."""
    if fits is alone:
        return [alone(recipe).state_dict() for recipe in recipes]
    trainers, errors = together(*recipes)
    assert errors == [None] * len(recipes)
    return [trainer.state_dict() for trainer in trainers]


def check_stopped_resume(fits, twist):
    before = fit_all(fits, [resumed_recipe(twist, seed, 8) for seed in (0, 1)])
    after = fit_all(
        fits, [resumed_recipe(twist, seed, None, copy.deepcopy(before[seed])) for seed in (0, 1)]
    )
    assert [state["counters"]["step"] for state in before] == [8, 8]
    assert comparable(after) == comparable(before)


@pytest.mark.parametrize("twist", RESUMED)
def test_a_resume_that_is_stopped_before_its_first_step_changes_nothing(twist):
    check_stopped_resume(alone, twist)


@pytest.mark.parametrize("twist", [twist for twist in RESUMED if twist not in ALONE])
def test_so_it_is_with_trials_that_train_as_one(twist):
    check_stopped_resume(together, twist)


def test_sums_that_are_added_to_an_empty_list_are_no_such_resume(monkeypatch):
    """A control: the sums come from a checkpoint, and those of all trials have not begun."""

    def sum_up(self):
        if self.all is None:
            return
        self.all.sum_up()
        mine = [each[self.row].clone() for each in self.all.sums]
        self.sums = [a + b for a, b in zip(self.sums, mine, strict=True)] if self.sums else mine

    monkeypatch.setattr(RowMeasures, "_sum_up", sum_up)
    with pytest.raises(ValueError, match="zip"):
        check_stopped_resume(together, "plain")
