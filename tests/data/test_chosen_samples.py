"""Evenly spaced samples and the first samples of data, compared with a pass over all of it."""

import pytest
import torch
from torch.utils.data import DataLoader

import framework as fw
from framework.data.accumulation import as_batches
from framework.data.chosen_samples import read_first_samples, read_spread_samples
from framework.data.dataset import Loader
from framework.data.folds import take_fold
from framework.runtime.batch import join_rows

CPU = torch.device("cpu")
NUMBERS = torch.arange(23.0)
TENSORS = fw.TensorSplit(NUMBERS[:, None].expand(23, 2), torch.arange(23) % 3)


class ByIndex:
    """A split that is read sample by sample, with noise of the global generator."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return NUMBERS[index] + torch.rand(2), index % 3


class EveryThird(fw.GatheredSplit):
    """Rows of a larger table, whose indices are the numbers of the rows in the table."""

    def __len__(self):
        return 23

    def order(self, seed, epoch, batch_size, shuffle):
        return 3 * super().order(seed, epoch, batch_size, shuffle) + 1

    def gather(self, indices):
        return indices[:, None].float(), indices


def fold_of_a_table():
    """Return the validation split of a fold, which has some of the rows of a memory-mapped file."""
    import pyarrow as pa
    import pyarrow.feather

    rows = range(46)
    table = pa.table({"x": [float(row) for row in rows], "label": [row % 2 for row in rows]})
    pa.feather.write_feather(table, "rows.arrow", compression="uncompressed")
    data = fw.datasets.build("arrow", path="rows.arrow", target="label")
    take_fold(data, "2/2")
    assert isinstance(data.val, fw.GatheredSplit)
    return data.val


SPLITS = {
    "tensors": lambda: TENSORS,
    "by_index": ByIndex,
    "windows": lambda: fw.WindowSplit(torch.arange(115), 5),
    "overlapping_windows": lambda: fw.WindowSplit(torch.arange(68), 5, context=2),
    "ragged": lambda: fw.RaggedSplit([torch.full((3,), 1 + n) for n in range(23)]),
    "rows_of_a_table": EveryThird,
    "fold": fold_of_a_table,
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_samples_of_a_split_are_those_of_a_measurement(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader = Loader(SPLITS[name](), eval_batch_size=4)
    everything = join_rows([loader.keep(batch) for batch in loader.epoch()])
    size = len(loader.split)
    generator = torch.get_rng_state()
    spread = read_spread_samples(loader, 5, CPU)
    first = read_first_samples(loader, 5, CPU)
    assert torch.equal(torch.get_rng_state(), generator)
    chosen = torch.linspace(0, size - 1, 5).round().long()
    assert (chosen[0], chosen[-1]) == (0, size - 1)
    for column, of_spread, of_first in zip(everything, spread, first, strict=True):
        assert torch.equal(of_spread, column[chosen])
        assert torch.equal(of_first, column[:5])
    assert len(read_spread_samples(loader, 1000, CPU)[0]) == size


def test_data_of_unknown_length_gives_its_first_samples():
    batches = as_batches(DataLoader(TENSORS, 4), 4, shuffle=False, seed=0, device=CPU)
    spread = read_spread_samples(batches, 6, CPU)
    assert torch.equal(spread[0], TENSORS.tensors[0][:6])


def test_a_sample_is_a_copy():
    sample = read_spread_samples(Loader(TENSORS), 3, CPU)[0]
    assert sample.data_ptr() != TENSORS.tensors[0].data_ptr()
