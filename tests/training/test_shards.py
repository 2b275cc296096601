"""trainer.shards: the same bits on any number of processes."""

import json

import pytest
import torch
from torch import nn

import framework as fw
from distributed_runs import run_in_processes
from fits import Record
from framework import DataError, SettingError, Trainer
from framework.contracts.task import Phase, Step, Task
from framework.contracts.transform import Transform
from framework.data.batch_slice import NO_ROWS, BatchSlice
from framework.data.token_splits import RaggedSplit
from framework.runtime.pairwise import PairwiseSum, pairwise_sum
from framework.training.shards import cut

generator = torch.Generator().manual_seed(0)
X = torch.randn(83, 6, generator=generator)  # in batches of 16, the last one has 3 samples
Y = (X @ torch.randn(6, 3, generator=generator)).argmax(1)


class Jitter(Transform):
    """Adds random numbers to the inputs."""

    def __call__(self, batch):
        return (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1])


class Noise(fw.Callback):
    """Adds random numbers to the gradients, and clips them."""

    def on_gradients(self, trainer):
        for parameter in trainer.model.parameters():
            if parameter.grad is not None:
                parameter.grad += 0.01 * torch.randn_like(parameter)
        nn.utils.clip_grad_norm_(trainer.model.parameters(), 0.5)


class Weighted(Task):
    """A mean over items with fractions as weights."""

    def count(self, batch):
        return (batch[1] + 0.3).sum()

    def step(self, model, batch):
        outputs = model(batch[0])
        weights = batch[1] + 0.3
        losses = nn.functional.cross_entropy(outputs, batch[1], reduction="none")
        return Step((losses * weights).sum() / weights.sum(), outputs, batch[1])


class TwoPhases(Task):
    """Trains the layers in turn."""

    phases = (Phase("first", moves=("0.*",)), Phase("last", moves=("4.*",)))

    def step(self, model, batch):
        outputs = model(batch[0])
        return Step(nn.functional.cross_entropy(outputs, batch[1]), outputs, batch[1])

    def phase(self, name, model, batch):
        return self.step(model, batch)


