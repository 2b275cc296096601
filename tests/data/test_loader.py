import multiprocessing
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
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


def batches(loader, epoch=0, start=0):
    return [tuple(part.tolist() for part in batch) for batch in loader.epoch(epoch, start)]


def in_memory():
    index = torch.arange(SIZE)
    return TensorSplit(index[:, None].float(), index**2)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_all_ways_of_reading_give_the_same_batches(workers, drop_last):
    settings = {"batch_size": 5, "drop_last": drop_last, "shuffle": True, "seed": 7}
    expected = batches(Loader(in_memory(), **settings), epoch=2)
    loader = Loader(Squares(), workers=workers, **settings)
    assert batches(loader, epoch=2) == expected
    assert len(loader) == len(expected) == (4 if drop_last else 5)


def test_the_order_is_a_function_of_seed_and_epoch():
    loader = Loader(in_memory(), batch_size=5, shuffle=True, seed=7)
    order = [index for _, squares in batches(loader, epoch=3) for index in squares]
    assert order == (seeds.order(7, 3, SIZE) ** 2).tolist()
    assert batches(loader, 3) == batches(loader, 3) != batches(loader, 4)
    assert batches(loader, 3) != batches(Loader(in_memory(), batch_size=5, shuffle=True, seed=8), 3)


@pytest.mark.parametrize("split", [in_memory(), Noisy()])
@pytest.mark.parametrize("start", [0, 3, 5, 9])
def test_an_epoch_goes_on_where_it_was_left(split, start):
    loader = Loader(split, batch_size=5, shuffle=True)
    assert batches(loader, 1, start) == batches(loader, 1)[start:]


def test_evaluation_keeps_the_order_and_every_sample():
    loader = Loader(in_memory(), eval_batch_size=10, drop_last=True)
    assert [len(y) for _, y in batches(loader)] == [10, 10, 3]
    assert [i for _, y in batches(loader) for i in y] == [i**2 for i in range(SIZE)]


def test_a_batch_is_no_view_of_the_data():
    split = in_memory()
    next(Loader(split).epoch())[0].fill_(-1)
    assert split.tensors[0].min() == 0


