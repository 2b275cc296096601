"""Settings that change when a run resumes: they take effect, or they are refused."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import framework as fw
from framework import TensorSplit, Trainer
from framework.contracts.callback import follows_metrics
from framework.data.dataset import Loader
from framework.errors import RunError, SettingError
from framework.experiment.experiment import Experiment, train
from framework.experiment.resumption.config_changes import (
    compare_configs,
    keeps_bits,
    observed_changes,
)
from framework.experiment.resumption.resume_overrides import apply_overrides
from framework.runs.checkpoint import listed, load
from runs import composed, logged

SMALL = [
    "model.width=8",
    "model.depth=1",
    "trainer.max_steps=3",
    "callbacks=[checkpoint]",
    "loggers=[json_lines]",
]
INPUTS = torch.linspace(-1, 1, 24).reshape(12, 2)
TARGETS = INPUTS.sum(1, keepdim=True)
SPLIT = TensorSplit(INPUTS, TARGETS)
LOSS = nn.MSELoss()


def spec_of(*overrides):
    return composed([*SMALL, *overrides])


def train_run(*overrides, **more):
    """Train, and return the result and the printed lines."""
    messages = []
    return train(
        spec_of("run.name=a", *overrides), "default", [], say=messages.append, **more
    ), messages


@pytest.fixture(autouse=True)
def _in_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))


def halving(step):
    return 0.5**step


def groups_of(model, rates):
    """Return a group for each layer, with the settings in `rates`."""
    layers = [model[0], model[2]]
    return [
        {"params": list(layer.parameters()), **own}
        for layer, own in zip(layers, rates, strict=True)
    ]


def settings_of(group):
    """Return the settings of a group of parameters."""
    return {name: value for name, value in group.items() if name != "params"}


class Groups(fw.Callback):
    """Keeps the settings of the groups after each step."""

    changes_training = False

    def __init__(self):
        self.seen = []

    def on_step_end(self, trainer):
        self.seen.append([settings_of(group) for group in trainer.optimizer.param_groups])


class LogMae(fw.Callback):
    changes_training = False

    def on_validation_end(self, trainer):
        trainer.log({"val/mae": 5.0})


def fit(model, optimizer, steps, *callbacks, **more):
    """Fit with batches of all samples, so that a plain loop sees the same."""
    trainer = Trainer(max_steps=steps, callbacks=callbacks, device="cpu")
    trainer.fit(model, SPLIT, task=LOSS, optimizer=optimizer, batch_size=12, **more)
    return trainer


def loop(model, optimizer, steps, factor=None):
    """Do the same steps in plain PyTorch."""
    base = [group["lr"] for group in optimizer.param_groups]
    order = fw.seeds.order
    for step in steps:
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * factor(step) if factor else rate
        rows = order(0, step, 12)
        LOSS(model(INPUTS[rows]), TARGETS[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = rate


OPTIMIZER_CHANGES = [
    ("sgd", {"lr": 0.1, "momentum": 0.5}, {"lr": 0.01, "momentum": 0.9, "dampening": 0.1}),
    ("sgd", {"lr": 0.1}, {"momentum": 0.9, "weight_decay": 0.1}),
    ("adam", {"lr": 0.1}, {"lr": 0.3, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.5}),
    ("adamw", {"lr": 0.1}, {"lr": 0.3, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.5}),
    ("adamw", {"lr": 0.1, "amsgrad": True}, {"amsgrad": False}),
    ("adamw", {"lr": 0.1, "fused": True}, {"fused": False, "foreach": True}),
    ("adamw", {"lr": 0.1, "fused": False}, {"fused": True, "lr": 0.2}),
    ("rmsprop", {"lr": 0.1, "momentum": 0.5}, {"alpha": 0.5, "momentum": 0.9}),
    ("adagrad", {"lr": 0.1}, {"lr_decay": 0.5, "lr": 0.2}),
    ("adadelta", {"lr": 0.1}, {"rho": 0.5}),
    ("adamax", {"lr": 0.1}, {"betas": (0.5, 0.6)}),
    ("nadam", {"lr": 0.1}, {"momentum_decay": 0.1}),
    ("radam", {"lr": 0.1}, {"weight_decay": 0.1}),
    ("rprop", {"lr": 0.1}, {"etas": (0.4, 1.3)}),
    ("asgd", {"lr": 0.1}, {"alpha": 0.5}),
    ("lion", {"lr": 0.1}, {"betas": (0.5, 0.6), "lr": 0.01}),
    ("muon", {"lr": 0.1}, {"lr": 0.01, "momentum": 0.5}),
]
KINDS = {"lion": "Lion", "muon": "Muon"}


@pytest.mark.parametrize("factor", [None, halving], ids=["", "schedule"])
@pytest.mark.parametrize(("name", "first", "then"), OPTIMIZER_CHANGES)
def test_changed_optimizer_settings_take_effect(name, first, then, factor):
    make = fw.optimizers.get(name).part
    model = network()
    trainer = fit(model, make(model.parameters(), **first), 2, schedule=factor)
    saved = copy.deepcopy(trainer.state_dict())
    resumed = network()
    seen = Groups()
    fit(resumed, make(resumed.parameters(), **first | then), 3, seen, schedule=factor, resume=saved)

    expected = network()
    optimizer = make(expected.parameters(), **first)
    loop(expected, optimizer, range(2), factor)
    optimizer.param_groups[0].update(then)
    loop(expected, optimizer, range(2, 3), factor)
    for one, other in zip(resumed.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)

    new = network()
    fresh = Groups()
    fit(new, make(new.parameters(), **first | then), 3, fresh, schedule=factor)
    assert seen.seen == fresh.seen[2:]


def test_changed_rate_of_one_group_takes_effect():
    model = network()
    resumed = network()
    trainer = fit(
        model, torch.optim.SGD(groups_of(model, [{"lr": 0.1}, {"lr": 0.2}])), 2, schedule=halving
    )
    optimizer = torch.optim.SGD(groups_of(resumed, [{"lr": 0.1}, {"lr": 0.02}]))
    seen = Groups()
    fit(resumed, optimizer, 3, seen, schedule=halving, resume=trainer.state_dict())
    assert [group["lr"] for group in seen.seen[0]] == pytest.approx([0.1 / 4, 0.02 / 4])


class Decay(fw.Callback):
    """Changes a setting of the groups during the run."""

    def on_step_end(self, trainer):
        for group in trainer.optimizer.param_groups:
            group["weight_decay"] += 0.1
            group["lr"] *= 0.9


@pytest.mark.parametrize(
    "changed", [{}, {"momentum": 0.5}], ids=["exact", "another setting changed"]
)
def test_settings_changed_by_a_callback_are_restored(changed):
    uninterrupted = network()
    half = network()
    rest = network()
    make = torch.optim.SGD
    fit(uninterrupted, make(uninterrupted.parameters(), lr=0.1, momentum=0.9), 4, Decay())
    trainer = fit(half, make(half.parameters(), lr=0.1, momentum=0.9), 2, Decay())
    seen = Groups()
    settings = {"lr": 0.1, "momentum": 0.9} | changed
    fit(rest, make(rest.parameters(), **settings), 4, seen, Decay(), resume=trainer.state_dict())
    assert seen.seen[0][0]["weight_decay"] == pytest.approx(0.2)
    assert seen.seen[0][0]["lr"] == pytest.approx(0.1 * 0.9**2)
    same = [
        torch.equal(one, other)
        for one, other in zip(uninterrupted.parameters(), rest.parameters(), strict=True)
    ]
    assert all(same) is not bool(changed)


def test_resume_with_the_optimizer_of_an_earlier_fit():
    uninterrupted = network()
    model = network()
    fit(uninterrupted, torch.optim.SGD(uninterrupted.parameters(), lr=0.1), 4, Decay())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(max_steps=2, callbacks=[Decay()], device="cpu")
    arguments = {"task": LOSS, "optimizer": optimizer, "batch_size": 12}
    trainer.fit(model, SPLIT, **arguments)
    saved = trainer.state_dict()
    trainer.max_steps = 3
    trainer.fit(model, SPLIT, resume=saved, **arguments)
    trainer.max_steps = 4
    trainer.fit(model, SPLIT, resume=saved, **arguments)
    assert all(
        torch.equal(one, other)
        for one, other in zip(uninterrupted.parameters(), model.parameters(), strict=True)
    )


def test_best_value_is_dropped_when_the_monitor_changes():
    old, new = (
        fw.schedulers.build("plateau", 9, monitor=name, patience=0)
        for name in ("val/loss", "val/mae")
    )
    old.observe({"val/loss": 0.1})
    new.load_state_dict(old.state_dict())
    new.observe({"val/mae": 5.0})
    assert (new.best, new(0)) == (5.0, 1.0)
    stop, other = (
        fw.callbacks.build("early_stop", monitor=name, mode="min")
        for name in ("val/loss", "val/mae")
    )
    stop.best.ranked = [(0.1, 3)]
    stop.waited = 7
    other.load_state_dict(stop.state_dict())
    model = network()
    fit(model, torch.optim.SGD(model.parameters()), 1, LogMae(), other, val=SPLIT)
    assert (other.best.ranked, other.waited) == ([(5.0, 1)], 0)


def test_removing_the_schedule_restores_the_base_rate():
    model = network()
    resumed = network()
    trainer = fit(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, schedule=halving)
    seen = Groups()
    fit(
        resumed, torch.optim.SGD(resumed.parameters(), lr=0.1), 3, seen, resume=trainer.state_dict()
    )
    assert seen.seen[0][0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("make", "first", "then"),
    [
        (torch.optim.AdamW, {}, {"amsgrad": True}),
        (torch.optim.RMSprop, {}, {"centered": True}),
        (torch.optim.RMSprop, {}, {"momentum": 0.9}),
    ],
)
def test_setting_that_needs_unsaved_state_is_refused(make, first, then):
    model = network()
    resumed = network()
    trainer = fit(model, make(model.parameters(), **first), 2)
    with pytest.raises(SettingError, match=f"has no .*{next(iter(then))}"):
        fit(resumed, make(resumed.parameters(), **first | then), 3, resume=trainer.state_dict())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: torch.optim.SGD(groups_of(model, [{}, {}])),
        lambda model: torch.optim.SGD([*model[2].parameters(), *model[0].parameters()]),
        lambda model: torch.optim.Adam(model.parameters()),
    ],
    ids=["other groups", "another order", "another class"],
)
def test_another_optimizer_is_refused(optimizer):
    model = network()
    resumed = network()
    trainer = fit(model, torch.optim.SGD(model.parameters(), momentum=0.9), 2)
    with pytest.raises(SettingError, match="resume: the "):
        fit(resumed, optimizer(resumed), 3, resume=trainer.state_dict())


def test_state_in_memory_does_not_change_with_training():
    model = network()
    trainer = fit(model, torch.optim.AdamW(model.parameters(), lr=0.1), 2)
    saved = trainer.state_dict()
    kept = copy.deepcopy(trainer.state_dict())
    made = []
    for _ in range(2):
        fit(model, torch.optim.AdamW(model.parameters(), lr=0.1), 5, resume=saved)
        made.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
    for name, tensor in kept["model"].items():
        assert torch.equal(saved["model"][name], tensor)
    for number, values in kept["optimizer"]["state"].items():
        for name, tensor in values.items():
            assert torch.equal(saved["optimizer"]["state"][number][name], tensor)


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [(2, None, [8, 9, 10, 11]), (8, None, [8, 9, 10, 11]), (4, 2, []), (12, None, list(range(12)))],
    ids=["smaller batches", "larger batches", "a limit that is passed", "one batch"],
)
def test_changed_batch_size_continues_after_the_samples_done(size, limit, expected):
    """The run is interrupted after 2 of 3 batches of 4 samples."""
    rows = torch.arange(12.0)[:, None].repeat(1, 2)
    seen = []

    def one(steps, loader, resume=None):
        model = network()
        model.register_forward_pre_hook(
            lambda module, inputs: seen.extend(inputs[0][:, 0].tolist())
        )
        trainer = Trainer(max_epochs=1, max_steps=steps, device="cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        trainer.fit(model, loader, task=LOSS, optimizer=optimizer, resume=resume)
        return trainer

    split = TensorSplit(rows, TARGETS)
    saved = one(2, Loader(split, eval_batch_size=4)).state_dict()
    seen.clear()
    one(99, Loader(split, eval_batch_size=size, limit=limit), saved)
    assert sorted(seen) == expected


# batches of the user's own


def loader(**settings):
    return DataLoader(TensorDataset(INPUTS, TARGETS), 4, **settings)


def resumed_after(step, make):
    """Return the weights of an uninterrupted and a resumed fit of 6 steps, and the warnings."""

    def one(steps, batches, resume=None):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(max_steps=steps, device="cpu")
        trainer.fit(model, batches, task=LOSS, optimizer=optimizer, resume=resume)
        return trainer

    uninterrupted = one(6, make())
    half = one(step, make())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rest = one(6, make(), half.state_dict())
    pairs = zip(uninterrupted.model.parameters(), rest.model.parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs), [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("settings", "step", "exact"),
    [
        ({}, 2, True),
        ({}, 3, True),
        ({"shuffle": True}, 3, True),
        ({"shuffle": True}, 2, False),
        ({"shuffle": True, "generator": 4}, 3, False),
        ({"sampler": WeightedRandomSampler(torch.ones(12), 12)}, 2, False),
    ],
)
def test_a_resumed_fit_with_a_data_loader_is_exact_or_warns(settings, step, exact):
    def make():
        arguments = dict(settings)
        if "generator" in arguments:
            arguments["generator"] = torch.Generator().manual_seed(arguments["generator"])
        return loader(**arguments)

    same, warned = resumed_after(step, make)
    assert same is exact
    assert [text.startswith("resume: the result differs") for text in warned] == [True] * (
        not exact
    )


# from the command line


def saved_groups(run):
    _, training = load(listed(run.folder / "checkpoints")[-1])
    return [settings_of(group) for group in training["optimizer"]["param_groups"]]


def forget_settings(monkeypatch):
    """Read checkpoints like those of an earlier version, without the optimizer settings."""

    def without(checkpoint):
        model, training = load(checkpoint)
        del training["optimizer_settings"], training["scheduled"]
        return model, training

    monkeypatch.setattr("framework.runs.checkpoint.load", without)


CHANGES = [
    *(
        "optimizer.lr=0.3",
        "optimizer.weight_decay=0.5",
        "optimizer.betas=[0.5,0.6]",
        "optimizer.eps=0.1",
    ),
    "parameters.rates={blocks.*:0.01}",
]


@pytest.mark.parametrize("older", [False, True], ids=["", "older checkpoint"])
def test_an_inexact_resume_uses_the_groups_of_a_new_run(older, monkeypatch):
    if older:
        forget_settings(monkeypatch)
    started = ["scheduler=null", "parameters.rates={blocks.*:0.5}"]
    train_run(*started)
    resumed, messages = train_run(
        "scheduler=null", "resume=auto", "trainer.max_steps=4", *CHANGES, inexact=True
    )
    assert "from here on optimizer.lr=0.3 (was 0.001)" in messages
    expected = Experiment(spec_of("scheduler=null", *CHANGES)).optimizer.param_groups
    for group, new in zip(saved_groups(resumed), expected, strict=True):
        expected = {name: value for name, value in new.items() if name != "params"} | {
            "initial_lr": new["lr"]
        }
        assert group == expected
    rates = [
        line["train/learning_rate"]
        for line in logged(resumed.folder)
        if "train/learning_rate" in line
    ]
    assert rates[-1] == 0.3


def test_a_schedule_over_a_new_length_gives_a_note():
    train_run()
    _, messages = train_run("resume=auto", "trainer.max_steps=4")
    assert any(line.startswith("scheduler=cosine covers 4 steps (was 3)") for line in messages)
    before = Path("runs/default/a/config.yaml").read_bytes()
    with pytest.raises(SettingError, match=r"max_exp_avg_sq.*amsgrad"):
        train_run("resume=auto", "trainer.max_steps=4", "optimizer.amsgrad=true", inexact=True)
    assert Path("runs/default/a/config.yaml").read_bytes() == before


PLATEAU = ["scheduler=reduce_on_plateau", "scheduler.monitor=val/accuracy"]
STOP = ["+callbacks=early_stop"]
TRAIN = ["+callbacks=early_stop", "callbacks.early_stop.monitor=train/loss"]


@pytest.mark.parametrize(
    ("parts", "refused", "allowed"),
    [
        (
            PLATEAU,
            [
                "trainer.validate_every=3steps",
                "loader.eval_batch_size=5",
                "metrics.accuracy.ignore=1",
            ],
            ["trainer.log_every=3steps", "trainer.max_steps=9", "metrics.f1.average=micro"],
        ),
        (
            STOP,
            [
                "trainer.validate_every=3steps",
                "callbacks.early_stop.min_delta=1",
                "callbacks.early_stop.mode=max",
            ],
            [
                "trainer.log_every=3steps",
                "callbacks.early_stop.patience=99",
                "metrics.accuracy.ignore=1",
            ],
        ),
        (
            TRAIN,
            ["trainer.log_every=3steps"],
            ["trainer.validate_every=3steps", "loader.eval_batch_size=5"],
        ),
        (
            ["+callbacks=non_finite", "callbacks.non_finite.policy=rewind"],
            ["callbacks.checkpoint.every=3steps"],
            ["trainer.validate_every=3steps"],
        ),
        (
            ["+callbacks=ema"],
            ["model.width=4"],
            [
                "callbacks.checkpoint.every=3steps",
                "trainer.validate_every=3steps",
                "trainer.log_every=3steps",
            ],
        ),
    ],
    ids=["plateau", "early stop", "early stop on training", "rewind", "neither"],
)
def test_changed_metrics_are_refused_if_a_part_decides_by_them(parts, refused, allowed):
    spec = spec_of(*parts)
    for override in refused + allowed:
        changed = compare_configs(spec.tree, apply_overrides(spec.tree, [override]))
        exact = all(keeps_bits(path) for path in changed) and not list(
            observed_changes(changed, spec.tree, spec)
        )
        assert exact is (override in allowed), override


class Reacts(fw.Callback):
    def on_log(self, trainer): ...


def test_early_stop_and_prune_are_the_callbacks_that_decide_by_metrics():
    built_in = [
        entry for entry in fw.callbacks if entry.source.module.startswith("framework_plugins")
    ]
    assert {entry.name for entry in built_in if follows_metrics(entry.part)} == {
        "early_stop",
        "prune",
    }
    assert follows_metrics(Reacts)
    assert not follows_metrics(Groups)


def test_error_names_the_part_that_depends_on_validations():
    train_run("scheduler=reduce_on_plateau")
    with pytest.raises(
        RunError, match=r"validate_every=1steps .*used by scheduler/reduce_on_plateau.*--inexact"
    ):
        train_run("scheduler=reduce_on_plateau", "resume=auto", "trainer.validate_every=1steps")


def test_the_state_of_another_class_of_optimizer_is_refused():
    model = nn.Linear(2, 1)
    batches = [(torch.randn(4, 2), torch.randn(4, 1))]
    trainer = Trainer(max_steps=1, device="cpu")
    trainer.fit(model, batches, task=nn.MSELoss(), optimizer=torch.optim.Adam(model.parameters()))
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SettingError, match="of the optimizer Adam, not SGD"):
        Trainer(max_steps=2, device="cpu").fit(
            model, batches, task=nn.MSELoss(), optimizer=other, resume=trainer.state_dict()
        )
