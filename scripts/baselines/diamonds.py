#!/usr/bin/env python
"""Gradient boosting from scikit-learn on the diamonds, with the split of `experiment=diamonds`."""

import time

import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.metrics import mean_absolute_error, r2_score

import framework as fw

fw.discover()
data = fw.datasets.build("diamonds", categories="index")
x, y = (tensor.numpy() for tensor in data.train.tensors)
categorical = [size > 0 for size in data.columns]
started = time.monotonic()
model = HistGradientBoostingRegressor(
    max_iter=500, categorical_features=categorical, random_state=0
)
model.fit(x, y[:, 0])
inputs, targets = data.test.tensors
predicted = torch.from_numpy(model.predict(inputs.numpy()))[:, None]
price = data.scale.inverse_transform(predicted)
expected = data.scale.inverse_transform(targets)
r2_log = r2_score(expected.log(), price.log())
r2 = r2_score(expected, price)
mae = mean_absolute_error(expected, price)
print(
    f"HistGradientBoosting, {model.n_iter_} trees: test r2_log {r2_log:.4f}, r2 {r2:.4f}, "
    f"mae {mae:.1f}, {time.monotonic() - started:.0f} s"
)
