"""Data sets, splits, loaders, workers, sample order, folds."""

SPLITS = ("train", "val", "test")
