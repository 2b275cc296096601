"""A fit that is resumed over a source with `state_dict` continues from the state of the source."""

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fits import At, X, Y, fit, same
from framework.data.foreign_loader import ForeignLoader
from framework.data.source_states import stateful_source
from framework.errors import DataError
from framework.runtime.copy_stream import one_ahead

BATCHES = 5


class Restarting:
    """Shuffles with a generator of its own; `iter` at the end of an epoch begins the next one."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.order = []
        self.position = 0
        self.reads = 0

    def __iter__(self):
        if self.position == len(self.order):
            self.order = torch.randperm(70, generator=self.generator).tolist()
            self.position = 0
        while self.position < len(self.order):
            rows = self.order[self.position : self.position + 16]
            self.position += len(rows)
            self.reads += 1
            yield X[rows], Y[rows]

    def state_dict(self):
        return {
            "generator": self.generator.get_state(),
            "order": self.order,
            "position": self.position,
        }

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.order = state["order"]
        self.position = state["position"]


class WithLength(Restarting):
    def __len__(self):
        return BATCHES


class Ending(WithLength):
    """As StatefulDataLoader: `iter` in the state of the end of an epoch is empty, once."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.loaded = False

    def __iter__(self):
        if self.loaded and self.position == len(self.order):
            self.loaded = False
            return iter(())
        self.loaded = False
        return super().__iter__()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.loaded = True


class DrawingEnding(Ending):
    """Draws from the global generator for each iterator and each batch, as augmentation does."""

    def __iter__(self):
        torch.randint(1000, ())  # as a DataLoader draws the seed of its workers
        batches = super().__iter__()

        def draw(batch):
            return batch[0] + 0.1 * torch.randn(6), batch[1]

        return map(draw, batches)


class Live(WithLength):
    """Returns its own list as the state, and changes it later."""

    def __init__(self, seed=0):
        super().__init__(seed)
        self.state = {"generator": self.generator.get_state(), "place": [[], 0]}

    def __iter__(self):
        for batch in super().__iter__():
            self.state["generator"] = self.generator.get_state()
            self.state["place"][:] = [self.order, self.position]
            yield batch

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.order, self.position = state["place"]


class LiveWithoutLength(Live):
    def __len__(self):
        raise TypeError


class Endless(IterableDataset):
    """A stream of samples, of which an epoch has 80."""

    def __init__(self, seed=0):
        self.number = seed
        self.reads = 0

    def __len__(self):
        return 80

    def __iter__(self):
        while True:
            self.number += 1
            self.reads += 1
            yield X[self.number * 31 % 70] + 1e-3 * self.number, Y[self.number * 31 % 70]

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


