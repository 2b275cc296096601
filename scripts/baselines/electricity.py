#!/usr/bin/env python
"""Seasonal-naive forecasts and a linear autoregression on electricity demand, with the windows of the experiment."""

import torch
from sklearn.linear_model import Ridge

import framework as fw


def forecast(
    alpha: float, past: torch.Tensor, future: torch.Tensor, new: torch.Tensor
) -> torch.Tensor:
    """Return what follows on `new` by a ridge regression of the future on the past."""
    return torch.from_numpy(Ridge(alpha).fit(past.numpy(), future.numpy()).predict(new.numpy()))


fw.discover()
data = fw.datasets.build("electricity")
windows = [[tensor.double() for tensor in split[:]] for split in (data.train, data.val, data.test)]
(past, future), (val_past, val_future), (test_past, test_future) = [
    (x[:, :, 0], y) for x, y in windows
]
alphas = [10.0**power for power in range(-3, 4)]
alpha = min(
    alphas,
    key=lambda each: float((forecast(each, past, future, val_past) - val_future).abs().mean()),
)
both = torch.cat([past, val_past]), torch.cat([future, val_future])
forecasts = {
    "the day before": test_past[:, -48:],
    "the week before": test_past[:, -336:-288],
    f"AR(336) by ridge (alpha {alpha:g})": forecast(alpha, past, future, test_past),
    "the same fitted on the validation weeks too": forecast(alpha, *both, test_past),
}
errors = {
    name: float((each - test_future).abs().mean()) * data.scale.std
    for name, each in forecasts.items()
}
print("test MAE in MW: " + ", ".join(f"{name} {error:.0f}" for name, error in errors.items()))
