"""Cross-validation: training and validation split put together and cut anew into folds, of which one validates."""

import re

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from . import seeds
from .data import Data, GatheredSplit, TensorSplit, is_in_memory
from .errors import DataError


def take_fold(data: Data, fold: str) -> None:
    """Make fold K of N (`fold` is "K/N") the validation split of the data, and all others the training split.

    Samples go to folds at random, the same for all K; classes in memory are spread evenly (stratified). The test split
    stays. What a data set measured on its training split (mean, deviation, vocabulary) stays as it is.
    Raises DataError for a fold that is none, and for splits that cannot be cut.
    """
    matched = re.fullmatch(r"(\d+)/(\d+)", fold)
    number, count = map(int, matched.groups()) if matched else (0, 0)
    if not 1 <= number <= count or count < 2:
        raise DataError(f"fold={fold}: should be K/N, the K-th of N folds, such as 1/5")
    splits = [data.train] if data.val is None else [data.train, data.val]
    if any(isinstance(split, GatheredSplit) for split in splits):
        raise DataError(f"fold={fold}: {type(data).__name__} is cut out of one text, and cannot be cut into folds")
    samples = sum(map(len, splits))
    if samples < count:
        raise DataError(f"fold={fold}: {samples} samples are too few for {count} folds")
    if all(is_in_memory(split) for split in splits):
        whole = TensorSplit(*(torch.cat(parts) for parts in zip(*(s.tensors for s in splits), strict=True)))  # type: ignore
        strata = whole.tensors[1] if data.target == "class" and len(whole.tensors) > 1 else torch.zeros(samples)
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
