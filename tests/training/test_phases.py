"""A step of several phases: each with its own loss, its own parameters and an update of its own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework import Step, Task, Trainer
from framework.contracts.metric import Measures
from framework.contracts.task import Phase
from framework.data.dataset import Loader
from framework.errors import SettingError

DATA = fw.TensorSplit(
    torch.randn(96, 4, generator=torch.Generator().manual_seed(1)),
    torch.zeros(96, dtype=torch.long),
)


class Duel(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.judge = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.maker = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x):
        return self.judge(x)


class Duelling(Task):
    """Both play on what noise the inputs themselves give, so that nothing is random."""

    phases = (Phase("judge", ["judge.*"]), Phase("maker", ["maker.*"]))

    def phase(self, name, model, batch):
        made = model.maker(batch[0][:, :2])
        if name == "judge":
            loss = (
                F.softplus(-model.judge(batch[0])).mean()
                + F.softplus(model.judge(made.detach())).mean()
            )
        else:
            loss = F.softplus(-model.judge(made)).mean()
        return Step(loss, made, batch[0], {f"{name}_loss": loss})

    def step(self, model, batch):
        return self.phase("judge", model, batch)


def fit(*callbacks, task=None, resume=None, **settings):
    model = Duel()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trainer = Trainer(
        callbacks=callbacks, **({"max_epochs": 4, "seed": 2, "device": "cpu"} | settings)
    )
    loader = Loader(DATA, 32, shuffle=True, seed=2)
    trainer.fit(model, loader, task=task or Duelling(), optimizer=optimizer, resume=resume)
    return trainer


def by_hand(epochs=4):
    """The usual way: two optimizers, and one loop."""
    model, task = Duel(), Duelling()
    judge = torch.optim.Adam(model.judge.parameters(), lr=0.01)
    maker = torch.optim.Adam(model.maker.parameters(), lr=0.01)
    loader = Loader(DATA, 32, shuffle=True, seed=2)
    losses = []
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            pair = []
            for name, optimizer in (("judge", judge), ("maker", maker)):
                model.zero_grad()
                pair.append(task.phase(name, model, batch).loss)
                pair[-1].backward()
                optimizer.step()
            losses.append(torch.stack(pair).detach())
    return model, torch.stack(losses[-3:]).mean(0)


def test_phases_do_what_two_optimizers_in_a_plain_loop_do():
    trainer, (model, losses) = fit(), by_hand()
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    metrics = trainer.state.metrics
    assert metrics["train/judge_loss"] == pytest.approx(float(losses[0]), abs=1e-6)
    assert metrics["train/maker_loss"] == pytest.approx(float(losses[1]), abs=1e-6)
    assert metrics["train/loss"] == pytest.approx(float(losses.mean()), abs=1e-6)


def test_accumulated_phases_are_those_of_the_whole_batch():
    whole, parts = fit(), fit(micro_batch=16)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


class Gradients(fw.Callback):
    def __init__(self):
        self.seen = []

    def on_gradients(self, trainer):
        self.seen.append(
            {
                name.split(".")[0]
                for name, p in trainer.model.named_parameters()
                if p.grad is not None
            }
        )


def test_each_phase_has_gradients_of_its_own_alone():
    gradients = Gradients()
    trainer = fit(gradients, max_epochs=1)
    assert gradients.seen == [{"judge"}, {"maker"}] * 3
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


class Frozen(fw.Callback):
    def on_fit_start(self, trainer):
        trainer.model.judge[0].requires_grad_(False)


def test_what_is_frozen_stays_frozen():
    trainer = fit(Frozen())
    assert torch.equal(trainer.model.judge[0].weight, Duel().judge[0].weight)
    assert not torch.equal(trainer.model.judge[2].weight, Duel().judge[2].weight)


@pytest.mark.parametrize("steps", [4, 5])
def test_a_run_that_was_cut_off_goes_on_exactly(steps):
    half = fit(max_steps=steps).state_dict()
    resumed, whole = fit(resume=half), fit()
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.state.metrics["train/maker_loss"] == whole.state.metrics["train/maker_loss"]


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_loss_that_is_not_finite_moves_no_phase(policy):
    class Broken(Duelling):
        def phase(self, name, model, batch):
            step = super().phase(name, model, batch)
            return step._replace(loss=step.loss * torch.inf)

    non_finite = fw.callbacks.build(
        "non_finite", policy=policy, **({"most_skips": 99} if policy == "skip" else {})
    )
    with (
        pytest.raises(Exception, match="the loss is inf at step 1")
        if policy == "raise"
        else torch.no_grad()
    ):
        with torch.enable_grad():
            trainer = fit(non_finite, task=Broken())
        assert all(
            torch.equal(a, b)
            for a, b in zip(trainer.model.parameters(), Duel().parameters(), strict=True)
        )
        assert non_finite.skipped == 24


def test_a_compiled_step_is_refused():
    with pytest.raises(SettingError, match="compile=step: Duelling updates in phases"):
        fit(compile="step")


def test_values_beside_the_loss_are_means_over_items():
    measures = Measures([], torch.device("cpu"))
    for value, count in ((1.0, 10), (4.0, 5)):
        measures.add(torch.tensor(0.0), None, None, count, {"kl": torch.tensor(value)})
    assert measures.read() == {"loss": 0.0, "kl": 2.0}
    measures.add(torch.tensor(0.0), None, None, 1, {"kl": torch.tensor(7.0)})
    assert measures.read()["kl"] == 7.0


def test_values_that_are_held_back_go_into_a_checkpoint():
    measures, other = (Measures([], torch.device("cpu")) for _ in range(2))
    for value in range(20):
        measures.add(torch.tensor(1.0), None, None, 2, {"kl": torch.tensor(float(value))})
    mark = measures.mark()
    other.load_state_dict(measures.state_dict())
    measures.add(torch.tensor(1.0), None, None, 2, {"kl": torch.tensor(1e6)})
    measures.undo(mark)
    assert measures.read() == other.read() == {"loss": 1.0, "kl": 9.5}
