"""Cross-validation: training and validation split put together and cut anew into folds, of which one validates."""

import re
import warnings

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from framework.errors import DataError
from framework.runtime import seeds

from .dataset import Data, GatheredSplit, TensorSplit, check_data, is_in_memory


def take_fold(data: Data, fold: str, refit: bool = True) -> None:
    """Make fold K of N (`fold` is "K/N") the validation split of the data, and all others the training split.

    Samples go to folds at random, the same for all K; classes in memory are spread evenly
    (stratified); rows in the order of time are cut into blocks. The test split keeps its samples.
    What a data set measures on its training split (mean, deviation, vocabulary) is measured anew,
    on the samples of the other folds, if the data set has a `refit`; otherwise there is a warning.

    Args:
        data: the data set, changed in place.
        fold: "K/N", the K-th of N folds.
        refit: False leaves what was measured as it is.

    Raises DataError for a fold that is none, and for splits that cannot be cut.
    """
    matched = re.fullmatch(r"(\d+)/(\d+)", fold)
    number, count = map(int, matched.groups()) if matched else (0, 0)
    if not 1 <= number <= count or count < 2:
        raise DataError(f"fold={fold}: should be K/N, the K-th of N folds, such as 1/5")
    if refit and data.refit is not None:
        refit_fold(data, fold, number, count)
        return
    cut_as_they_are(data, fold, number, count)
    if refit and data.measures_training:
        warnings.warn(
            f"fold={fold}: {type(data).__name__} has no `refit`: what it measured on its training "
            "split (mean, deviation, vocabulary) stays, though samples of that split validate now",
            stacklevel=2,
        )


def refit_fold(data: Data, fold: str, number: int, count: int) -> None:
    """Cut the rows of training and validation, and let the data set measure them anew."""
    assert data.refit is not None
    known = torch.cat([data.rows[part] for part in ("train", "val") if part in data.rows])
    check_number(len(known), fold, count)
    if data.in_time_order:
        inside, others = block_of(len(known), number, count)
    else:
        strata = torch.zeros(len(known)) if data.strata is None else data.strata[known]
        inside, others = fold_of(strata, number, count)
    data.refit({**data.rows, "train": known[others], "val": known[inside]})
    data.fold = fold
    check_data(data)
    if data.val is None:
        raise DataError(f"fold={fold}: {len(inside)} rows are too few for a sample to validate on")


def check_number(samples: int, fold: str, count: int) -> None:
    if samples < count:
        raise DataError(f"fold={fold}: {samples} samples are too few for {count} folds")


def cut_as_they_are(data: Data, fold: str, number: int, count: int) -> None:
    """Cut the samples as they are, prepared by what was measured before."""
    splits = [data.train] if data.val is None else [data.train, data.val]
    if any(isinstance(split, GatheredSplit) for split in splits):
        raise DataError(
            f"fold={fold}: {type(data).__name__} is cut out of one text, and cannot be cut into folds"
        )
    samples = sum(map(len, splits))
    check_number(samples, fold, count)
    if all(is_in_memory(split) for split in splits):
        whole = TensorSplit(
            *(torch.cat(parts) for parts in zip(*(s.tensors for s in splits), strict=True))
        )  # type: ignore
        strata = (
            whole.tensors[1]
            if data.target == "class" and len(whole.tensors) > 1
            else torch.zeros(samples)
        )
        rows, others = fold_of(strata, number, count)
        data.val, data.train = TensorSplit(*whole[rows]), TensorSplit(*whole[others])
        return
    joined: Dataset = ConcatDataset(splits)  # type: ignore[arg-type]
    rows, others = fold_of(torch.zeros(samples), number, count)
    data.val, data.train = Subset(joined, rows.tolist()), Subset(joined, others.tolist())


def fold_of(strata: Tensor, number: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a fold, and those of all others, each ascending. strata: the class of each row."""
    mixed = seeds.order(0, 0, len(strata))
    dealt = mixed[strata[mixed].argsort(stable=True)]  # class by class, at random within each
    inside = torch.zeros(len(strata), dtype=torch.bool)
    inside[dealt[number - 1 :: count]] = True
    return inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]


def block_of(rows: int, number: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a fold that is a block of rows, and those before and after it."""
    every = torch.arange(rows)
    inside = (every * count).div(rows, rounding_mode="floor") == number - 1
    return every[inside], every[~inside]
