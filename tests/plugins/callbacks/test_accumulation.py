"""The accumulation callback, compared with a plain loop, and resumed."""

import copy
import json
from collections import Counter

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, TensorSplit, Trainer
from framework.data.dataset import Loader
from framework.errors import SettingError
from framework.experiment.plan import make_plan
from regressions import assert_same_weights

INPUTS = torch.randn(22, 3, generator=torch.Generator().manual_seed(1))
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True).sin())
BATCHES = 6  # of 4 samples, the last of 2
SCHEDULE = {"1": 2, "3": 4}  # with accumulate=1: 6, 3, 3, 2 and 2 steps in the epochs


def network(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


def halve_each_epoch(step):
    return 0.5 ** (step / BATCHES)


class Watch(Callback):
    """Records (epoch, batches, rate) of each step; stops after step `last` and keeps the state."""

    def __init__(self, last=None):
        self.last = last
        self.steps = []
        self.state = None

    def on_gradients(self, trainer):
        rate = trainer.optimizer.param_groups[0]["lr"]
        self.steps.append((trainer.state.epoch, trainer.accumulate, rate))

    def on_step_end(self, trainer):
        if trainer.state.step == self.last:
            self.state = copy.deepcopy(trainer.state_dict())
            trainer.state.stop = "enough"


def fit(*callbacks, schedule=halve_each_epoch, resume=None, dropout=0.0, limits=None, **settings):
    model = network(dropout)
    limits = limits or {"max_epochs": 5}
    trainer = Trainer(**limits, callbacks=callbacks, device="cpu", **settings)
    trainer.fit(
        model,
        SPLIT,
        task=nn.MSELoss(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
        schedule=schedule,
        batch_size=4,
        val=SPLIT,
        resume=resume,
    )
    return trainer


def accumulation(schedule=SCHEDULE):
    return fw.callbacks.build("accumulation", schedule=schedule)


def test_it_equals_a_loop_over_larger_batches_with_the_rate_by_the_position_in_the_data():
    model = network()
    expected = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for epoch, batches_per_step in enumerate([1, 2, 2, 4, 4]):
        batches = list(Loader(SPLIT, 4, shuffle=True).epoch(epoch))
        for first in range(0, BATCHES, batches_per_step):
            parts = batches[first : first + batches_per_step]
            inputs = torch.cat([part[0] for part in parts])
            targets = torch.cat([part[1] for part in parts])
            rate = 0.05 * halve_each_epoch(epoch * BATCHES + first)
            optimizer.param_groups[0]["lr"] = rate
            expected.append((epoch, batches_per_step, rate))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
    watch = Watch()
    trainer = fit(accumulation(), watch)
    assert watch.steps == expected
    assert trainer.state.step == trainer.state.total_steps == 6 + 3 + 3 + 2 + 2
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_constant_schedule_equals_trainer_accumulate():
    scheduled = fit(accumulation({"0": 2}), accumulate=2, dropout=0.3)
    plain = fit(accumulate=2, dropout=0.3)
    assert_same_weights(scheduled.model, plain.model)


def test_trainer_accumulate_counts_before_the_first_epoch_and_is_restored():
    trainer = fit(accumulation({"4": 1}), accumulate=2, dropout=0.3)
    assert trainer.state.step == 4 * 3 + 6
    assert trainer.accumulate == 2


def plateau():
    return fw.schedulers.build("plateau", 30, patience=0, factor=0.5, threshold=0.2, warmup=4)


@pytest.mark.parametrize("at", [3, 6, 7, 9, 12, 13, 14, 15])
@pytest.mark.parametrize(
    "schedule",
    [lambda: halve_each_epoch, plateau, lambda: None],
    ids=["function", "plateau", "none"],
)
def test_a_resumed_run_equals_the_uninterrupted_run(at, schedule):
    uninterrupted = Watch()
    first = Watch(at)
    second = Watch()
    expected = fit(accumulation(), uninterrupted, schedule=schedule(), dropout=0.3)
    fit(accumulation(), first, schedule=schedule(), dropout=0.3)
    resumed = fit(accumulation(), second, schedule=schedule(), dropout=0.3, resume=first.state)
    assert first.steps + second.steps == uninterrupted.steps
    assert_same_weights(expected.model, resumed.model)


def test_with_a_limit_of_steps_the_rate_follows_the_steps():
    watch = Watch()
    trainer = fit(accumulation(), watch, limits={"max_steps": 8})
    rates = [rate for _, _, rate in watch.steps]
    assert rates == pytest.approx([0.05 * halve_each_epoch(step) for step in range(8)])
    assert (trainer.state.step, trainer.state.total_steps) == (8, 8)


@pytest.mark.parametrize(
    "limits", [{"max_epochs": 5}, {"max_steps": 14}, {"max_epochs": 5, "max_steps": 8}]
)
@pytest.mark.parametrize("default", [1, 3])
def test_a_plan_has_the_steps_and_rates_of_the_run(limits, default):
    watch = Watch()
    model = network()
    trained = fit(accumulation(), watch, limits=limits, accumulate=default)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    plan = make_plan(
        model, SPLIT[:4], steps_per_epoch=BATCHES, total_steps=999, optimizer=optimizer
    )
    trainer = Trainer(**limits, device="cpu", accumulate=default)
    plan.use_pace(accumulation().pace(trainer, BATCHES), optimizer, halve_each_epoch)
    assert plan.total_steps == trained.state.step == trained.state.total_steps
    assert plan.curve.rates == pytest.approx([rate for _, _, rate in watch.steps])
    if "max_steps" not in limits:
        steps = Counter(epoch for epoch, _, _ in watch.steps)
        assert plan.pace.startswith(f"5 epochs of {steps[0]}, {steps[1]} from epoch 1 on")
        assert plan.total_steps * plan.batches_per_step == pytest.approx(5 * BATCHES)
    if (limits, default) == ({"max_epochs": 5}, 1):
        assert plan.pace == "5 epochs of 6, 3 from epoch 1 on, 2 from epoch 3 on"


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [({}, "is empty"), ({"two": 2}, "keys, got 'two'"), ({"-1": 2}, "keys, got '-1'")],
)
def test_an_invalid_schedule_is_an_error(schedule, problem):
    with pytest.raises(SettingError, match=rf"accumulation\.schedule.*{problem}"):
        accumulation(schedule)
    with pytest.raises(SettingError, match="schedule"):
        accumulation({"1": 0})


def test_training_data_without_a_length_is_an_error():
    class Stream:
        def __iter__(self):
            return iter([SPLIT[:4]])

    model = network()
    trainer = Trainer(max_epochs=2, callbacks=[accumulation()], device="cpu")
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(SettingError, match="accumulation needs training data"):
        trainer.fit(model, Stream(), task=nn.MSELoss(), optimizer=optimizer)


def test_the_plateau_schedule_of_these_tests_reduces_the_rate():
    watch = Watch()
    fit(accumulation(), watch, schedule=plateau(), dropout=0.3)
    rates = [rate for _, _, rate in watch.steps]
    assert rates[0] < rates[4] > rates[-1], "after its warmup"


def test_framework_plan_counts_the_steps_of_framework_train(command):
    schedule = "'callbacks.accumulation.schedule={0: 1, 2: 4}'"
    overrides = f"+callbacks=accumulation {schedule} trainer.max_epochs=4"
    _, plan, _ = command(f"plan --json {overrides}")
    status, output, err = command(f"train {overrides}")
    assert status in (0, None), err
    steps = json.loads(plan)["total_steps"]
    assert steps == 40 + 40 + 10 + 10
    assert f"{steps} steps in" in output