def test_random_reading_is_the_same_for_any_number_of_workers():
    expected = batches(Loader(Noisy(), batch_size=5, shuffle=True), epoch=1)
    for workers in (1, 2):
        assert (
            batches(Loader(Noisy(), batch_size=5, workers=workers, shuffle=True), epoch=1)
            == expected
        )
    assert batches(Loader(Noisy(), batch_size=5, shuffle=True), epoch=2) != expected
    by_sample = dict(
        zip(seeds.order(0, 1, SIZE).tolist(), (row for x, _ in expected for row in x), strict=True)
    )
    rebatched = batches(Loader(Noisy(), batch_size=4, shuffle=True), epoch=1)
    assert [row for x, _ in rebatched for row in x] == [
        by_sample[i] for i in seeds.order(0, 1, SIZE).tolist()
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_generators_alone(workers):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    batches(Loader(Noisy(), workers=workers, shuffle=True))
    assert draws() == expected


# classes drawn evenly


class Labelled(Dataset):
    """Read sample by sample, but with known classes, as a folder of pictures is."""

    def __init__(self, split):
        self.split, self.labels = split, split.tensors[1]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.split[index]


def rare(labelled=False):
    """Sample 7 is the only one of its class, of four: 1, 4, 10 and 85 of 100."""
    classes = (
        torch.full((100,), 3)
        .index_fill(0, torch.arange(60, 70), 0)
        .index_fill(0, torch.arange(4), 5)
    )
    classes[7] = 1
    split = TensorSplit(torch.arange(100)[:, None].float(), classes)
    return Labelled(split) if labelled else split


def drawn(loader, epochs):
    parts = [
        torch.cat(column)
        for e in epochs
        for column in [list(t) for t in zip(*loader.epoch(e), strict=True)]
    ]
    return torch.cat(parts[::2]).flatten().long(), torch.cat(parts[1::2])


def test_every_class_is_drawn_equally_often_and_so_is_each_sample_of_it():
    rows, classes = drawn(Loader(rare(), sampling="weighted", shuffle=True, seed=3), range(100))
    assert len(rows) == 100 * 100, "an epoch is as long as without"
    assert torch.equal(rare()[rows][1], classes)
    share = classes.bincount() / len(classes)
    torch.testing.assert_close(
        share[[0, 1, 3, 5]], torch.full((4,), 0.25), atol=5 * 0.0043, rtol=0
    )  # 5 deviations
    within = rows[classes == 0].bincount()[60:70] / (classes == 0).sum()
    torch.testing.assert_close(within, torch.full((10,), 0.1), atol=5 * 0.006, rtol=0)
    assert set(rows[classes == 3].tolist()) == set(range(100)) - {0, 1, 2, 3, 7} - set(
        range(60, 70)
    )


@pytest.mark.parametrize("labelled", [False, True])
def test_what_is_drawn_is_a_function_of_seed_and_epoch(labelled):
    loader = Loader(rare(labelled), batch_size=8, sampling="weighted", shuffle=True, seed=3)
    expected = batches(Loader(rare(), batch_size=8, sampling="weighted", shuffle=True, seed=3), 5)
    assert batches(loader, 5) == expected != batches(loader, 6)
    assert batches(loader, 5, start=7) == expected[7:]
    assert [row for rows, _ in expected[2:4] for (row,) in rows] == loader.indices(5, 2, 2)
    assert "classes drawn evenly" in loader.manner


def test_evaluation_draws_nothing():
    plain = Loader(rare(), sampling="weighted")
    assert batches(plain) == batches(Loader(rare()))
    values = TensorSplit(torch.zeros(4, 1), torch.zeros(4, 1))
    assert len(Loader(values, sampling="weighted")) == 1, "there its targets do not matter"


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
def test_classes_that_are_not_known_cannot_be_drawn_evenly(split):
    with pytest.raises(
        DataError, match=r"loader\.sampling=weighted: \w+ does not give one class for each sample"
    ):
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
def test_an_error_names_the_sample_and_its_line(workers):
    with pytest.raises(
        DataError,
        match=r"^sample 17 cannot be read: ZeroDivisionError: .* \(.*test_loader.py:\d+ in divide\)$",
    ):
        batches(Loader(Faulty(divide), workers=workers))
    with pytest.raises(DataError, match=r"^17.png cannot be read$"):
        batches(Loader(Faulty(refuse), workers=workers))


def test_a_worker_outlives_the_signals_of_a_scheduler():
    assert get_worker_info() is None
    expected = batches(Loader(Squares(), eval_batch_size=5))
    assert batches(Loader(Faulty(terminate), eval_batch_size=5, workers=1)) == expected


class Ragged(Squares):
    def __getitem__(self, index):
        return torch.zeros(index), torch.tensor(0)


class Dicts(Squares):
    def __getitem__(self, index):
        return {"x": torch.zeros(1), "y": torch.zeros(1)}


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_make_no_batch(workers):
    with pytest.raises(DataError, match="have they one shape"):
        batches(Loader(Ragged(), workers=workers))
    with pytest.raises(
        DataError, match=r"must be a tuple of tensors \(inputs, targets\), not dict \(x, y\)"
    ):
        batches(Loader(Dicts(), workers=workers))


def test_torch_data_in_memory_is_read_in_memory():
    assert isinstance(Loader(TensorDataset(torch.zeros(4, 2), torch.zeros(4))).split, TensorSplit)
    assert batches(Loader([(torch.tensor(1.0), torch.tensor(2))])) == [([1.0], [2])]


def test_drop_last_may_not_leave_nothing():
    with pytest.raises(DataError, match="drop_last leaves no batch: 23 samples, batch_size 32"):
        Loader(in_memory(), drop_last=True, shuffle=True)


def test_a_foreign_loader_is_read_as_it_is():
    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            self.epoch = epoch

    theirs = DataLoader(Squares(), batch_size=10, sampler=Sampler(Squares()))
    loader = ForeignLoader(theirs)
    assert len(loader) == 3
    assert batches(loader, epoch=4, start=1) == batches(Loader(Squares(), eval_batch_size=10))[1:]
    assert theirs.sampler.epoch == 4
    assert batches(ForeignLoader([torch.ones(2)])) == [([1.0, 1.0],)]


class Doubled(TensorDataset):
    """Reads its samples in a way of its own."""

    def __getitem__(self, index):
        return tuple(2 * tensor[index] for tensor in self.tensors)


class DoubledSplit(TensorSplit):
    def __getitem__(self, index):
        return tuple(2 * tensor for tensor in super().__getitem__(index))


@pytest.mark.parametrize("kind", [Doubled, DoubledSplit])
@pytest.mark.parametrize("read", ["auto", "memory", "workers"])
def test_a_subclass_that_reads_samples_otherwise_is_asked_for_them(kind, read):
    tensors = torch.arange(7.0), torch.arange(7)
    loader = Loader(kind(*tensors), eval_batch_size=3, read=read).to(CPU)
    expected = Loader(TensorSplit(*(2 * tensor for tensor in tensors)), eval_batch_size=3)
    assert batches(loader) == batches(expected)


def test_samples_that_change_with_the_epoch_are_not_read_into_memory_once():
    class Epochs(Squares):
        def set_epoch(self, epoch):
            self.epoch = epoch

    with pytest.raises(DataError, match="Epochs has `set_epoch`, and may give other samples"):
        Loader(Epochs(), read="memory")


def test_a_stream_is_no_split():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(
        DataError, match="expected a split with `__len__` and `__getitem__`, got Stream"
    ):
        Loader(Stream())


# the way of reading, forced


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("shuffle", [False, True])
def test_forced_ways_of_reading_give_the_same_batches(workers, shuffle):
    settings = {
        "batch_size": 5,
        "eval_batch_size": 5,
        "shuffle": shuffle,
        "seed": 7,
        "workers": workers,
    }
    expected = batches(Loader(in_memory(), **settings), epoch=2)
    kept = Loader(Squares(), read="memory", **settings)
    assert batches(kept, epoch=2) == expected, "before it is read"
    assert batches(kept.to(CPU), epoch=2) == expected
    assert batches(kept, 2, start=3) == expected[3:]
    assert batches(Loader(in_memory(), read="workers", **settings).to(CPU), epoch=2) == expected


def test_a_split_kept_in_memory_is_read_once():
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


def test_the_way_of_reading_is_told():
    assert Loader(in_memory()).manner == "in memory, 1 batches a read"
    assert Loader(in_memory(), read="workers", workers=2).manner == "torch's DataLoader, 2 workers"
    loader = Loader(Squares(), read="memory")
    assert loader.manner == "in memory, once it is read by torch's DataLoader, no workers"
    assert loader.to(CPU).manner == "in memory, 1 batches a read"


class OwnGenerator(Squares):
    """Random by a generator that nobody can seed."""

    def __getitem__(self, index):
        return torch.tensor(np.random.default_rng().random()), torch.tensor(0)


class SeldomRandom(Squares):
    """Random in a sample that no look at a few would find."""

    def __getitem__(self, index):
        return torch.rand(1) if index == 11 else torch.zeros(1), torch.tensor(0)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("split", "said"),
    [
        (
            Noisy(),
            "would freeze what is random in Noisy: one of the samples 0 to 22 draws random numbers",
        ),
        (
            OwnGenerator(),
            "would freeze what is random in OwnGenerator: a sample that is read twice comes out other",
        ),
        (
            SeldomRandom(),
            "would freeze what is random in SeldomRandom: one of the samples 0 to 22 draws",
        ),
    ],
    ids=["random", "own generator", "seldom"],
)
def test_what_cannot_be_kept_in_memory(split, said, workers):
    with pytest.raises(DataError, match=f"^loader.read=memory {said}"):
        Loader(split, read="memory", workers=workers).to(CPU)