SOURCES = [Restarting, WithLength, Ending, DrawingEnding, Live, LiveWithoutLength, Endless]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_fit_continues_the_source(source, accumulate):
    steps_per_epoch = -(-BATCHES // accumulate)
    whole, _ = fit(source(), accumulate=accumulate)
    for steps in range(1, 2 * steps_per_epoch + 1):
        settings = {"max_epochs": None, "max_steps": steps, "accumulate": accumulate}
        saved = fit(source(), **settings)[0].state_dict()
        torch.manual_seed(steps)
        fresh = source(seed=99)
        resumed, _ = fit(fresh, resume=saved, accumulate=accumulate)
        assert same(resumed.model, whole.model), steps
        epochs, within = divmod(steps, steps_per_epoch)
        left = (3 - epochs) * BATCHES - within * accumulate
        if source is Endless:
            left = (3 * steps_per_epoch - steps) * accumulate * 16
        assert fresh.reads == left


@pytest.mark.parametrize("source", SOURCES)
def test_a_state_that_is_taken_during_a_fit_is_that_of_the_last_step(source):
    """It may have read further: without a length, the next step is read before a step is done."""
    whole, _ = fit(source())
    states = {}

    def save(trainer):
        states[trainer.state.step] = trainer.state_dict()

    fit(source(), callbacks=[At(step, save) for step in (3, 5, 7)])
    for saved in states.values():
        again = fit(source(seed=99), resume=saved)[0]
        assert same(again.model, whole.model)
        assert same(fit(source(seed=98), resume=again.state_dict())[0].model, whole.model)


class Ahead:
    """Reads ahead as the copy to a CUDA device does."""

    ahead = staticmethod(one_ahead)
    in_turn = iter


def test_a_batch_that_is_read_ahead_for_a_copy_is_read_again(monkeypatch):
    def read_ahead(loader, device):
        loader.copies = Ahead()
        return loader

    whole, _ = fit(Endless(), max_epochs=1)
    monkeypatch.setattr(ForeignLoader, "to", read_ahead)
    source = Endless()
    saved = fit(source, max_epochs=None, max_steps=3)[0].state_dict()
    assert saved["source"]["number"] == 48
    assert source.reads == 64
    assert same(fit(Endless(seed=9), max_epochs=1, resume=saved)[0].model, whole.model)


def test_a_state_is_kept_by_a_fit_that_reads_nothing():
    saved = fit(Restarting(), max_epochs=None, max_steps=7)[0].state_dict()
    stopped, _ = fit(Restarting(seed=9), resume=saved, max_epochs=None, max_steps=7)
    resumed, _ = fit(Restarting(seed=8), resume=stopped.state_dict())
    assert same(resumed.model, fit(Restarting())[0].model)


def test_a_validation_that_reads_the_same_source_leaves_the_state():
    source = Restarting()
    at_seven = []

    def save(trainer):
        for _ in zip(range(2), trainer.train_batches.epoch(), strict=False):
            pass
        at_seven.append(trainer.state_dict()["source"]["position"])

    fit(source, callbacks=[At(7, save)])
    assert at_seven == [32]


def test_without_its_state_the_source_continues_elsewhere():
    saved = fit(Restarting(), max_epochs=None, max_steps=7)[0].state_dict()
    assert saved["source"]["position"] == 32
    saved["source"] = None
    fresh = Restarting(seed=99)
    resumed, _ = fit(fresh, resume=saved)
    assert not same(resumed.model, fit(Restarting())[0].model)
    assert fresh.reads == 10, "two batches were read to skip them"


def test_a_new_fit_starts_with_the_source_as_it_is():
    source = Restarting()
    loader = ForeignLoader(source)
    trainer, _ = fit(loader, max_epochs=1)
    assert trainer.state_dict()["source"] is not None
    optimizer = trainer.optimizer
    trainer.max_steps = 0
    trainer.fit(trainer.model, loader, task=torch.nn.CrossEntropyLoss(), optimizer=optimizer)
    assert trainer.state_dict()["source"] is None


class WithArray(Restarting):
    def state_dict(self):
        return super().state_dict() | {"random": {"state": numpy.zeros(3)}}


def test_a_state_that_a_checkpoint_cannot_contain_gives_one_warning():
    with pytest.warns(
        UserWarning, match=r"WithArray is not saved.*random\.state is a numpy"
    ) as log:
        saved = fit(WithArray(), max_epochs=None, max_steps=7)[0].state_dict()
    assert len(log) == 1
    assert saved["source"] is None


def test_a_state_that_does_not_fit_is_an_error():
    saved = fit(Restarting(), max_epochs=None, max_steps=7)[0].state_dict()
    with pytest.raises(DataError, match="the saved state does not fit Endless"):
        fit(Endless(), resume=saved)


def test_many_batches_keep_few_states():
    loader = ForeignLoader(Restarting())
    for _ in loader.training_epoch(0, 0):
        assert loader.states is not None
        assert len(loader.states.states) <= 4


def test_which_sources_have_a_state():
    stream = Endless()
    assert stateful_source(stream) is stream
    assert stateful_source(DataLoader(stream, 4)) is stream
    assert stateful_source(DataLoader(stream, 4, num_workers=1)) is None
    assert stateful_source([1]) is None
    assert stateful_source(DataLoader([1])) is None


# torchdata


class Noisy(Dataset):
    """Counts the samples that are read in this process."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return 70

    def __getitem__(self, index):
        self.reads += 1
        return X[index], Y[index]


class Counted(IterableDataset):
    """A stream with a state; each worker has its share."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        step = 1 if worker is None else worker.num_workers
        first = 0 if worker is None else worker.id
        rows = range(first, 70, step)
        while self.number < len(rows):
            row = rows[self.number]
            self.number += 1
            yield X[row], Y[row]
        self.number = 0

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def torchdata_loader(kind, workers):
    stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")
    if kind == "stream":
        return stateful_dataloader.StatefulDataLoader(Counted(), 16, num_workers=workers)
    generator = torch.Generator().manual_seed(5) if kind == "own generator" else None
    return stateful_dataloader.StatefulDataLoader(
        Noisy(), 16, shuffle=True, generator=generator, num_workers=workers
    )


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # by torchdata
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["shuffled", "own generator", "stream"])
def test_a_fit_over_a_stateful_dataloader_is_resumed_exactly(kind, workers):
    """The order of the samples is in its state, whatever generator shuffles.

    With a generator of its own and without workers, StatefulDataLoader 0.11 itself reads the epochs
    after the resumed one in another order: it draws once less from the generator.
    """
    epochs = 1 if (kind, workers) == ("own generator", 0) else 3

    def make(seed):
        torch.manual_seed(seed)
        return torchdata_loader(kind, workers)

    whole, _ = fit(make(11), max_epochs=epochs)
    per_epoch = whole.state.step // epochs
    for steps in (2, per_epoch, per_epoch + 1, 2 * per_epoch):
        if steps >= epochs * per_epoch:
            continue
        saved = fit(make(11), max_epochs=None, max_steps=steps)[0].state_dict()
        fresh = make(12)
        resumed, _ = fit(fresh, max_epochs=epochs, resume=saved)
        assert same(resumed.model, whole.model), steps
        if kind != "stream" and not workers:
            left = epochs * 70 - steps // per_epoch * 70 - steps % per_epoch * 16
            assert fresh.dataset.reads == left
