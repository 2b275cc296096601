"""Cross-validation: joins training and validation split and cuts them into folds."""

import re
import warnings

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from framework.errors import DataError
from framework.runtime import seeds

from .dataset import Data, check_data, is_in_memory, split_of
from .token_splits import GatheredSplit


def take_fold(data: Data, fold: str, refit: bool = True) -> None:
    """Make fold K of N the validation split of the data, and all other folds the training split.

    Samples are assigned to folds at random, in the same way for all K. Classes in memory are spread
    evenly (stratified). Rows in the order of time are cut into blocks. The test split keeps its
    samples. The data set measures its statistics (mean, deviation, vocabulary) again on the samples
    of the other folds if it has a `refit`; otherwise there is a warning.

    Args:
        data: the data set, changed in place.
        fold: "K/N", the K-th of N folds.
        refit: False keeps the statistics of the data set.

    Raises:
        DataError: `fold` is not valid, or the splits cannot be cut.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", fold)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count or count < 2:
        raise DataError(f"fold={fold}: expected K/N, the K-th of N folds, such as 1/5")
    if refit and data.refit is not None:
        refit_fold(data, fold, number, count)
        return
    cut_prepared_samples(data, fold, number, count)
    if refit and data.measures_training:
        warnings.warn(
            f"fold={fold}: {type(data).__name__} has no `refit`: it keeps the statistics of its "
            "training split (mean, deviation, vocabulary), though some samples of that split are "
            "in the validation split now",
            stacklevel=2,
        )


def refit_fold(data: Data, fold: str, number: int, count: int) -> None:
    """Cut the rows of training and validation split, and let the data set measure them again."""
    assert data.refit is not None
    rows = torch.cat([data.rows[split] for split in ("train", "val") if split in data.rows])
    check_count(len(rows), fold, count)
    if data.in_time_order:
        inside, outside = block_of(len(rows), number, count)
    else:
        strata = torch.zeros(len(rows)) if data.strata is None else data.strata[rows]
        inside, outside = fold_of(strata, number, count)
    data.refit({**data.rows, "train": rows[outside], "val": rows[inside]})
    data.fold = fold
    check_data(data)
    if data.val is None:
        raise DataError(f"fold={fold}: {len(inside)} rows are too few for a validation sample")


def cut_prepared_samples(data: Data, fold: str, number: int, count: int) -> None:
    """Cut the samples of training and validation split, with the statistics measured before."""
    splits = [data.train] if data.val is None else [data.train, data.val]
    if any(isinstance(split, GatheredSplit) for split in splits):
        raise DataError(
            f"fold={fold}: {type(data).__name__} cannot be cut into folds: its samples are parts "
            "of one text"
        )
    samples = sum(map(len, splits))
    check_count(samples, fold, count)
    in_memory = [split for split in splits if is_in_memory(split)]
    if len(in_memory) < len(splits) or len({split.names for split in in_memory}) > 1:
        # A split has the methods of a Dataset, but need not be derived from it.
        joined: Dataset[object] = ConcatDataset(splits)  # type: ignore[arg-type]
        inside, outside = fold_of(torch.zeros(samples), number, count)
        data.val = Subset(joined, inside.tolist())
        data.train = Subset(joined, outside.tolist())
        return
    tensors = [split.tensors for split in in_memory]
    columns = [torch.cat(parts) for parts in zip(*tensors, strict=True)]
    strata = torch.zeros(samples)
    if data.target == "class" and len(columns) > 1 and not in_memory[0].names:
        strata = columns[1]
    inside, outside = fold_of(strata, number, count)
    whole = split_of(in_memory[0].as_batch(columns))
    data.val = split_of(whole[inside])
    data.train = split_of(whole[outside])


def check_count(samples: int, fold: str, count: int) -> None:
    """Raise DataError if there are fewer samples than folds."""
    if samples < count:
        raise DataError(f"fold={fold}: {samples} samples are too few for {count} folds")


def fold_of(strata: Tensor, number: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a fold, and those of all others, in ascending order.

    Args:
        strata: the class of each row.
        number: the number of the fold, from 1.
        count: the number of folds.
    """
    permutation = seeds.order(0, 0, len(strata))
    by_class = permutation[strata[permutation].argsort(stable=True)]  # random within a class
    inside = torch.zeros(len(strata), dtype=torch.bool)
    inside[by_class[number - 1 :: count]] = True
    return inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]


def block_of(rows: int, number: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a fold of consecutive rows, and all others."""
    indices = torch.arange(rows)
    inside = (indices * count).div(rows, rounding_mode="floor") == number - 1
    return indices[inside], indices[~inside]
