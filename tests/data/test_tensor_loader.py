"""DataLoaders over tensors: gathered batches against those of the DataLoader itself."""

import copy

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)

from framework.data.foreign_loader import ForeignLoader
from framework.data.tensor_loader import tensor_source

INPUTS = torch.randn(50, 3, 4, 2, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(50)
DATA = TensorDataset(INPUTS, TARGETS)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


class IndexTensors:
    """A batch sampler that yields tensors, and counts its epochs."""

    def __iter__(self):
        return iter(torch.randperm(48).view(6, 8))

    def __len__(self):
        return 6


class Odd:
    """A batch sampler with negative indices, numpy integers, a tuple and tensors."""

    def __iter__(self):
        import numpy as np

        yield [-1, 3]
        yield [np.int64(4), 5]
        yield (6, 7)
        yield [torch.tensor(8), torch.tensor(9)]

    def __len__(self):
        return 4


class Iterators:
    """A batch sampler of iterators, which can be read only once."""

    def __iter__(self):
        return (iter(range(first, first + 3)) for first in (0, 5, 20))

    def __len__(self):
        return 3


class Shuffles:
    """A sampler that draws from the global generator in the middle of the epoch."""

    def __iter__(self):
        for _ in range(25):
            yield int(torch.randint(50, ()))

    def __len__(self):
        return 25


NOT_GATHERED = "subset with a negative index"
LOADERS = {
    "in order": lambda: DataLoader(DATA, batch_size=8),
    "shuffled": lambda: DataLoader(DATA, batch_size=8, shuffle=True),
    "drop_last": lambda: DataLoader(DATA, batch_size=8, shuffle=True, drop_last=True),
    "one sample": lambda: DataLoader(DATA),
    "generator": lambda: DataLoader(DATA, batch_size=8, shuffle=True, generator=generator()),
    "generator of the sampler": lambda: DataLoader(
        DATA, batch_size=7, sampler=RandomSampler(DATA, generator=generator())
    ),
    "with replacement": lambda: DataLoader(
        DATA, batch_size=8, sampler=RandomSampler(DATA, replacement=True, num_samples=70)
    ),
    "more samples than the data has": lambda: DataLoader(
        DATA, batch_size=8, sampler=RandomSampler(DATA, num_samples=120)
    ),
    "some samples": lambda: DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler(range(9))),
    "weighted": lambda: DataLoader(
        DATA, batch_size=8, sampler=WeightedRandomSampler(torch.rand(50), 30)
    ),
    "batch sampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 6, drop_last=True)
    ),
    "batches as tensors": lambda: DataLoader(DATA, batch_sampler=IndexTensors()),
    "batches as iterators": lambda: DataLoader(DATA, batch_sampler=Iterators()),
    "unusual indices": lambda: DataLoader(DATA, batch_sampler=Odd()),
    "samples as tensors": lambda: DataLoader(
        DATA, batch_size=4, sampler=[torch.tensor([3]), torch.tensor([4])]
    ),
    "sampler that draws as it goes": lambda: DataLoader(DATA, batch_size=4, sampler=Shuffles()),
    "subset": lambda: DataLoader(Subset(DATA, list(range(40, 3, -2))), batch_size=4, shuffle=True),
    "subset of a subset": lambda: DataLoader(
        Subset(Subset(DATA, range(5, 45)), torch.arange(30)), batch_size=4, shuffle=True
    ),
    "random_split": lambda: DataLoader(random_split(DATA, [20, 30])[1], batch_size=8),
    NOT_GATHERED: lambda: DataLoader(Subset(DATA, [-1, 0]), batch_size=2),
    "stack of tensors": lambda: DataLoader(StackDataset(INPUTS, TARGETS), batch_size=8),
    "dict of tensors": lambda: DataLoader(
        Subset(StackDataset(inputs=INPUTS, targets=TARGETS), range(40, 3, -2)), batch_size=8
    ),
    "one tensor": lambda: DataLoader(TensorDataset(INPUTS), batch_size=8, shuffle=True),
    "not contiguous": lambda: DataLoader(
        TensorDataset(INPUTS.transpose(1, 2), TARGETS[:1].expand(50)), batch_size=8
    ),
    "channels last": lambda: DataLoader(
        TensorDataset(INPUTS.contiguous(memory_format=torch.channels_last)), batch_size=8
    ),
    "other dtypes": lambda: DataLoader(
        TensorDataset(INPUTS > 0, INPUTS.half(), INPUTS.to(torch.cfloat), TARGETS.to(torch.uint8)),
        batch_size=8,
    ),
}


