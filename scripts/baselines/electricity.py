#!/usr/bin/env python
"""Seasonal-naive forecasts and a linear autoregression on the windows of `electricity`."""

import torch
from sklearn.linear_model import Ridge

import framework as fw


def forecast(
    alpha: float, past: torch.Tensor, future: torch.Tensor, new: torch.Tensor
) -> torch.Tensor:
    """Forecast the future of `new` by a ridge regression of the future on the past."""
    model = Ridge(alpha).fit(past.numpy(), future.numpy())
    return torch.from_numpy(model.predict(new.numpy()))


def windows(split: fw.TensorSplit) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = split[:]
    return inputs[:, :, 0].double(), targets.double()


fw.discover()
data = fw.datasets.build("electricity")
past, future = windows(data.train)
val_past, val_future = windows(data.val)
test_past, test_future = windows(data.test)


def val_error(alpha: float) -> float:
    return float((forecast(alpha, past, future, val_past) - val_future).abs().mean())


alpha = min([10.0**power for power in range(-3, 4)], key=val_error)
all_past = torch.cat([past, val_past])
all_future = torch.cat([future, val_future])
forecasts = {
    "the day before": test_past[:, -48:],
    "the week before": test_past[:, -336:-288],
    f"AR(336) by ridge (alpha {alpha:g})": forecast(alpha, past, future, test_past),
    "the same with the validation weeks": forecast(alpha, all_past, all_future, test_past),
}
errors = []
for name, predicted in forecasts.items():
    error = float((predicted - test_future).abs().mean()) * data.scale.std
    errors.append(f"{name} {error:.0f}")
print("test MAE in MW: " + ", ".join(errors))
