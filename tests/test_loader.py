import os
import random
import signal

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info

from framework import seeds
from framework.data import ForeignLoader, Loader, TensorSplit
from framework.errors import DataError

SIZE = 23


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
        assert batches(Loader(Noisy(), batch_size=5, workers=workers, shuffle=True), epoch=1) == expected
    assert batches(Loader(Noisy(), batch_size=5, shuffle=True), epoch=2) != expected
    by_sample = dict(zip(seeds.order(0, 1, SIZE).tolist(), (row for x, _ in expected for row in x), strict=True))
    rebatched = batches(Loader(Noisy(), batch_size=4, shuffle=True), epoch=1)
    assert [row for x, _ in rebatched for row in x] == [by_sample[i] for i in seeds.order(0, 1, SIZE).tolist()]


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_generators_alone(workers):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    batches(Loader(Noisy(), workers=workers, shuffle=True))
    assert draws() == expected


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
    with pytest.raises(DataError, match=r"^sample 17 cannot be read: ZeroDivisionError: .* at .*test_loader.py:\d+$"):
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
    with pytest.raises(DataError, match=r"must be a tuple of tensors \(inputs, targets\), not dict \(x, y\)"):
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