def test_a_split_larger_than_the_memory_is_refused_before_it_is_read():
    class Huge(Squares):
        def __len__(self):
            return 10**15

        def __getitem__(self, index):
            return torch.zeros(1), torch.tensor(0)

    with pytest.raises(
        DataError,
        match=r"^loader.read=memory: Huge takes about 1\.12e\+07 GiB, and .* GiB are free$",
    ):
        Loader(Huge(), read="memory")


class WideLater(Squares):
    """Samples whose shape changes in the middle of a batch that is read, or between two."""

    def __init__(self, size, wide_from):
        self.size, self.wide_from = size, wide_from

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.zeros(1 + (index >= self.wide_from)), torch.tensor(0)


def test_samples_of_several_shapes_cannot_be_kept_in_memory():
    with pytest.raises(DataError, match="have they one shape"):
        Loader(WideLater(23, 11), read="memory").to(CPU)
    said = r"needs samples of one shape and type: the first is \[1\] torch.float32, sample 64 \[2\] torch.float32"
    loader = Loader(WideLater(66, 99), read="memory")
    loader.split.wide_from = 64
    with pytest.raises(DataError, match=said):
        loader.to(CPU)


def test_memory_does_not_go_with_skipping():
    with pytest.raises(DataError, match=r"does not go with loader\.on_bad_sample=skip"):
        Loader(Squares(), read="memory", on_bad_sample="skip")
    with pytest.raises(DataError, match=r"^sample 17 cannot be read: ZeroDivisionError"):
        Loader(Faulty(divide), read="memory").to(CPU)


