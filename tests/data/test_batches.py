"""From sources of data to batches, and from batches to steps."""

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

import framework as fw
from fits import SPLIT, Three, X, Y, fit, same
from framework import Callback, Step, Task, Trainer
from framework.data.accumulation import as_batches, count_steps, count_total, step_windows, windows
from framework.data.dataset import ForeignLoader, Loader, TensorSplit
from framework.errors import DataError, FrameworkError

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


def test_a_loader_is_used_unchanged():
    ours = Loader(SPLIT, 7, shuffle=True)
    foreign = ForeignLoader([])
    assert read(ours) is ours
    assert read(foreign) is foreign
    assert [len(batch[0]) for batch in read(SPLIT, shuffle=True).epoch()] == [16, 16, 16, 16, 6]


def test_a_data_is_an_error_that_names_its_splits():
    with pytest.raises(DataError, match=r"Three has several splits: .* `data\.test`"):
        read(Three())


@pytest.mark.parametrize(
    ("length", "size", "expected"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 3, [2]), (0, 3, [])]
)
def test_batches_are_grouped_into_steps(length, size, expected):
    batches = [(torch.tensor([number]),) for number in range(length)]
    assert [len(window) for window in windows(batches, size)] == expected
    last_only = [False] * (len(expected) - 1) + [True]
    for known_steps in (len(expected), 0):
        counted = [(len(window), last) for window, last in step_windows(batches, size, known_steps)]
        assert counted == list(zip(expected, last_only, strict=False))
    if length:
        assert count_steps(ForeignLoader(batches), size) == len(expected)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ((10, 3, None), 30),
        ((10, 3, 12), 12),
        ((10, None, 12), 12),
        ((0, 3, None), 0),
        ((0, 3, 5), 5),
    ],
)
def test_the_first_limit_determines_the_steps_of_a_run(limits, expected):
    assert count_total(*limits) == expected


class Endless(IterableDataset):
    """A stream without a length."""

    def __init__(self, rows=None):
        self.rows = rows

    def __iter__(self):
        number = 0
        while self.rows is None or number < self.rows:
            yield X[number % 70], Y[number % 70]
            number += 1


def test_a_fit_needs_no_length_of_the_data():
    trainer, record = fit(DataLoader(Endless(40), 16), max_epochs=2, val=DataLoader(Endless(20), 8))
    assert (trainer.state.step, trainer.state.epoch, trainer.state.batch) == (6, 2, 0)
    assert trainer.state.total_steps == trainer.state.steps_per_epoch == 0
    assert record.steps("val/loss") == [3, 6]
    assert fit(DataLoader(Endless(), 16), max_epochs=None, max_steps=4)[0].state.step == 4


class WrongLength(list):
    """A list of batches with a wrong length."""

    def __len__(self):
        return 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        (TensorSplit(X[:0], Y[:0]), "no batch"),
        (iter([(X, Y)]), "epoch 2 .* after 0 batches; can it be read only once"),
        (DataLoader(Endless(0), 16), "epoch 1 .* after 0 batches"),
        (WrongLength([(X, Y)] * 3), "ended after 3 batches; its length says 4"),
    ],
    ids=["list", "split", "iterator", "empty iterable", "short"],
)
def test_data_that_ends_too_early_is_an_error(data, message):
    with pytest.raises(DataError, match=message):
        fit(data)


def test_an_epoch_is_as_long_as_its_length():
    assert fit(WrongLength([(X, Y)] * 9))[0].state.step == 3 * 4


# the epoch of samplers and data sets


class Recording:
    """Records the epochs of `set_epoch`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class RecordingSampler(Recording, SequentialSampler): ...


class RecordingBatches(Recording, BatchSampler): ...


class RecordingSet(Recording, TensorDataset): ...


class RecordingStream(Recording, Endless): ...


class RecordingLoader(Recording, DataLoader): ...


class Wrapping:
    """A loader that wraps another one, for example to read ahead."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