class Tokens(nn.Module):
    """Averages embeddings over all positions, also those of padding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(1))


def network(norm):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 16), norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3), nn.Softplus()
    )


def ragged():
    lengths = torch.randint(1, 40, (83,), generator=torch.Generator().manual_seed(1))
    return RaggedSplit([torch.full((int(n),), int(n) % 19 + 1) for n in lengths], Y)


def cases():
    """Return the model, data, task, and settings of each fit."""
    torch.manual_seed(3)
    tensors = fw.TensorSplit(X, Y)
    even = fw.TensorSplit(X[:80], Y[:80])  # a batch norm needs two samples in each shard
    return {
        "dropout": (network(nn.Identity()), tensors, nn.CrossEntropyLoss(), {}),
        "weights": (network(nn.LayerNorm(16)), tensors, Weighted(), {"accumulate": 2}),
        "batch norm": (network(nn.BatchNorm1d(16)), even, nn.CrossEntropyLoss(), {}),
        "phases": (network(nn.Identity()), tensors, TwoPhases(), {"micro_batch": 1}),
        "padding": (Tokens(), ragged(), nn.CrossEntropyLoss(), {}),
    }


class SaveAt(fw.Callback):
    """Saves the state after step 7, inside an epoch and between two logged values."""

    def __init__(self, path):
        self.path = path

    def on_step_done(self, trainer):
        if trainer.state.step == 7:
            state = trainer.state_dict()
            if trainer.strategy.is_main:
                torch.save(state, self.path)


def fit_all(folder, name, strategy, resume_from=None):
    """Run all fits, and write into a file what must be equal."""
    fw.discover()
    strategy = fw.strategies.build(strategy)
    results = {}
    for case, (model, data, task, settings) in cases().items():
        record = Record()
        noise = [Jitter(), Noise()] if case in ("dropout", "weights") else []
        trainer = Trainer(
            max_epochs=3,
            log_every="2steps",
            shards=8,
            device="cpu",
            strategy=strategy,
            callbacks=[*noise, SaveAt(folder / f"{name} {case}.pt")],
            loggers=[record],
            **settings,
        )
        resume = None
        if resume_from is not None:
            resume = torch.load(folder / f"{resume_from} {case}.pt", weights_only=False)
        trainer.fit(
            model,
            data,
            task=task,
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
            val=data,
            metrics=[fw.metrics.build("accuracy")],
            batch_size=16,
            resume=resume,
        )
        results[case] = {
            "weights": {key: value.tolist() for key, value in model.state_dict().items()},
            "train/loss": record.of("train/loss")[-2:],
            "val/loss": record.of("val/loss")[-1:],
            "val/accuracy": record.of("val/accuracy")[-1:],
            "samples": trainer.state.samples,
        }
    if strategy.is_main:
        (folder / f"{name}.json").write_text(json.dumps(results))


def results_of(folder, name):
    """Return the results that `fit_all` has written."""
    return json.loads((folder / f"{name}.json").read_text())


def fit_and_resume(folder):
    """Run all fits in several processes, and go on with the states of two processes."""
    fit_all(folder, "four", "ddp")
    fit_all(folder, "four after two", "ddp", resume_from="two")


def test_the_number_of_processes_does_not_change_a_bit(tmp_path):
    fit_all(tmp_path, "one", "single")
    one = results_of(tmp_path, "one")
    assert one["dropout"]["samples"] == 3 * 83
    run_in_processes(fit_all, 2, tmp_path, tmp_path, "two", "ddp")
    run_in_processes(fit_and_resume, 4, tmp_path, tmp_path)
    fit_all(tmp_path, "one after two", "single", resume_from="two")
    for name in ("two", "four", "four after two", "one after two"):
        assert results_of(tmp_path, name) == one, name


@pytest.mark.slow
def test_eight_processes_have_the_bits_of_one(tmp_path):
    fit_all(tmp_path, "one", "single")
    run_in_processes(fit_all, 8, tmp_path, tmp_path, "eight", "ddp")
    assert results_of(tmp_path, "eight") == results_of(tmp_path, "one")


def test_without_random_numbers_the_gradients_are_those_of_a_whole_batch():
    weights = []
    for shards in (None, 8):
        torch.manual_seed(3)
        model = nn.Linear(6, 3)
        trainer = Trainer(max_epochs=2, device="cpu", shards=shards)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer.fit(
            model, fw.TensorSplit(X, Y), task=Weighted(), optimizer=optimizer, batch_size=16
        )
        weights.append(model.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


def test_the_shards_of_a_process_are_those_of_the_whole_batch():
    for rows in (1, 3, 8, 13, 16):
        whole = cut((torch.arange(rows),), 8)
        for processes in (2, 4):
            own = 8 // processes
            shards = []
            for rank in range(processes):
                part = slice_of(rank, processes).of_batch((torch.arange(rows),))
                shards += cut(part, own)
            assert [part and part[0].tolist() for part in shards] == [
                part and part[0].tolist() for part in whole
            ]
        assert whole.count(NO_ROWS) == max(8 - rows, 0)


def slice_of(rank, processes):
    """Return the slice of a process with 8 shards."""
    return BatchSlice(rank * 8 // processes, (rank + 1) * 8 // processes, 8)


def test_the_order_of_a_pairwise_sum():
    terms = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    sums = PairwiseSum()
    for term in terms:
        sums.add([term.clone()])
    a, b, c, d, e, f, g, h = terms
    expected = ((a + b) + (c + d)) + ((e + f) + (g + h))
    assert torch.equal(sums.total()[0], expected)


@pytest.mark.parametrize("count", [0, 3, 6])
def test_a_pairwise_sum_has_a_power_of_two_of_terms(count):
    with pytest.raises(ValueError, match=f"power of two, got {count}"):
        pairwise_sum(torch.ones(count, 2).unbind())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": 6}, "shards=6: expected a power of two"),
        ({"shards": 2, "devices": 4}, "shards=2: expected a multiple of devices=4"),
        ({"shards": 4, "compile": "step"}, "shards=4: expected compile=off"),
        ({"shards": 4, "micro_batch": "auto"}, "shards=4: expected no micro_batch=auto"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        Trainer(max_steps=1, device="cpu", **settings)


def test_shards_without_rows_and_of_one_row_are_refused():
    for shards, norm, message in (
        (32, nn.Identity(), "shards=32: expected batch_size=32 or more, got 16"),
        (8, nn.BatchNorm1d(16), r"shards=8 makes a batch of one sample \(the last of 83"),
    ):
        model = network(norm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(max_steps=1, device="cpu", shards=shards)
        with pytest.raises(DataError, match=message):
            trainer.fit(
                model,
                fw.TensorSplit(X, Y),
                task=nn.CrossEntropyLoss(),
                optimizer=optimizer,
                batch_size=16,
            )