# a whole batch at once


class AtOnce(Squares):
    """Has `__getitems__`, as a set that reads from a database has; counts in which way it is asked."""

    def __init__(self, at_once=lambda indices: None, one=lambda index: None):
        self.at_once, self.one = at_once, one
        self.calls = {"at once": 0, "one": 0}

    def draw(self):
        return torch.zeros(1)

    def __getitem__(self, index):
        self.calls["one"] += 1
        self.one(index)
        return torch.tensor([float(index)]) + self.draw(), torch.tensor(index**2)

    def __getitems__(self, indices):
        self.calls["at once"] += 1
        self.at_once(indices)
        return (
            (torch.tensor([float(index)]) + self.draw(), torch.tensor(index**2))
            for index in indices
        )


class AugmentedAtOnce(AtOnce):
    def draw(self):
        return torch.rand(1)


class Augmented(Squares):
    def __getitem__(self, index):
        return torch.tensor([float(index)]) + torch.rand(1), torch.tensor(index**2)


def test_a_set_that_can_is_asked_for_a_whole_batch():
    split = AtOnce()
    assert batches(Loader(split, eval_batch_size=5)) == batches(
        Loader(Squares(), eval_batch_size=5)
    )
    assert split.calls == {"at once": 5, "one": 0}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_random_belongs_to_the_sample_also_in_a_set_that_reads_at_once(workers):
    settings = {"shuffle": True, "seed": 7, "workers": workers}
    split = AugmentedAtOnce()
    expected = batches(Loader(Augmented(), batch_size=5, **settings), epoch=1)
    assert batches(Loader(split, batch_size=5, **settings), epoch=1) == expected
    if not workers:
        assert split.calls == {"at once": 1, "one": SIZE}, "found by the first batch"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_of_a_batch_read_at_once_is_named_and_skipped(workers):
    def one(index):
        if index == 17:
            raise OSError("no such file")

    split = AtOnce(lambda indices: [one(index) for index in indices], one)
    with pytest.raises(
        DataError,
        match=r"^sample 17 cannot be read: OSError: no such file \(.*test_loader.py:\d+ in .*\)$",
    ):
        batches(Loader(split, workers=workers))
    skipping = Loader(split, eval_batch_size=5, workers=workers, on_bad_sample="skip")
    with pytest.warns(UserWarning, match="sample 17 .* it is left out"):
        assert [len(y) for _, y in batches(skipping)] == [5, 5, 5, 4, 3]
    assert skipping.skipped == 1


