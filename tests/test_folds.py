"""Cross-validation and repetition: every sample validates once, the same for all who ask."""

import re

import pytest
import torch
from sklearn.model_selection import StratifiedKFold

import framework as fw
from framework.errors import DataError
from framework.folds import fold_of, take_fold


def folds(count, **settings):
    for number in range(1, count + 1):
        data = fw.datasets.build("digits", **settings)
        take_fold(data, f"{number}/{count}")
        yield data


def rows(split):
    return {tuple(row) for row in split.tensors[0].tolist()}


def test_every_sample_validates_once():
    whole = fw.datasets.build("digits", normalize=False)
    everything = rows(whole.train) | rows(whole.val)
    seen = [rows(data.val) for data in folds(4, normalize=False)]
    assert sum(map(len, seen)) == len(everything)
    assert set.union(*seen) == everything
    for data in folds(4, normalize=False):
        assert not rows(data.train) & rows(data.val)
        assert rows(data.train) | rows(data.val) == everything
        assert rows(data.test) == rows(whole.test)


def test_classes_are_spread_as_evenly_as_those_of_scikit_learn():
    strata = torch.randint(0, 3, (100,), generator=torch.Generator().manual_seed(0))
    reference = StratifiedKFold(5, shuffle=True, random_state=0).split(torch.zeros(100), strata)
    spread = max(torch.bincount(strata[val], minlength=3).tolist() for _, val in reference)
    for number in range(1, 6):
        inside, outside = fold_of(strata, number, 5)
        assert len(inside) == 20
        assert sorted([*inside.tolist(), *outside.tolist()]) == list(range(100))
        counts = torch.bincount(strata[inside], minlength=3)
        assert (counts - torch.tensor(spread)).abs().max() <= 2


class Samples(torch.utils.data.Dataset):
    def __init__(self, numbers):
        self.numbers = list(numbers)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return torch.tensor([float(self.numbers[index])]), torch.tensor(0)


def test_samples_that_are_read_one_by_one_are_cut_too():
    seen = []
    for number in (1, 2, 3):
        data = fw.Data()
        data.train, data.val = Samples(range(7)), Samples(range(7, 10))
        take_fold(data, f"{number}/3")
        seen += [float(data.val[i][0]) for i in range(len(data.val))]
        assert len(data.val) + len(data.train) == 10
    assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("fold", ["0/5", "6/5", "1/1", "half", "1/9999"])
def test_a_fold_that_is_none(fold):
    with pytest.raises(DataError, match=f"fold={fold}"):
        take_fold(fw.datasets.build("digits"), fold)


def test_cross_validation_is_a_sweep_with_mean_and_error(command):
    status, out, err = command("train --folds 3 trainer.max_epochs=1 loader.limit=4")
    assert status in (0, None), err
    table = out[out.index("\nfolds") :]
    assert re.search(r"^3 +[\d.]+ ± [\d.]+", table.splitlines()[2])
    values = [float(each) for each in re.findall(r"fold=\d/3  val/loss ([\d.]+)", out)]
    mean = sum(values) / 3
    error = (sum((v - mean) ** 2 for v in values) / 2 / 3) ** 0.5
    told = re.search(r"^3 +([\d.]+) ± ([\d.]+)", table.splitlines()[2])
    assert float(told[1]) == pytest.approx(mean, rel=1e-3)
    assert float(told[2]) == pytest.approx(error, rel=0.1)


def test_repetition_is_a_sweep_over_seeds(command):
    status, out, err = command("train --repeat 2 trainer.max_epochs=1 loader.limit=2")
    assert status in (0, None), err
    assert "000 seed=0" in out
    assert "001 seed=1" in out
    assert "±" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--folds 1", "--folds 1: should be 2 or more"),
        ("--repeat 0", "--repeat 0: should be 2 or more"),
        ("--repeat 3 seed=5", "--repeat 3 says which seeds there are: leave seed= out"),
        ("--folds 3 fold=1/3", "leave fold= out"),
        ("fold=7/5", "fold=7/5: should be K/N"),
    ],
)
def test_what_makes_no_sense_is_said(command, words, said):
    status, _, err = command(f"train {words}")
    assert status == 2
    assert said in err


def test_a_limit_makes_epochs_short(command):
    status, out, err = command("train loader.limit=3 trainer.max_epochs=2")
    assert status in (0, None), err
    assert "6 steps in" in out