def epochs(loader: DataLoader, gathered: bool) -> tuple[list, list[torch.Tensor]]:
    """Return the batches of two epochs and, after each batch, the state of all generators."""
    batches = []
    states = []
    for epoch in range(2):
        read = ForeignLoader(loader).training_epoch(epoch, 0) if gathered else loader
        for batch in read:
            batches.append(batch)
            torch.rand(3)  # as a model with dropout
            states.append(torch.get_rng_state())
            owners = [loader, loader.sampler]
            generators = [getattr(owner, "generator", None) for owner in owners]
            states += [each.get_state() for each in generators if each is not None]
    return batches, states


@pytest.mark.parametrize("name", LOADERS)
def test_gathered_batches_are_those_of_the_loader(name):
    gathers = tensor_source(LOADERS[name]()) is not None
    assert gathers == (name != NOT_GATHERED)
    torch.manual_seed(3)
    expected, expected_states = epochs(LOADERS[name](), gathered=False)
    torch.manual_seed(3)
    batches, states = epochs(LOADERS[name](), gathered=True)
    assert len(batches) == len(expected) > 0
    for batch, other in zip(batches, expected, strict=True):
        names = other if isinstance(other, dict) else range(len(other))
        for name in names:
            tensor, wanted = batch[name], other[name]
            assert torch.equal(tensor, wanted)
            assert tensor.dtype == wanted.dtype
            assert tensor.stride() == wanted.stride()
    assert all(map(torch.equal, states, expected_states))


@pytest.mark.parametrize("data", [DATA, [(torch.rand(3), 0), (torch.rand(3), 1)] * 20])
def test_a_measurement_leaves_the_generator_of_a_loader_as_it_is(data):
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator())
    before = loader.generator.get_state()
    batches = ForeignLoader(loader)
    list(batches.epoch())
    next(batches.epoch(1))  # not read to its end
    assert torch.equal(loader.generator.get_state(), before)
    list(batches.training_epoch(0, 0))
    assert not torch.equal(loader.generator.get_state(), before)


@pytest.mark.parametrize("index", [50, -51])
def test_an_index_out_of_range_is_an_index_error_as_with_the_loader(index):
    class Wrong(SequentialSampler):
        def __iter__(self):
            return iter([0, index])

    loader = DataLoader(DATA, batch_size=2, sampler=Wrong(DATA))
    for batches in (loader, ForeignLoader(loader).epoch()):
        with pytest.raises(IndexError):
            list(batches)


class Noisy(TensorDataset):
    def __getitem__(self, index):
        inputs, targets = super().__getitem__(index)
        return inputs + torch.randn(()), targets


class Map(Dataset):
    def __getitem__(self, index):
        return INPUTS[index], TARGETS[index]

    def __len__(self):
        return 50


class OwnLoader(DataLoader):
    def __iter__(self):
        return iter([])


UNUSUAL = {
    "own collate_fn": lambda: DataLoader(DATA, collate_fn=list),
    "no batches": lambda: DataLoader(DATA, batch_size=None),
    "workers": lambda: DataLoader(DATA, num_workers=1),
    "own __getitem__": lambda: DataLoader(Noisy(INPUTS, TARGETS)),
    "subset of own __getitem__": lambda: DataLoader(Subset(Noisy(INPUTS, TARGETS), [0, 1])),
    "an index of a subset is too large": lambda: DataLoader(
        Subset(Subset(DATA, range(5)), [1, 2, 7]), sampler=[0, 1]
    ),
    "map-style": lambda: DataLoader(Map()),
    "concatenated": lambda: DataLoader(ConcatDataset([DATA, DATA])),
    "stack of data sets": lambda: DataLoader(StackDataset(DATA, DATA)),
    "gradients": lambda: DataLoader(TensorDataset(INPUTS.clone().requires_grad_())),
    "sparse": lambda: DataLoader(TensorDataset(torch.eye(4).to_sparse())),
    "own loader": lambda: OwnLoader(DATA),
    "a list": lambda: [(INPUTS, TARGETS)],
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_anything_unusual_is_read_as_it_is(name):
    assert tensor_source(UNUSUAL[name]()) is None


def test_tensors_that_change_between_epochs_are_read_again():
    data = TensorDataset(INPUTS.clone(), TARGETS)
    loader = DataLoader(data, batch_size=50)
    reader = ForeignLoader(loader)
    list(reader.epoch())
    data.tensors = (copy.copy(INPUTS) + 1, TARGETS)
    ((inputs, _),) = reader.epoch()
    assert torch.equal(inputs, INPUTS + 1)
