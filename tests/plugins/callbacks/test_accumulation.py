"""A schedule of batches a step, against a plain loop, and through resumes."""

import json

import pytest
import torch
from torch import nn

import framework as fw
from framework import Callback, TensorSplit, Trainer
from framework.data.dataset import Loader
from framework.errors import SettingError
from framework.experiment.plan import make_plan

INPUTS = torch.randn(22, 3, generator=torch.Generator().manual_seed(1))
SPLIT = TensorSplit(INPUTS, INPUTS.sum(1, keepdim=True).sin())
BATCHES = 6  # of 4 samples, the last of 2
SCHEDULE = {"1": 2, "3": 4}  # with accumulate=1: 6, 3, 3, 2, 2 steps an epoch


def network(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))


def halved(step):
    return 0.5 ** (step / BATCHES)  # each epoch


class Watch(Callback):
    """Keeps the rate and the batches of each step, and the state of the run after a chosen one, which ends it."""

    def __init__(self, last=None):
        self.last, self.steps, self.kept = last, [], None

    def on_gradients(self, trainer):
        self.steps.append(
            (trainer.state.epoch, trainer.accumulate, trainer.optimizer.param_groups[0]["lr"])
        )

    def on_step_end(self, trainer):
        if trainer.state.step == self.last:
            state = trainer.state_dict()
            self.kept = torch.utils._pytree.tree_map(
                lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state
            )
            trainer.state.stop = "enough"