def one_less(indices):
    indices.pop()


@pytest.mark.parametrize(
    ("fault", "said"),
    [(lambda _: divide(), "ZeroDivisionError"), (one_less, "it gives 22 samples for 23 indices")],
)
def test_a_set_that_reads_wrongly_at_once_is_told(fault, said):
    with pytest.raises(
        DataError, match=rf"samples 0, ... cannot be read at once .*, though each alone can: {said}"
    ):
        batches(Loader(AtOnce(fault)))


@pytest.mark.filterwarnings("ignore:.*it is left out")
def test_a_batch_that_hangs_is_named_by_its_first_sample():
    def hang(indices):
        if 17 in indices:
            threading.Event().wait()

    with pytest.raises(
        DataError, match="the process that read a batch that begins with sample 15 hangs"
    ):
        batches(Loader(AtOnce(hang), eval_batch_size=5, workers=1, timeout_seconds=1.0))


# copied ahead


class Recorder:
    """Stands for the copies to a GPU: notes when each batch is begun."""

    def __init__(self):
        self.begun = []

    def ahead(self, reads):
        return one_ahead(map(self._begin, reads))

    def _begin(self, read):
        self.begun.append(len(self.begun))
        return read


def test_a_batch_is_begun_while_the_one_before_it_is_used():
    loader = Loader(Squares(), batch_size=5, shuffle=True)
    expected = batches(loader, epoch=1)
    loader.copies = Recorder()
    got = []
    for batch in loader.epoch(1):
        got.append(tuple(part.tolist() for part in batch))
        assert len(loader.copies.begun) == min(len(got) + 1, 5)
    assert got == expected
    assert batches(loader, epoch=1, start=3) == expected[3:]
    assert batches(loader, epoch=1, start=5) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_ahead_comes_after_the_batches_before_it(workers):
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


def test_what_is_skipped_ahead_counts_when_its_batch_comes():
    loader = Loader(Faulty(divide), eval_batch_size=5, on_bad_sample="skip")
    loader.copies = Recorder()
    reader = loader.epoch()
    assert [(len(next(reader)[0]), loader.skipped) for _ in range(3)] == [(5, 0)] * 3
    with pytest.warns(UserWarning, match="left out"):
        assert (len(next(reader)[0]), loader.skipped) == (4, 1)


def test_a_reader_that_is_left_early_ends_its_processes():
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
def test_batches_copied_ahead_to_a_gpu_are_the_same(workers):
    cuda = torch.device("cuda")
    expected = batches(Loader(Squares(), batch_size=2, shuffle=True), 1)
    ours = Loader(Squares(), batch_size=2, workers=workers, shuffle=True).to(cuda)
    theirs = ForeignLoader(DataLoader(Squares(), batch_size=2, pin_memory=True)).to(cuda)
    for loader, wanted in (
        (ours, expected),
        (theirs, batches(Loader(Squares(), eval_batch_size=2))),
    ):
        got = []
        for batch in loader.epoch(1):
            assert all(part.is_cuda for part in batch)
            torch.cuda._sleep(
                10_000_000
            )  # the device is behind, and memory is asked for again meanwhile
            got.append([part.clone() for part in batch])
        assert [tuple(part.tolist() for part in batch) for batch in got] == wanted