def sources_with_epochs():
    """Return sources, and functions that return their parts with `set_epoch`."""
    data = RecordingSet(X, Y)
    subset = RecordingSet(X, Y)
    sampler = RecordingSampler(X)
    batches = RecordingBatches(sampler, 16, False)
    stream = RecordingStream(40)
    loader = RecordingLoader(data, 16)
    with_sampler = DataLoader(SPLIT, 16, sampler=RecordingSampler(X))
    with_batches = DataLoader(data, batch_sampler=batches)
    joined = ConcatDataset([subset, data])
    return {
        "sampler": (with_sampler, lambda source: [source.sampler]),
        "batch sampler": (with_batches, lambda _: [data, batches, sampler]),
        "stream": (DataLoader(stream, 16), lambda _: [stream]),
        "loader": (loader, lambda source: [source, source.dataset]),
        "subset": (DataLoader(Subset(subset, range(70)), 16), lambda _: [subset]),
        "joined": (DataLoader(joined, 16), lambda _: [subset, data]),
        "wrapped loader": (Wrapping(DataLoader(subset, 16)), lambda _: [subset]),
        "data set": (RecordingSet(X, Y), lambda source: [source]),
        "stream without a loader": (RecordingStream(40), lambda source: [source]),
    }


@pytest.mark.parametrize("name", sources_with_epochs())
def test_set_epoch_is_called_once_for_each_epoch_of_training(name):
    """Validations in the middle of an epoch read the same source without calling it."""
    source, find_parts = sources_with_epochs()[name]
    trainer, _ = fit(source, val=source, validate_every="2steps", max_epochs=3)
    parts = find_parts(source)
    assert [part.epochs for part in parts] == [[0, 1, 2]] * len(parts)
    saved = trainer.state_dict()
    fit(source, max_epochs=5, resume=saved)
    assert [part.epochs for part in parts] == [[0, 1, 2, 3, 4]] * len(parts)


def test_a_resumed_fit_sets_the_number_of_its_epoch():
    def cut(**settings):
        data = RecordingSet(X, Y)
        return data, fit(DataLoader(data, 16), **settings)[0]

    _, trainer = cut(max_epochs=None, max_steps=7)
    data, _ = cut(max_epochs=3, resume=trainer.state_dict())
    assert data.epochs == [1, 2]


# streams, and data that can be read once


def test_a_stream_of_samples_is_read_in_batches():
    expected, expected_record = fit(DataLoader(Endless(40), 16), val=DataLoader(Endless(40), 64))
    trainer, record = fit(Endless(40), val=Endless(40))
    assert same(trainer.model, expected.model)
    assert record.of("val/loss") == expected_record.of("val/loss")
    assert torch.equal(trainer.predict(Endless(40)), trainer.predict(X[:40]))
    in_memory = trainer.evaluate(TensorSplit(X[:40], Y[:40]))
    assert trainer.evaluate(Endless(40)) == pytest.approx(in_memory)


class Shared(IterableDataset):
    """Twelve samples, divided among the workers."""

    def __len__(self):
        return 12

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        numbers = range(12) if worker is None else range(worker.id, 12, worker.num_workers)
        for number in numbers:
            yield X[number], Y[number]


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_the_smaller_last_batch_of_each_worker_is_read():
    """Each of two workers ends with a smaller batch: four in all, though the length says three."""
    loader = DataLoader(Shared(), 4, num_workers=2)
    assert fit(loader, max_epochs=2)[0].state.samples == 24
    assert count_steps(ForeignLoader(DataLoader(Shared(), 4)), 1) == 3


def test_a_generator_is_enough_for_one_validation_only():
    def batches():
        return ((X[:20], Y[:20]) for _ in range(1))

    assert fit(val=batches(), max_epochs=1)[1].steps("val/loss") == [5]
    with pytest.raises(DataError, match="val: expected data for 3 validations, got a generator"):
        fit(val=batches())
    with pytest.raises(DataError, match="a generator, which can be read only once"):
        fit(val=batches(), validate_every="3steps")