def fit(*callbacks, schedule=halved, resume=None, dropout=0.0, limits=None, **settings):
    model = network(dropout)
    trainer = Trainer(
        **(limits or {"max_epochs": 5}), callbacks=callbacks, device="cpu", **settings
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    given = {
        "task": nn.MSELoss(),
        "optimizer": optimizer,
        "schedule": schedule,
        "batch_size": 4,
        "val": SPLIT,
    }
    trainer.fit(model, SPLIT, resume=resume, **given)
    return trainer


def accumulation(schedule=SCHEDULE):
    return fw.callbacks.build("accumulation", schedule=schedule)


def test_it_is_a_plain_loop_over_larger_batches_with_the_rate_at_its_place_in_the_data():
    model, expected = network(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for epoch, together in enumerate([1, 2, 2, 4, 4]):
        batches = list(Loader(SPLIT, 4, shuffle=True).epoch(epoch))
        for first in range(0, BATCHES, together):
            inputs, targets = (
                torch.cat(column) for column in zip(*batches[first : first + together], strict=True)
            )
            optimizer.param_groups[0]["lr"] = 0.05 * halved(epoch * BATCHES + first)
            expected.append((epoch, together, optimizer.param_groups[0]["lr"]))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
    watch = Watch()
    trainer = fit(accumulation(), watch)
    assert watch.steps == expected
    assert trainer.state.step == trainer.state.total_steps == 6 + 3 + 3 + 2 + 2
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_schedule_that_changes_nothing_changes_nothing():
    same, plain = (
        fit(accumulation({"0": 2}), accumulate=2, dropout=0.3),
        fit(accumulate=2, dropout=0.3),
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(same.model.parameters(), plain.model.parameters(), strict=True)
    )
    other = fit(accumulation({"4": 1}), accumulate=2, dropout=0.3)
    assert other.state.step == 4 * 3 + 6
    assert other.accumulate == 2, "as it was before"


def plateau():
    return fw.schedulers.build("plateau", 30, patience=0, factor=0.5, threshold=0.2, warmup=4)


@pytest.mark.parametrize("at", [3, 6, 7, 9, 12, 13, 14, 15])
@pytest.mark.parametrize(
    "schedule", [lambda: halved, plateau, lambda: None], ids=["function", "plateau", "none"]
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(at, schedule):
    whole, cut, rest = Watch(), Watch(at), Watch()
    ended = fit(accumulation(), whole, schedule=schedule(), dropout=0.3)
    fit(accumulation(), cut, schedule=schedule(), dropout=0.3)
    again = fit(accumulation(), rest, schedule=schedule(), dropout=0.3, resume=cut.kept)
    assert cut.steps + rest.steps == whole.steps
    assert all(
        torch.equal(a, b)
        for a, b in zip(ended.model.parameters(), again.model.parameters(), strict=True)
    )


def test_where_steps_end_the_run_the_rate_goes_by_steps():
    watch = Watch()
    trainer = fit(accumulation(), watch, limits={"max_steps": 8})
    assert [rate for _, _, rate in watch.steps] == pytest.approx(
        [0.05 * halved(step) for step in range(8)]
    )
    assert (trainer.state.step, trainer.state.total_steps) == (8, 8)


@pytest.mark.parametrize(
    "limits", [{"max_epochs": 5}, {"max_steps": 14}, {"max_epochs": 5, "max_steps": 8}]
)
@pytest.mark.parametrize("usual", [1, 3])
def test_a_plan_tells_the_steps_and_rates_that_a_run_has(limits, usual):
    watch, model = Watch(), network()
    ended = fit(accumulation(), watch, limits=limits, accumulate=usual)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    plan = make_plan(
        model, SPLIT[:4], steps_per_epoch=BATCHES, total_steps=999, optimizer=optimizer
    )
    trainer = Trainer(**limits, device="cpu", accumulate=usual)
    plan.use_pace(accumulation().pace(trainer, BATCHES), optimizer, halved)
    assert plan.total_steps == ended.state.step == ended.state.total_steps
    assert plan.curve.rates == pytest.approx([rate for _, _, rate in watch.steps])
    each = [
        sum(epoch == number for epoch, _, _ in watch.steps)
        for number in range(watch.steps[-1][0] + 1)
    ]
    if "max_steps" not in limits:
        assert plan.pace.startswith(f"5 epochs of {each[0]}, {each[1]} from epoch 1 on")
        assert plan.total_steps * plan.batches_per_step == pytest.approx(5 * BATCHES)
    if (limits, usual) == ({"max_epochs": 5}, 1):
        assert plan.pace == "5 epochs of 6, 3 from epoch 1 on, 2 from epoch 3 on"


@pytest.mark.parametrize(
    ("schedule", "said"),
    [({}, "it is empty"), ({"two": 2}, "'two' is no epoch"), ({"-1": 2}, "'-1' is no epoch")],
)
def test_what_is_no_schedule_is_refused(schedule, said):
    with pytest.raises(SettingError, match=rf"accumulation\.schedule: {said}"):
        accumulation(schedule)
    with pytest.raises(SettingError, match="schedule"):
        accumulation({"1": 0})


def test_batches_that_cannot_be_counted_are_refused():
    class Stream:
        def __iter__(self):
            return iter([SPLIT[:4]])

    model = network()
    trainer = Trainer(max_epochs=2, callbacks=[accumulation()], device="cpu")
    with pytest.raises(
        SettingError, match="accumulation needs training data that knows its length"
    ):
        trainer.fit(
            model, Stream(), task=nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters())
        )


def test_the_plateau_of_these_tests_falls():
    watch = Watch()
    fit(accumulation(), watch, schedule=plateau(), dropout=0.3)
    rates = [rate for _, _, rate in watch.steps]
    assert rates[0] < rates[4] > rates[-1], "after its warmup"


def test_framework_plan_tells_the_steps_that_framework_train_makes(command):
    words = "+callbacks=accumulation 'callbacks.accumulation.schedule={0: 1, 2: 4}' trainer.max_epochs=4"
    _, planned, _ = command(f"plan --json {words}")
    status, trained, err = command(f"train {words}")
    assert status in (0, None), err
    assert f"{json.loads(planned)['total_steps']} steps in" in trained
    assert json.loads(planned)["total_steps"] == 40 + 40 + 10 + 10