# channels last


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("read", ["memory", "workers"])
def test_channels_last_is_the_same_images_in_another_order(channels, read):
    images = torch.arange(7.0 * channels * 4 * 5).reshape(7, channels, 4, 5)
    split = TensorSplit(images, torch.arange(7))
    settings = {"batch_size": 3, "shuffle": True, "read": read}
    plain = list(Loader(split, **settings).to(CPU).epoch(1))
    loader = Loader(split, channels_last=True, **settings).to(CPU)
    assert loader.manner.endswith(", channels last")
    convolution = torch.nn.Conv2d(channels, 2, 3)
    for (x, y), (same_x, same_y) in zip(plain, loader.epoch(1), strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
        assert same_x.stride() == (channels * 20, 1, channels * 5, channels)
        assert convolution(same_x).is_contiguous(memory_format=torch.channels_last), (
            "it goes on in this format"
        )


def convolution(inputs, outputs, stride=1, size=3):
    return torch.nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)


IMAGE_MODELS = {  # and what auto says of their images
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


@pytest.mark.parametrize(("layers", "said"), IMAGE_MODELS.values(), ids=IMAGE_MODELS)
def test_auto_gives_channels_last_to_convolutions_that_go_on_to_smaller_images(layers, said):
    model = torch.nn.Sequential(*layers)
    split = TensorSplit(torch.randn(6, 3, 8, 8), torch.arange(6))
    loader = Loader(split, eval_batch_size=4, model=model)
    images, _ = next(loader.epoch())
    assert images.stride() == ((192, 1, 24, 3) if said == "last" else (192, 64, 8, 1))
    words = "" if said is None else f", channels {said} (for 2 convolutions that "
    assert loader.manner.startswith(f"in memory, 2 batches a read{words}")
    assert said is not None or "channels" not in loader.manner
    for forced in (True, False):
        loader = Loader(split, eval_batch_size=4, model=model, channels_last=forced)
        assert (next(loader.epoch())[0].stride(1) == 1) is forced
        assert loader.manner.endswith(", channels last") is forced


def test_auto_without_a_model_leaves_images_as_they_are():
    images, _ = next(Loader(TensorSplit(torch.randn(6, 3, 8, 8), torch.arange(6))).epoch())
    assert images.is_contiguous()


class Pictures(Data):
    """Images (3, 8, 8), or the same numbers in a row; no test split."""

    def __init__(self, *shape):
        self.in_shape, self.out_shape = shape, (2,)
        self.train = self.val = TensorSplit(
            torch.randn(6, *shape), torch.zeros(6, dtype=torch.int64)
        )


def test_the_loader_of_a_run_looks_at_its_model():
    model = torch.nn.Sequential(*IMAGE_MODELS["strided"][0])
    spec = Spec(sections={"loader": {"batch_size": 4, "eval_batch_size": 5}}, seed=3)
    train = build_loader(spec, model, Pictures(3, 8, 8), "train", shuffle=True)
    val = build_loader(spec, model, Pictures(3, 8, 8), "val")
    assert (train.batch_size, train.seed, train.shuffle) == (4, 3, True)
    assert (val.batch_size, val.shuffle) == (5, False)
    assert train.channels_last
    assert val.channels_last
    unfolded = torch.nn.Sequential(torch.nn.Unflatten(1, (3, 8, 8)), model)
    assert "channels" not in build_loader(spec, unfolded, Pictures(192), "train").manner, (
        "what it reads are no images"
    )
    with pytest.raises(DataError, match="Pictures has no test split"):
        build_loader(spec, model, Pictures(3, 8, 8), "test")


def test_channels_last_learns_the_same_but_for_rounding():
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
    assert (ends[0] - start).abs().max() > 0.05, "it has learnt"
    assert torch.allclose(*ends, rtol=1e-7, atol=1e-10)


def test_channels_last_leaves_what_are_no_images():
    loader = Loader(in_memory(), channels_last=True, batch_size=5, shuffle=True)
    assert batches(loader, 2) == batches(Loader(in_memory(), batch_size=5, shuffle=True), 2)
