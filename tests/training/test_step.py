"""Micro-batches, full memory and compiled steps equal one forward and backward pass."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import framework as fw
from framework import Callback, Trainer
from framework.runtime.memory import MicroBatches, OutOfMemory

DATA = fw.TensorSplit(
    torch.randn(64, 5, generator=torch.Generator().manual_seed(3)), torch.arange(64) % 3
)


class Small(nn.Module):
    """A network that runs out of memory with more samples than `room`."""

    def __init__(self, room=10**9, dropout=0.0, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 8)
        self.last = nn.Linear(8, 3)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.room = room
        self.seen = []

    def forward(self, inputs):
        hidden = self.dropout(self.norm(self.first(inputs)).tanh())
        self.seen.append(len(inputs))
        if len(inputs) > self.room:  # after random numbers and statistics have changed
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.last(hidden)


class Gradients(Callback):
    """Records every gradient."""

    def __init__(self):
        self.kept = []

    def on_gradients(self, trainer):
        self.kept.append([p.grad.clone() for p in trainer.model.parameters()])


def fit(model, *callbacks, resume=None, **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(
        callbacks=callbacks, **({"max_steps": 4, "seed": 5, "device": "cpu"} | settings)
    )
    metrics = [fw.metrics.build("accuracy")]
    trainer.fit(
        model,
        DATA,
        task=nn.CrossEntropyLoss(),
        optimizer=optimizer,
        batch_size=24,
        metrics=metrics,
        resume=resume,
    )
    return trainer


def assert_close(one, other):
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 8, 24])
def test_micro_batches_have_the_gradients_of_the_batch(size):
    whole = Gradients()
    split = Gradients()
    one = fit(Small(), whole)
    other = fit(Small(), split, micro_batch=size)
    assert max(other.model.seen) == size
    for a, b in zip(whole.kept, split.kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert other.state.metrics["train/loss"] == pytest.approx(
        one.state.metrics["train/loss"], rel=1e-5
    )
    assert other.state.samples == one.state.samples


def test_micro_batches_and_accumulation_make_one_mean():
    assert_close(fit(Small(), accumulate=2), fit(Small(), accumulate=2, micro_batch=7))


def test_a_step_with_full_memory_is_repeated_with_half_the_samples():
    with pytest.warns(UserWarning, match="memory is full with") as warned:
        trainer = fit(Small(room=7), micro_batch="auto")
    assert [str(warning.message).removeprefix("memory is full with ") for warning in warned] == [
        "24 samples at once: continuing with 12",
        "12 samples at once: continuing with 6",
    ]
    assert trainer.micro_batches.size == 6
    assert trainer.model.seen[:4] == [24, 12, 6, 6]
    assert_close(trainer, fit(Small()))


@pytest.mark.filterwarnings("ignore:memory is full")
def test_a_repeated_step_has_the_same_random_numbers_statistics_and_sums():
    settings = {"dropout": 0.5, "norm": True}
    first = fit(Small(room=6, **settings), micro_batch="auto")
    second = fit(Small(**settings), micro_batch=6)
    for a, b in zip(
        first.model.state_dict().values(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert first.state.metrics["train/loss"] == second.state.metrics["train/loss"]
    assert first.state.metrics["train/accuracy"] == second.state.metrics["train/accuracy"]


@pytest.mark.filterwarnings("ignore:memory is full")
def test_a_resumed_run_starts_with_the_reduced_micro_batch():
    half = fit(Small(room=6), micro_batch="auto", max_steps=2)
    saved = half.state_dict()
    again = Small(room=6)
    trainer = fit(again, micro_batch="auto", resume=saved)
    assert max(again.seen) == 6
    assert_close(trainer, fit(Small()))


def test_without_auto_full_memory_is_an_error_that_names_the_setting():
    with pytest.raises(OutOfMemory, match="micro_batch=auto"):
        fit(Small(room=7))
    with pytest.warns(UserWarning, match="memory is full"), pytest.raises(OutOfMemory):
        fit(Small(room=0), micro_batch="auto")


@pytest.mark.filterwarnings("ignore:memory is full")
def test_evaluation_reduces_the_micro_batch_too():
    model = Small(room=7)
    trainer = Trainer(max_epochs=1, micro_batch="auto", device="cpu")
    values = trainer.evaluate(DATA, model=model, task=nn.CrossEntropyLoss())
    assert max(model.seen[1:]) >= 7 > trainer.micro_batches.size
    some = F.cross_entropy(model(DATA[:7][0]), DATA[:7][1]).item()
    assert values["test/loss"] == pytest.approx(some, abs=0.5)
    trainer = Trainer(max_epochs=1, device="cpu")
    expected = trainer.evaluate(DATA, model=Small(), task=nn.CrossEntropyLoss())
    assert values["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-6)


def test_a_step_is_not_repeated_after_other_errors():
    assert not MicroBatches("auto").halve(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.slow  # it compiles: a minute
@pytest.mark.parametrize("mode", ["model", "step"])
@pytest.mark.parametrize(
    "settings", [{}, {"accumulate": 2}, {"precision": "bf16"}, {"micro_batch": 8}], ids=str
)
def test_a_compiled_step_equals_the_eager_one(mode, settings):
    eager = fit(Small(dropout=0.3), **settings)
    compiled = fit(Small(dropout=0.3), compile=mode, **settings)
    for a, b in zip(eager.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if "precision" in settings else 1e-4, atol=1e-3)
    assert compiled.state.metrics["train/accuracy"] == pytest.approx(
        eager.state.metrics["train/accuracy"], abs=0.05
    )
    names = list(dict(compiled.model.named_parameters()))
    assert names == list(dict(eager.model.named_parameters()))
