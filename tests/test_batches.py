"""From what a person has to batches, and from batches to steps."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from framework import Step, Task
from framework.batches import as_batches, count_steps, count_total, steps, windows
from framework.data import ForeignLoader, Loader, TensorSplit
from framework.errors import DataError
from test_trainer import SPLIT, Three, X, Y, fit

CPU = torch.device("cpu")


def read(source, shuffle=False):
    return as_batches(source, 16, shuffle=shuffle, seed=0, device=CPU)


@pytest.mark.parametrize(
    "source", [SPLIT, TensorDataset(X, Y), DataLoader(TensorDataset(X, Y), 16), [(X[:16], Y[:16])]]
)
def test_every_source_gives_the_same_batches(source):
    x, y = next(iter(read(source).epoch()))
    assert torch.equal(x, X[:16])
    assert torch.equal(y, Y[:16])


def test_what_is_a_loader_already_stays_as_it_is():
    ours = Loader(SPLIT, 7, shuffle=True)
    foreign = ForeignLoader([])
    assert read(ours) is ours
    assert read(foreign) is foreign
    assert [len(batch[0]) for batch in read(SPLIT, shuffle=True).epoch()] == [16, 16, 16, 16, 6]


def test_a_whole_data_is_refused_with_what_to_pass():
    with pytest.raises(DataError, match=r"Three has several splits: pass one of them, such as `data\.test`"):
        read(Three())


@pytest.mark.parametrize(("length", "size", "expected"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 3, [2]), (0, 3, [])])
def test_windows_and_their_number(length, size, expected):
    batches = [(torch.tensor([number]),) for number in range(length)]
    assert [len(window) for window in windows(batches, size)] == expected
    counted = [(len(window), last) for window, last in steps(batches, size, len(expected))]
    assert counted == list(zip(expected, [False] * (len(expected) - 1) + [True], strict=False))
    assert counted == [(len(window), last) for window, last in steps(iter(batches), size, 0)]  # without a known length
    if length:
        assert count_steps(ForeignLoader(batches), size) == len(expected)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((10, 3, None), 30), ((10, 3, 12), 12), ((10, None, 12), 12), ((0, 3, None), 0), ((0, 3, 5), 5)],
)
def test_the_steps_of_a_run(limits, expected):
    assert count_total(*limits) == expected


class Endless(IterableDataset):
    """No length; `rows` at most."""

    def __init__(self, rows=None):
        self.rows = rows

    def __iter__(self):
        number = 0
        while self.rows is None or number < self.rows:
            yield X[number % 70], Y[number % 70]
            number += 1


def test_data_without_a_length():
    trainer, record = fit(DataLoader(Endless(40), 16), max_epochs=2, val=DataLoader(Endless(20), 8))
    assert (trainer.state.step, trainer.state.epoch, trainer.state.batch) == (6, 2, 0)
    assert trainer.state.total_steps == trainer.state.steps_per_epoch == 0
    assert record.steps("val/loss") == [3, 6]
    assert fit(DataLoader(Endless(), 16), max_epochs=None, max_steps=4)[0].state.step == 4


class Lying(list):
    """A list of batches with a length of its own."""

    def __len__(self):
        return 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        (TensorSplit(X[:0], Y[:0]), "no batch"),
        (iter([(X, Y)]), "epoch 2 .* after 0 batches; can it be read only once"),
        (DataLoader(Endless(0), 16), "epoch 1 .* after 0 batches"),
        (Lying([(X, Y)] * 3), "ended after 3 batches; its length says 4"),
    ],
    ids=["list", "split", "iterator", "empty iterable", "short"],
)
def test_data_that_ends_too_early(data, message):
    with pytest.raises(DataError, match=message):
        fit(data)


def test_an_epoch_is_as_long_as_its_length():
    assert fit(Lying([(X, Y)] * 9))[0].state.step == 3 * 4


# accumulation


class Tokens(Task):
    """Sums over unequal numbers of items: the targets that are not -1, weighted by class."""

    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]), ignore_index=-1)

    def step(self, model, batch):
        outputs = model(batch[0])
        return Step(self.criterion(outputs, batch[1]), outputs, batch[1])

    def count(self, batch):
        kept = batch[1][batch[1] >= 0]
        return self.criterion.weight[kept].sum()


@pytest.mark.parametrize("task", [nn.CrossEntropyLoss(), Tokens()], ids=["samples", "weighted tokens"])
def test_accumulated_batches_are_one_big_batch(task):
    """Of 70 samples: big batches of 32, 32 and 6, small ones of 8, in windows of four and one that is left."""
    torch.manual_seed(1)
    targets = torch.where(torch.rand(70) < 0.3, -1, Y) if isinstance(task, Tokens) else Y
    ends = []
    for size, accumulate in ((32, 1), (8, 4)):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        split = TensorSplit(X.double(), targets)
        (task if isinstance(task, nn.Module) else task.criterion).double()
        ends.append(fit(split, model=model, task=task, batch_size=size, accumulate=accumulate))
    (big, ours), (small, theirs) = ends
    for one, two in zip(big.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-12)
    assert big.state.step == small.state.step == 9
    assert ours.of("train/loss") == pytest.approx(theirs.of("train/loss"), rel=1e-6)
