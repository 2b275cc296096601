"""Data sets, splits, loaders, workers, sample order, folds."""
