"""Draw the rows of the splits."""

import torch
from torch import Tensor

from framework import DataError, SettingError, seeds


def split_rows(
    strata: Tensor, val_fraction: float, test_fraction: float, seed: int = 0
) -> dict[str, Tensor]:
    """Return the row numbers of train, val and test, each ascending.

    A pure function of its arguments.

    Args:
        strata: the class of each row, shape (rows,). Each class has its share of each split, to
            within a row, and at least one row in train.
        val_fraction: share of the rows for validation; 0: there is no val.
        test_fraction: share of the rows for the test; 0: there is no test.
        seed: seed of the draw.

    Raises:
        SettingError: the fractions leave no rows for training.
        DataError: there are too few rows.
    """
    if val_fraction + test_fraction >= 1:
        raise SettingError(
            f"val_fraction={val_fraction}, test_fraction={test_fraction}: "
            "expected a sum below 1, so that rows are left for training"
        )
    rows = torch.randperm(len(strata), generator=seeds.generator(seed, "split"))
    if len(strata) > 0 and (strata != strata[0]).any():
        rows = rows[strata[rows].argsort(stable=True)]  # by class, in random order within each
    is_first = torch.ones(len(rows), dtype=torch.bool)  # of its class
    is_first[1:] = strata[rows][1:] != strata[rows][:-1]
    first = rows[is_first]
    rest = rows[~is_first]
    parts = {}
    for part, fraction in (("test", test_fraction), ("val", val_fraction)):
        if fraction > 0:
            is_taken = evenly_spaced(len(rest), max(1, round(fraction * len(rows))))
            parts[part] = ascending(rest[is_taken], len(rows))
            rest = rest[~is_taken]
    if any(len(taken) == 0 for taken in parts.values()):
        raise DataError(
            f"{len(rows)} rows are too few for a validation and a test split; add rows, or set "
            "data.val_fraction=0 and data.test_fraction=0"
        )
    return {"train": ascending(torch.cat([first, rest]), len(rows)), **parts}


def split_parts(
    labels: Tensor,
    sizes: dict[str, int],
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[str, Tensor]:
    """Return the row numbers of the splits of data that may have official val and test parts.

    The rows are numbered through the parts, in the order of `sizes`.

    Args:
        labels: the class of each row of the training part, shape (rows,).
        sizes: the number of rows of the parts that exist; the first one is "train".
        val_fraction: share of the training part for validation, if there is no part "val".
        test_fraction: share of the training part for the test, if there is no part "test".
        seed: seed of the draw.
    """
    val_fraction = 0.0 if "val" in sizes else val_fraction
    test_fraction = 0.0 if "test" in sizes else test_fraction
    rows = split_rows(labels, val_fraction, test_fraction, seed)
    start = 0
    for part, size in sizes.items():
        rows.setdefault(part, torch.arange(start, start + size))
        start += size
    return rows


def ascending(rows: Tensor, count: int) -> Tensor:
    """Return distinct row numbers below `count` in ascending order."""
    is_chosen = torch.zeros(count, dtype=torch.bool)
    is_chosen[rows] = True
    return is_chosen.nonzero()[:, 0]


def evenly_spaced(size: int, count: int) -> Tensor:
    """Return a mask of `size` elements, of which `count` at even distances are set."""
    position = torch.arange(size + 1) * count // max(size, 1)
    return position[1:] > position[:-1]
