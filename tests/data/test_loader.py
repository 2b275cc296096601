"""Loaders: the order of samples, the ways of reading, and errors of samples."""

import multiprocessing
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    get_worker_info,
)

from framework import Trainer
from framework.composition.spec import Spec
from framework.data.dataset import Data, ForeignLoader, Loader, RaggedSplit, TensorSplit
from framework.errors import DataError
from framework.experiment.build import build_loader
from framework.runtime import seeds
from framework.runtime.copy_stream import one_ahead

SIZE = 23
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")  # as it is for a GPU


class Squares(Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return torch.tensor([float(index)]), torch.tensor(index**2)


class Noisy(Squares):
    """Draws from every global generator, as random augmentation does."""

    def __getitem__(self, index):
        return torch.rand(2), torch.tensor([random.random(), np.random.rand()])


def as_lists(batch):
    return tuple(part.tolist() for part in batch)


def batches(loader, epoch=0, start=0):
    return [as_lists(batch) for batch in loader.epoch(epoch, start)]


def in_memory():
    index = torch.arange(SIZE)
    return TensorSplit(index[:, None].float(), index**2)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_tensors_and_samples_with_any_number_of_workers_give_the_same_batches(workers, drop_last):
    settings = {"batch_size": 5, "drop_last": drop_last, "shuffle": True, "seed": 7}
    expected = batches(Loader(in_memory(), **settings), epoch=2)
    loader = Loader(Squares(), workers=workers, **settings)
    assert batches(loader, epoch=2) == expected
    assert len(loader) == len(expected) == (4 if drop_last else 5)


def test_the_order_depends_on_seed_and_epoch_only():
    loader = Loader(in_memory(), batch_size=5, shuffle=True, seed=7)
    order = []
    for _, squares in batches(loader, epoch=3):
        order += squares
    assert order == (seeds.order(7, 3, SIZE) ** 2).tolist()
    assert batches(loader, 3) == batches(loader, 3) != batches(loader, 4)
    assert batches(loader, 3) != batches(Loader(in_memory(), batch_size=5, shuffle=True, seed=8), 3)


@pytest.mark.parametrize("split", [in_memory(), Noisy()])
@pytest.mark.parametrize("start", [0, 3, 5, 9])
def test_an_epoch_continues_from_any_batch(split, start):
    loader = Loader(split, batch_size=5, shuffle=True)
    assert batches(loader, 1, start) == batches(loader, 1)[start:]


def test_evaluation_keeps_the_order_and_every_sample():
    loader = Loader(in_memory(), eval_batch_size=10, drop_last=True)
    assert [len(y) for _, y in batches(loader)] == [10, 10, 3]
    order = []
    for _, squares in batches(loader):
        order += squares
    assert order == [index**2 for index in range(SIZE)]


def test_writing_into_a_batch_does_not_change_the_data():
    split = in_memory()
    next(Loader(split).epoch())[0].fill_(-1)
    assert split.tensors[0].min() == 0


def test_random_samples_are_the_same_with_any_number_of_workers():
    expected = batches(Loader(Noisy(), batch_size=5, shuffle=True), epoch=1)
    for workers in (1, 2):
        loader = Loader(Noisy(), batch_size=5, workers=workers, shuffle=True)
        assert batches(loader, epoch=1) == expected
    assert batches(Loader(Noisy(), batch_size=5, shuffle=True), epoch=2) != expected


def test_random_samples_are_the_same_with_any_batch_size():
    def samples(batch_size):
        rows = []
        for x, _ in batches(Loader(Noisy(), batch_size=batch_size, shuffle=True), epoch=1):
            rows += x
        return rows

    assert samples(4) == samples(5)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_does_not_advance_the_global_generators(workers):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seeds.seed_everything(1)
    expected = draws()
    seeds.seed_everything(1)
    batches(Loader(Noisy(), workers=workers, shuffle=True))
    assert draws() == expected


# balanced classes


class Labelled(Dataset):
    """Is read sample by sample, but knows its classes, like a folder of pictures."""

    def __init__(self, split):
        self.split = split
        self.labels = split.tensors[1]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.split[index]


def rare(labelled=False):
    """Return 100 samples of four classes with 1, 4, 10 and 85 samples."""
    classes = torch.full((100,), 3)
    classes[60:70] = 0
    classes[:4] = 5
    classes[7] = 1
    split = TensorSplit(torch.arange(100)[:, None].float(), classes)
    return Labelled(split) if labelled else split


def drawn(loader, epochs):
    """Return the rows and the classes of all samples of some epochs."""
    rows = []
    classes = []
    for epoch in epochs:
        for inputs, targets in loader.epoch(epoch):
            rows.append(inputs)
            classes.append(targets)
    return torch.cat(rows).flatten().long(), torch.cat(classes)


def test_every_class_is_drawn_equally_often_and_so_is_each_sample_of_it():
    rows, classes = drawn(Loader(rare(), sampling="weighted", shuffle=True, seed=3), range(100))
    assert len(rows) == 100 * 100, "an epoch is as long as without"
    assert torch.equal(rare()[rows][1], classes)
    share = classes.bincount() / len(classes)
    tolerance = 5 * 0.0043  # five standard deviations
    torch.testing.assert_close(share[[0, 1, 3, 5]], torch.full((4,), 0.25), atol=tolerance, rtol=0)
    within = rows[classes == 0].bincount()[60:70] / (classes == 0).sum()
    torch.testing.assert_close(within, torch.full((10,), 0.1), atol=5 * 0.006, rtol=0)
    others = {0, 1, 2, 3, 7, *range(60, 70)}
    assert set(rows[classes == 3].tolist()) == set(range(100)) - others


@pytest.mark.parametrize("labelled", [False, True])
def test_balanced_draws_depend_on_seed_and_epoch_only(labelled):
    loader = Loader(rare(labelled), batch_size=8, sampling="weighted", shuffle=True, seed=3)
    expected = batches(Loader(rare(), batch_size=8, sampling="weighted", shuffle=True, seed=3), 5)
    assert batches(loader, 5) == expected != batches(loader, 6)
    assert batches(loader, 5, start=7) == expected[7:]
    rows = torch.cat([inputs for inputs, _ in list(loader.epoch(5))[2:4]])
    assert rows.flatten().tolist() == loader.indices(5, 2, 2)
    assert loader.description.endswith(", balanced classes")


def test_evaluation_does_not_balance_classes():
    plain = Loader(rare(), sampling="weighted")
    assert batches(plain) == batches(Loader(rare()))
    values = TensorSplit(torch.zeros(4, 1), torch.zeros(4, 1))
    assert len(Loader(values, sampling="weighted")) == 1, (
        "without training any targets are accepted"
    )


@pytest.mark.parametrize(
    "split",
    [
        TensorSplit(torch.zeros(4, 1), torch.zeros(4, 1)),
        TensorSplit(torch.zeros(4, 1), torch.zeros(4, 3)),
        Squares(),
        RaggedSplit([torch.ones(2), torch.ones(3)], torch.tensor([0, 1])),
    ],
    ids=["values", "labels", "not in memory", "texts"],
)
def test_balancing_needs_known_classes(split):
    name = type(split).__name__
    with pytest.raises(DataError, match=rf"loader\.sampling=weighted: .*classes.*got {name}"):
        Loader(split, sampling="weighted", shuffle=True)


class Faulty(Squares):
    def __init__(self, fault):
        self.fault = fault

    def __getitem__(self, index):
        if index == 17:
            self.fault()
        return super().__getitem__(index)


def divide():
    return 1 / 0


def refuse():
    raise DataError("17.png cannot be read")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_the_sample_and_the_line_of_code(workers):
    cause = r"ZeroDivisionError: .* \(.*test_loader.py:\d+ in divide\)"
    with pytest.raises(DataError, match=f"^sample 17 cannot be read: {cause}$"):
        batches(Loader(Faulty(divide), workers=workers))
    with pytest.raises(DataError, match=r"^17.png cannot be read$"):
        batches(Loader(Faulty(refuse), workers=workers))


def test_a_worker_ignores_the_signals_of_a_scheduler():
    assert get_worker_info() is None
    expected = batches(Loader(Squares(), eval_batch_size=5))
    assert batches(Loader(Faulty(terminate), eval_batch_size=5, workers=1)) == expected


class Ragged(Squares):
    def __getitem__(self, index):
        return torch.zeros(index), torch.tensor(0)


class Dicts(Squares):
    def __getitem__(self, index):
        return {"x": np.zeros(1), "y": None} if index else {"x": np.zeros(1)}


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_cannot_form_a_batch_are_an_error(workers):
    with pytest.raises(DataError, match="expected one shape"):
        batches(Loader(Ragged(), workers=workers))
    with pytest.raises(DataError, match="samples of a batch have different fields: x; x, y"):
        batches(Loader(Dicts(), workers=workers))


def test_a_tensor_dataset_is_read_in_memory():
    assert isinstance(Loader(TensorDataset(torch.zeros(4, 2), torch.zeros(4))).split, TensorSplit)
    assert batches(Loader([(torch.tensor(1.0), torch.tensor(2))])) == [([1.0], [2])]


def test_drop_last_has_to_leave_a_batch():
    with pytest.raises(DataError, match="drop_last leaves no batch: 23 samples, batch_size 32"):
        Loader(in_memory(), drop_last=True, shuffle=True)


def test_a_foreign_loader_gives_the_batches_of_its_iterable():
    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            self.epoch = epoch

    torch_loader = DataLoader(Squares(), batch_size=10, sampler=Sampler(Squares()))
    loader = ForeignLoader(torch_loader)
    assert len(loader) == 3
    assert batches(loader, epoch=4, start=1) == batches(Loader(Squares(), eval_batch_size=10))[1:]
    assert torch_loader.sampler.epoch == 4
    assert batches(ForeignLoader([torch.ones(2)])) == [([1.0, 1.0],)]


class Doubled(TensorDataset):
    """Has samples other than the rows of its tensors."""

    def __getitem__(self, index):
        return tuple(2 * tensor[index] for tensor in self.tensors)


class DoubledSplit(TensorSplit):
    def __getitem__(self, index):
        return tuple(2 * tensor for tensor in super().__getitem__(index))


@pytest.mark.parametrize("kind", [Doubled, DoubledSplit])
@pytest.mark.parametrize("read", ["auto", "memory", "workers"])
def test_the_getitem_of_a_subclass_is_used(kind, read):
    tensors = torch.arange(7.0), torch.arange(7)
    loader = Loader(kind(*tensors), eval_batch_size=3, read=read).to(CPU)
    doubled = [2 * tensor for tensor in tensors]
    expected = Loader(TensorSplit(*doubled), eval_batch_size=3)
    assert batches(loader) == batches(expected)


def test_samples_that_depend_on_the_epoch_cannot_be_cached():
    class Epochs(Squares):
        def set_epoch(self, epoch):
            self.epoch = epoch

    with pytest.raises(DataError, match=r"^loader\.read=memory .*Epochs has `set_epoch`"):
        Loader(Epochs(), read="memory")


def test_a_stream_is_not_a_split():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(DataError, match=r"expected a split with `__len__` .* got Stream"):
        Loader(Stream())


# the setting `read`


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shuffle", [False, True])
def test_memory_and_workers_give_the_same_batches(workers, shuffle):
    settings = {
        "batch_size": 5,
        "eval_batch_size": 5,
        "shuffle": shuffle,
        "seed": 7,
        "workers": workers,
    }
    expected = batches(Loader(in_memory(), **settings), epoch=2)
    cached = Loader(Squares(), read="memory", **settings)
    assert batches(cached, epoch=2) == expected, "before it is read"
    assert batches(cached.to(CPU), epoch=2) == expected
    assert batches(cached, 2, start=3) == expected[3:]
    assert batches(Loader(in_memory(), read="workers", **settings).to(CPU), epoch=2) == expected


def test_a_cached_split_is_read_once():
    class Counting(Squares):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    split = Counting()
    loader = Loader(split, read="memory", shuffle=True).to(CPU)
    read = split.reads
    assert read >= SIZE
    for epoch in range(3):
        batches(loader.to(CPU), epoch)
    assert split.reads == read


def test_the_description_says_how_batches_are_read():
    assert Loader(in_memory()).description == "in memory, 1 batches per read"
    with_workers = Loader(in_memory(), read="workers", workers=2)
    assert with_workers.description == "torch's DataLoader, 2 workers"
    cached = Loader(Squares(), read="memory")
    assert cached.description == "in memory after one pass of torch's DataLoader, no workers"
    assert cached.to(CPU).description == "in memory, 1 batches per read"


class OwnGenerator(Squares):
    """Draws from a generator with a random seed."""

    def __getitem__(self, index):
        return torch.tensor(np.random.default_rng().random()), torch.tensor(0)


class SeldomRandom(Squares):
    """Is random in one sample, which a test of a few samples misses."""

    def __getitem__(self, index):
        return torch.rand(1) if index == 11 else torch.zeros(1), torch.tensor(0)


RANDOM_SPLITS = {
    "every sample": (Noisy(), "one of the samples 0 to 22 draws random numbers"),
    "own generator": (OwnGenerator(), "a sample differs when it is read again"),
    "one sample": (SeldomRandom(), "one of the samples 0 to 22 draws random numbers"),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("split", "evidence"), RANDOM_SPLITS.values(), ids=RANDOM_SPLITS)
def test_random_samples_cannot_be_cached(split, evidence, workers):
    name = type(split).__name__
    with pytest.raises(DataError, match=f"^loader.read=memory: .*{name} .*: {evidence}$"):
        Loader(split, read="memory", workers=workers).to(CPU)


def test_a_split_larger_than_memory_is_an_error_before_it_is_read():
    class Huge(Squares):
        def __len__(self):
            return 10**15

        def __getitem__(self, index):
            return torch.zeros(1), torch.tensor(0)

    with pytest.raises(DataError, match=r"^loader.read=memory: Huge .* 1\.12e\+07 GiB; .* free$"):
        Loader(Huge(), read="memory")


class WideLater(Squares):
    """Samples that have another shape from an index on."""

    def __init__(self, size, wide_from):
        self.size = size
        self.wide_from = wide_from

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.zeros(1 + (index >= self.wide_from)), torch.tensor(0)


def test_samples_of_several_shapes_cannot_be_cached():
    with pytest.raises(DataError, match="expected one shape"):
        Loader(WideLater(23, 11), read="memory").to(CPU)
    loader = Loader(WideLater(66, 99), read="memory")
    loader.split.wide_from = 64
    with pytest.raises(DataError, match=r"one shape .*\[1\] torch.float32, sample 64 is \[2\]"):
        loader.to(CPU)


def test_a_cached_split_needs_every_sample():
    with pytest.raises(DataError, match=r"loader\.on_bad_sample=skip"):
        Loader(Squares(), read="memory", on_bad_sample="skip")
    with pytest.raises(DataError, match=r"^sample 17 cannot be read: ZeroDivisionError"):
        Loader(Faulty(divide), read="memory").to(CPU)


# a batch in one call


class AtOnce(Squares):
    """Has `__getitems__`, as a data set that reads from a database; counts the calls."""

    def __init__(self, at_once=lambda indices: None, one=lambda index: None):
        self.at_once = at_once
        self.one = one
        self.calls = {"at once": 0, "one": 0}

    def draw(self):
        return torch.zeros(1)

    def __getitem__(self, index):
        self.calls["one"] += 1
        self.one(index)
        return self.sample(index)

    def __getitems__(self, indices):
        self.calls["at once"] += 1
        self.at_once(indices)
        return map(self.sample, indices)

    def sample(self, index):
        return torch.tensor([float(index)]) + self.draw(), torch.tensor(index**2)


class AugmentedAtOnce(AtOnce):
    def draw(self):
        return torch.rand(1)


class Augmented(Squares):
    def __getitem__(self, index):
        return torch.tensor([float(index)]) + torch.rand(1), torch.tensor(index**2)


def test_getitems_is_called_once_per_batch():
    split = AtOnce()
    expected = batches(Loader(Squares(), eval_batch_size=5))
    assert batches(Loader(split, eval_batch_size=5)) == expected
    assert split.calls == {"at once": 5, "one": 0}


@pytest.mark.parametrize("workers", [0, 1])
def test_random_samples_are_read_one_by_one_despite_getitems(workers):
    settings = {"shuffle": True, "seed": 7, "workers": workers}
    split = AugmentedAtOnce()
    expected = batches(Loader(Augmented(), batch_size=5, **settings), epoch=1)
    assert batches(Loader(split, batch_size=5, **settings), epoch=1) == expected
    if not workers:
        assert split.calls == {"at once": 1, "one": SIZE}, "found in the first batch"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_of_getitems_is_named_or_skipped(workers):
    def one(index):
        if index == 17:
            raise OSError("no such file")

    split = AtOnce(lambda indices: [one(index) for index in indices], one)
    cause = r"OSError: no such file \(.*test_loader.py:\d+ in .*\)"
    with pytest.raises(DataError, match=f"^sample 17 cannot be read: {cause}$"):
        batches(Loader(split, workers=workers))
    skipping = Loader(split, eval_batch_size=5, workers=workers, on_bad_sample="skip")
    with pytest.warns(UserWarning, match="^sample 17 .*skipped"):
        assert [len(y) for _, y in batches(skipping)] == [5, 5, 5, 4, 3]
    assert skipping.skipped == 1


def one_less(indices):
    indices.pop()


@pytest.mark.parametrize(
    ("fault", "cause"),
    [(lambda _: divide(), "ZeroDivisionError"), (one_less, "it returns 22 samples for 23 indices")],
)
def test_an_error_of_getitems_alone_is_reported(fault, cause):
    with pytest.raises(DataError, match=f"begins with sample 0, .*: {cause}"):
        batches(Loader(AtOnce(fault)))


def test_a_batch_that_hangs_is_named_by_its_first_sample():
    def hang(indices):
        if 17 in indices:
            threading.Event().wait()

    said = r"loader\.timeout_seconds=1: .*data worker .*batch that begins with sample 15 hangs"
    with pytest.raises(DataError, match=said):
        batches(Loader(AtOnce(hang), eval_batch_size=5, workers=1, timeout_seconds=1.0))


# copies ahead


class Recorder:
    """Replaces the copies to a GPU; counts the copies that have begun."""

    def __init__(self):
        self.begun = []

    def ahead(self, reads):
        return one_ahead(map(self._begin, reads))

    def _begin(self, read):
        self.begun.append(len(self.begun))
        return read


def test_a_copy_begins_while_the_previous_batch_is_used():
    loader = Loader(Squares(), batch_size=5, shuffle=True)
    expected = batches(loader, epoch=1)
    loader.copies = Recorder()
    got = []
    for batch in loader.epoch(1):
        got.append(as_lists(batch))
        assert len(loader.copies.begun) == min(len(got) + 1, 5)
    assert got == expected
    assert batches(loader, epoch=1, start=3) == expected[3:]
    assert batches(loader, epoch=1, start=5) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_ahead_is_raised_after_the_batches_before_it(workers):
    loader = Loader(Faulty(divide), eval_batch_size=5, workers=workers)
    loader.copies = Recorder()
    got = []
    with pytest.raises(DataError, match=r"^sample 17 cannot"):
        got.extend(len(x) for x, _ in loader.epoch())
    assert got == [5, 5, 5]

    def raising():
        yield from (1, 2)
        raise OSError("gone")

    items = one_ahead(raising())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(OSError, match="gone"):
        next(items)


def test_a_sample_skipped_ahead_counts_with_its_batch():
    loader = Loader(Faulty(divide), eval_batch_size=5, on_bad_sample="skip")
    loader.copies = Recorder()
    reader = loader.epoch()
    assert [(len(next(reader)[0]), loader.skipped) for _ in range(3)] == [(5, 0)] * 3
    with pytest.warns(UserWarning, match="skipped"):
        assert (len(next(reader)[0]), loader.skipped) == (4, 1)


def test_closing_an_epoch_early_ends_its_workers():
    loader = Loader(Squares(), eval_batch_size=2, workers=1)
    loader.copies = Recorder()
    reader = loader.epoch()
    next(reader)
    assert multiprocessing.active_children()
    reader.close()
    assert not multiprocessing.active_children()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("foreign", [False, True])
def test_batches_copied_ahead_to_a_gpu_are_the_same(foreign, workers):
    if foreign:
        expected = batches(Loader(Squares(), eval_batch_size=2))
        loader = ForeignLoader(DataLoader(Squares(), batch_size=2, pin_memory=True))
    else:
        expected = batches(Loader(Squares(), batch_size=2, shuffle=True), 1)
        loader = Loader(Squares(), batch_size=2, workers=workers, shuffle=True)
    got = []
    for batch in loader.to(torch.device("cuda")).epoch(1):
        assert all(part.is_cuda for part in batch)
        torch.cuda._sleep(10_000_000)  # the device lags, so that memory is requested again early
        got.append([part.clone() for part in batch])
    assert list(map(as_lists, got)) == expected


# channels last


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("read", ["memory", "workers"])
def test_channels_last_gives_the_same_images_with_other_strides(channels, read):
    images = torch.arange(7.0 * channels * 4 * 5).reshape(7, channels, 4, 5)
    split = TensorSplit(images, torch.arange(7))
    settings = {"batch_size": 3, "shuffle": True, "read": read}
    channels_first = list(Loader(split, **settings).to(CPU).epoch(1))
    loader = Loader(split, channels_last=True, **settings).to(CPU)
    assert loader.description.endswith(", channels last")
    convolution = torch.nn.Conv2d(channels, 2, 3)
    for (x, y), (same_x, same_y) in zip(channels_first, loader.epoch(1), strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
        assert same_x.stride() == (channels * 20, 1, channels * 5, channels)
        outputs = convolution(same_x)
        assert outputs.is_contiguous(memory_format=torch.channels_last)


def convolution(inputs, outputs, stride=1, size=3):
    return torch.nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)


IMAGE_MODELS = {  # layers, and the choice of auto
    "pooled between": ([convolution(3, 4), torch.nn.MaxPool2d(2), convolution(4, 4)], "last"),
    "strided": ([convolution(3, 4), convolution(4, 4, stride=2)], "last"),
    "strided from the first on": (
        [convolution(3, 4, stride=2), convolution(4, 4, stride=2)],
        "last",
    ),
    "all of one size": (
        [convolution(3, 4), convolution(4, 4), torch.nn.MaxPool2d(3, 1, 1)],
        "first",
    ),
    "patches, then of one size": ([torch.nn.Conv2d(3, 4, 4, 4), convolution(4, 4)], "first"),
    "patches only": ([torch.nn.Conv2d(3, 4, 4, 4), torch.nn.Flatten()], None),
    "no convolution": ([torch.nn.Flatten(), torch.nn.Linear(192, 4)], None),
}


@pytest.mark.parametrize(("layers", "choice"), IMAGE_MODELS.values(), ids=IMAGE_MODELS)
def test_auto_chooses_channels_last_for_convolutions_on_images_that_become_smaller(layers, choice):
    model = torch.nn.Sequential(*layers)
    split = TensorSplit(torch.randn(6, 3, 8, 8), torch.arange(6))
    loader = Loader(split, eval_batch_size=4, model=model)
    images, _ = next(loader.epoch())
    assert images.stride() == ((192, 1, 24, 3) if choice == "last" else (192, 64, 8, 1))
    text = "" if choice is None else f", channels {choice} (2 convolutions, "
    assert loader.description.startswith(f"in memory, 2 batches per read{text}")
    assert choice is not None or "channels" not in loader.description


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_the_setting_channels_last_overrides_the_choice(name, channels_last):
    model = torch.nn.Sequential(*IMAGE_MODELS[name][0])
    split = TensorSplit(torch.randn(6, 3, 8, 8), torch.arange(6))
    loader = Loader(split, eval_batch_size=4, model=model, channels_last=channels_last)
    assert (next(loader.epoch())[0].stride(1) == 1) is channels_last
    assert loader.description.endswith(", channels last") is channels_last


@pytest.mark.parametrize("kind", ["split", "DataLoader", "list"])
@pytest.mark.parametrize("channels_last", [False, True, "auto"])
def test_fit_converts_images_of_any_source_for_training_and_validation(kind, channels_last):
    """The values stay the same, and the result differs by rounding only."""
    images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(12) % 3
    sources = {
        "split": TensorSplit(images, targets),
        "DataLoader": DataLoader(TensorDataset(images, targets), 4),
        "list": [(images[:4], targets[:4]), (images[4:8], targets[4:8])],
    }
    read = []

    def train(channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2),
            nn.Conv2d(4, 4, 3, stride=2),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
        hook = model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        trainer = Trainer(max_epochs=2)
        trainer.fit(
            model,
            sources[kind],
            val=sources[kind],
            task=nn.CrossEntropyLoss(),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            batch_size=4,
            channels_last=channels_last,
        )
        hook.remove()
        return trainer, [parameter.detach() for parameter in model.parameters()]

    trainer, parameters = train(channels_last)
    assert all((batch.stride(1) == 1) == bool(channels_last) for batch in read[1:])  # [0]: a check
    assert ("channels last" in trainer.state.reading) == bool(channels_last)
    for ours, expected in zip(parameters, train(False)[1], strict=True):
        torch.testing.assert_close(ours, expected)


def test_auto_without_a_model_does_not_change_images():
    images, _ = next(Loader(TensorSplit(torch.randn(6, 3, 8, 8), torch.arange(6))).epoch())
    assert images.is_contiguous()


class Pictures(Data):
    """Random samples of a shape; no test split."""

    def __init__(self, *shape):
        self.in_shape = shape
        self.out_shape = (2,)
        targets = torch.zeros(6, dtype=torch.int64)
        self.train = self.val = TensorSplit(torch.randn(6, *shape), targets)


def test_the_loaders_of_a_run_depend_on_its_model():
    model = torch.nn.Sequential(*IMAGE_MODELS["strided"][0])
    spec = Spec(sections={"loader": {"batch_size": 4, "eval_batch_size": 5}}, seed=3)
    train = build_loader(spec, model, Pictures(3, 8, 8), "train", shuffle=True)
    val = build_loader(spec, model, Pictures(3, 8, 8), "val")
    assert (train.batch_size, train.seed, train.shuffle) == (4, 3, True)
    assert (val.batch_size, val.shuffle) == (5, False)
    assert train.memory_format.channels_last
    assert val.memory_format.channels_last
    unflattening = torch.nn.Sequential(torch.nn.Unflatten(1, (3, 8, 8)), model)
    flat = build_loader(spec, unflattening, Pictures(192), "train")
    assert "channels" not in flat.description, "it does not read images"
    with pytest.raises(DataError, match="Pictures has no test split"):
        build_loader(spec, model, Pictures(3, 8, 8), "test")


def test_training_with_channels_last_differs_by_rounding_only():
    torch.manual_seed(0)
    images = torch.randn(40, 3, 8, 8, dtype=torch.float64)
    split = TensorSplit(images, (images.mean((1, 2, 3)) > 0).long())
    ends = []
    for forced in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            convolution(3, 4), torch.nn.ReLU(), convolution(4, 4, stride=2), torch.nn.Flatten()
        )
        model = torch.nn.Sequential(model, torch.nn.Linear(64, 2)).double()
        loader = Loader(split, 8, shuffle=True, channels_last=forced)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        start = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        Trainer(max_epochs=4, device="cpu").fit(
            model, loader, task=torch.nn.CrossEntropyLoss(), optimizer=optimizer
        )
        ends.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert (ends[0] - start).abs().max() > 0.05, "the weights have changed"
    assert torch.allclose(*ends, rtol=1e-7, atol=1e-10)


def test_channels_last_does_not_change_other_inputs():
    loader = Loader(in_memory(), channels_last=True, batch_size=5, shuffle=True)
    assert batches(loader, 2) == batches(Loader(in_memory(), batch_size=5, shuffle=True), 2)
