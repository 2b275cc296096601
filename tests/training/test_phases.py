"""Steps of several phases, each with its own loss, parameters and update."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework import Step, Task, Trainer
from framework.contracts.metric import Measures
from framework.contracts.state import SHARED_TIME
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
    """Both phases use the inputs as noise, so that no number is random."""

    phases = (Phase("judge", ["judge.*"]), Phase("maker", ["maker.*"]))

    def phase(self, name, model, batch):
        generated = model.maker(batch[0][:, :2])
        if name == "judge":
            real = F.softplus(-model.judge(batch[0])).mean()
            loss = real + F.softplus(model.judge(generated.detach())).mean()
        else:
            loss = F.softplus(-model.judge(generated)).mean()
        return Step(loss, generated, batch[0], {f"{name}_loss": loss})

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
    """Train with two optimizers in a plain loop."""
    model = Duel()
    task = Duelling()
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


def test_phases_equal_two_optimizers_in_a_plain_loop():
    trainer = fit()
    model, losses = by_hand()
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    metrics = trainer.state.metrics
    assert metrics["train/judge_loss"] == pytest.approx(float(losses[0]), abs=1e-6)
    assert metrics["train/maker_loss"] == pytest.approx(float(losses[1]), abs=1e-6)
    assert metrics["train/loss"] == pytest.approx(float(losses.mean()), abs=1e-6)


def test_phases_of_micro_batches_equal_those_of_the_batch():
    whole = fit()
    parts = fit(micro_batch=16)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


class Gradients(fw.Callback):
    def __init__(self):
        self.seen = []

    def on_gradients(self, trainer):
        parts = set()
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                parts.add(name.split(".")[0])
        self.seen.append(parts)


def test_each_phase_has_gradients_of_its_own_parameters_only():
    gradients = Gradients()
    trainer = fit(gradients, max_epochs=1)
    assert gradients.seen == [{"judge"}, {"maker"}] * 3
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


class Frozen(fw.Callback):
    def on_fit_start(self, trainer):
        trainer.model.judge[0].requires_grad_(False)


def test_frozen_parameters_stay_frozen():
    trainer = fit(Frozen())
    assert torch.equal(trainer.model.judge[0].weight, Duel().judge[0].weight)
    assert not torch.equal(trainer.model.judge[2].weight, Duel().judge[2].weight)


@pytest.mark.parametrize("steps", [4, 5])
def test_an_interrupted_run_resumes_exactly(steps):
    half = fit(max_steps=steps).state_dict()
    resumed = fit(resume=half)
    whole = fit()
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.state.metrics["train/maker_loss"] == whole.state.metrics["train/maker_loss"]


class Broken(Duelling):
    """A task whose loss is infinite."""

    def phase(self, name, model, batch):
        step = super().phase(name, model, batch)
        return step._replace(loss=step.loss * torch.inf)


def test_a_loss_that_is_not_finite_is_an_error():
    non_finite = fw.callbacks.build("non_finite", policy="raise")
    with pytest.raises(Exception, match="the loss is inf at step 1"):
        fit(non_finite, task=Broken())


def test_the_updates_of_all_phases_are_skipped_if_the_loss_is_not_finite():
    non_finite = fw.callbacks.build("non_finite", policy="skip", most_skips=99)
    trainer = fit(non_finite, task=Broken())
    for trained, initial in zip(trainer.model.parameters(), Duel().parameters(), strict=True):
        assert torch.equal(trained, initial)
    assert non_finite.skipped == 24


def test_a_compiled_step_with_phases_is_an_error():
    with pytest.raises(SettingError, match="compile=step: Duelling updates in phases"):
        fit(compile="step")


def test_additional_values_are_means_over_items():
    measures = Measures([], torch.device("cpu"))
    for value, count in ((1.0, 10), (4.0, 5)):
        measures.add(torch.tensor(0.0), None, None, count, {"kl": torch.tensor(value)})
    assert measures.read() == {"loss": 0.0, "kl": 2.0}
    measures.add(torch.tensor(0.0), None, None, 1, {"kl": torch.tensor(7.0)})
    assert measures.read()["kl"] == 7.0


def test_buffered_values_are_saved():
    measures = Measures([], torch.device("cpu"))
    other = Measures([], torch.device("cpu"))
    for value in range(20):
        measures.add(torch.tensor(1.0), None, None, 2, {"kl": torch.tensor(float(value))})
    mark = measures.mark()
    other.load_state_dict(measures.state_dict())
    measures.add(torch.tensor(1.0), None, None, 2, {"kl": torch.tensor(1e6)})
    measures.undo(mark)
    assert measures.read() == other.read() == {"loss": 1.0, "kl": 9.5}


class Watch(fw.Callback):
    """Stores the norm of the gradients of each phase, by step."""

    def __init__(self):
        self.norms = {}

    def on_gradients(self, trainer):
        gradients = [each.grad for each in trainer.model.parameters() if each.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        self.norms.setdefault(trainer.state.step + 1, []).append(norm)


class Histograms(fw.Logger):
    def __init__(self):
        self.tags = []

    def histogram(self, tag, values, step):
        self.tags.append((tag, step))


@pytest.mark.parametrize("every", ["2steps", "1epoch", "5min"])
def test_histograms_of_a_step_with_phases_are_logged_once(every, monkeypatch):
    clock = itertools.count(step=400)  # seconds: 5 minutes have always passed
    monkeypatch.setattr(SHARED_TIME, "now", lambda: float(next(clock)))
    logger = Histograms()
    task = Duelling()
    task.phases = (task.phases[0], *task.phases)  # the first parameters have two updates in a step
    callback = fw.callbacks.build("histograms", every=every)
    fit(callback, task=task, loggers=[logger], max_epochs=1)
    assert len(logger.tags) == len(set(logger.tags))
    names = {f"{kind}/{name}" for kind in ("weights", "gradients") for name in names_of(Duel())}
    assert {tag for tag, step in logger.tags if step == 1} == names


def names_of(model):
    return [name for name, _ in model.named_parameters()]


def test_the_gradient_norm_is_that_of_all_phases():
    watch = Watch()
    norm = fw.callbacks.build("gradient_norm")
    trainer = fit(watch, norm, log_every="1steps", max_epochs=2)
    logged = trainer.state.history["train/gradient_norm"]
    expected = {step: math.hypot(*norms) for step, norms in watch.norms.items()}
    assert all(len(norms) == 2 for norms in watch.norms.values())
    assert dict(zip(logged.steps, logged.values, strict=True)) == pytest.approx(expected)
