#!/usr/bin/env python
"""Gradient boosting and logistic regression on the split of `experiment=flights`."""

import time

from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import framework as fw


def auc(model, data: fw.Data) -> float:
    """Return the area under the curve of a model on the test split, for the second class."""
    inputs, targets = data.train[:]
    test_inputs, test_targets = data.test[:]
    model.fit(inputs.numpy(), targets.numpy())
    probabilities = model.predict_proba(test_inputs.numpy())
    return roc_auc_score(test_targets.numpy(), probabilities[:, 1])


fw.discover()
data = fw.datasets.build("flights", categories="index")
trees = HistGradientBoostingClassifier(
    max_iter=500, categorical_features=[size > 0 for size in data.columns], random_state=0
)
started = time.monotonic()
boosted = auc(trees, data)
seconds = time.monotonic() - started
linear = auc(LogisticRegression(max_iter=300), fw.datasets.build("flights"))
print(
    f"test AUC: HistGradientBoosting, {trees.n_iter_} trees, {boosted:.4f} in {seconds:.0f} s; "
    f"logistic regression {linear:.4f}"
)