def test_a_callback_cannot_take_batches_from_training():
    class Reads(Callback):
        def on_step_end(self, trainer):
            next(iter(trainer.train_batches.epoch()))

    with pytest.raises(DataError, match="can be read only once"):
        fit(iter([(X[:20], Y[:20])] * 4), callbacks=[Reads()])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("swa", {"start": 0}),
        ("confusion", {}),
        ("linear_probe", {"layer": "0"}),
        ("worst", {}),
        ("curves", {}),
    ],
)
def test_a_callback_that_reads_data_again_rejects_an_iterator(name, settings):
    def batches():
        return iter([(X[:35], Y[:35]), (X[35:], Y[35:])])

    callback = fw.callbacks.build(name, **settings)
    said = f"callbacks.{name}: expected data that can be read again, got a list_iterator"
    with pytest.raises(DataError, match=said):
        fit(batches(), callbacks=[callback], val=batches(), max_epochs=1)


class Lengthless(Dataset):
    def __getitem__(self, index):
        return X[index], Y[index]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (3, "expected a split, a Data .* got 3"),
        (None, "got None"),
        (Lengthless(), "Lengthless has no `__len__`"),
        ([((X, X), Y)], r"the fields 0\.0 \(70, 6\), .* task.inputs=0 task.target=1"),
        ([(X.numpy(), Y.numpy())], r"got tuple \(tuple of ndarray, ndarray\); torch.as_tensor"),
        ([X.numpy()], r"got ndarray \(ndarray\); torch.as_tensor"),
        ([{"x": X, "y": Y}], r"the fields x \(70, 6\), y \(70,\), .* task.inputs=x task.target=y"),
        ([()], "an empty tuple"),
    ],
    ids=range(8),
)
def test_a_wrong_source_is_named(source, said):
    with pytest.raises(FrameworkError, match=said):
        fit(source)


@pytest.mark.parametrize(
    "source",
    [
        DataLoader([(X[:35], Y[:35]), (X[35:], Y[35:])], batch_size=None),
        [(X[:35], Y[:35]), (X[35:], Y[35:])],
        ((x, y) for x, y in [(X[:35], Y[:35]), (X[35:], Y[35:])]),
    ],
    ids=["batch_size=None", "list", "generator"],
)
def test_a_fit_takes_any_iterable_of_batches(source):
    assert fit(source, max_epochs=1)[0].state.samples == 70


def test_samples_of_numpy_are_stacked():
    rows = [(x.numpy(), int(y)) for x, y in zip(X, Y, strict=True)]

    class Rows(Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    assert same(fit(Rows())[0].model, fit()[0].model)


# predictions


@pytest.mark.parametrize(
    "inputs",
    [
        torch.tensor([[2.0**53 - 1, 0.1]], dtype=torch.float64),
        torch.tensor([[2**53 + 1, 2**24 + 1]]),
        torch.tensor([[1 + 2j, -3j]]),
        torch.tensor([[True, False]]),
        torch.tensor([[1, 255]], dtype=torch.uint8),
        torch.tensor([[0.1, 2.0]]),
    ],
    ids=lambda inputs: str(inputs.dtype),
)
def test_predictions_keep_their_dtype(inputs):
    found = Trainer(max_steps=1, device="cpu").predict(inputs, model=nn.Identity())
    assert found.dtype == inputs.dtype
    assert torch.equal(found, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_predictions_of_16_bits_become_float32(dtype):
    inputs = torch.tensor([[0.1, 2.0]], dtype=dtype)
    found = Trainer(max_steps=1, device="cpu").predict(inputs, model=nn.Identity())
    assert found.dtype == torch.float32
    assert torch.equal(found, inputs.float())


# accumulation


class Tokens(Task):
    """Averages over the targets that are not -1, weighted by class."""

    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]), ignore_index=-1)

    def step(self, model, batch):
        outputs = model(batch[0])
        return Step(self.criterion(outputs, batch[1]), outputs, batch[1])

    def count(self, batch):
        kept = batch[1][batch[1] >= 0]
        return self.criterion.weight[kept].sum()


@pytest.mark.parametrize(
    "task", [nn.CrossEntropyLoss(), Tokens()], ids=["samples", "weighted tokens"]
)
def test_accumulated_batches_are_equal_to_one_big_batch(task):
    """70 samples: batches of 32, 32 and 6, or windows of four batches of 8 and one last batch."""
    torch.manual_seed(1)
    targets = Y
    if isinstance(task, Tokens):
        targets = torch.where(torch.rand(70) < 0.3, -1, Y)
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
