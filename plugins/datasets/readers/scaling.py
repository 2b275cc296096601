"""Scale inputs and targets: means and deviations, in float64 where float32 would lose digits."""

from typing import Any, Literal

import torch
from torch import Tensor

from framework import DataError, Scale

Scaling = Literal["standard", "log", "none"]
AutoScaling = Literal["auto", "standard", "log", "none"]
Per = Literal["feature", "all"]

FAR = 1000
"""At so many deviations from 0, float32 still holds 1e-4 of a deviation, which is enough."""
MAX_LOSS = 0.01
"""Share of a deviation that rounding to float32 may cost if nothing is standardized."""


def standardize(inputs: Tensor, facts: dict[str, Any]) -> Tensor:
    """Return (inputs - mean) / std as new float32.

    Args:
        inputs: numbers of any type.
        facts: "mean" and "std", numbers or nested lists; "float64": whether to compute in float64.
    """
    dtype = torch.float64 if facts.get("float64") else torch.float32
    floats = inputs.to(dtype, copy=True)
    if "mean" not in facts:
        return floats.float()
    mean = torch.as_tensor(facts["mean"], dtype=dtype)
    std = torch.as_tensor(facts["std"], dtype=dtype)
    return floats.sub_(mean).div_(std).float()  # in place: a large data set is held once


def moments(inputs: Tensor, per: Per = "feature", float64: bool | None = None) -> tuple[Any, Any]:
    """Return mean and standard deviation, 1 for a constant, as numbers or nested lists.

    Args:
        inputs: shape (rows, features), (rows, time, features), or (rows, channels, ...) with at
            least two more axes.
        per: one mean and deviation for each feature (or channel), or one for all numbers.
        float64: compute in float64; None: if `needs_float64`.
    """
    if float64 is None:
        float64 = needs_float64(inputs, per)
    axes = reduced_axes(inputs, per)
    keepdim = per == "feature" and inputs.ndim > 3
    if float64:
        mean, std = mean_and_std(inputs.double(), axes, keepdim)
    else:
        variance, mean = torch.var_mean(inputs.float(), axes, correction=0, keepdim=keepdim)
        std = variance.sqrt().masked_fill(variance == 0, 1.0)
    if keepdim:
        mean = mean[0]
        std = std[0]
    return mean.tolist(), std.tolist()


def mean_and_std(amounts: Tensor, axes: list[int], keepdim: bool = False) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over some axes; those of a constant are itself and 1."""
    mean = amounts.mean(axes, keepdim)
    std = amounts.std(axes, correction=0, keepdim=keepdim)
    lowest = amounts.amin(axes, keepdim)
    # Not std == 0: the mean of a constant is rounded, which leaves a small deviation.
    is_constant = lowest == amounts.amax(axes, keepdim)
    return torch.where(is_constant, lowest, mean), std.masked_fill(is_constant, 1.0)


def reduced_axes(inputs: Tensor, per: Per) -> list[int]:
    """Return the axes over which a mean is taken; see `moments`."""
    if per == "all":
        return list(range(inputs.ndim))
    if inputs.ndim > 3:
        return [0, *range(2, inputs.ndim)]
    return list(range(inputs.ndim - 1))


def fit_scale(amounts: Tensor, rows: Tensor, scaling: AutoScaling, name: str) -> Scale | None:
    """Return the scale of targets that are amounts, or None to leave them as they are.

    Args:
        amounts: the targets, shape (rows, values).
        rows: the numbers of the training rows, by which the scale is fitted.
        scaling: standard: mean 0 and deviation 1; log: the same of their logarithms; none: as they
            are; auto: centered if they are too far from 0 for float32 (see `needs_float64`),
            standardized if their deviation is below 1e-6 or above 1e6, which few optimizers handle.
        name: the name of the data set, for errors.

    Raises:
        DataError: an amount has no logarithm, or amounts that must be scaled are not.
    """
    if scaling == "auto":
        scale = standard_scale(amounts[rows])
        deviations = torch.as_tensor(scale.std)
        if ((deviations < 1e-6) | (deviations > 1e6)).any():
            return scale
        if amounts.dtype == torch.float64:
            return scale._replace(std=torch.ones_like(deviations).tolist())
        return None
    if scaling == "none":
        check_digits(amounts, f"{name}: the targets", "scale_target=standard")
        return None
    if scaling == "standard":
        return standard_scale(amounts[rows])
    if not (amounts > 0).all():
        row = int((amounts <= 0).nonzero()[0, 0])
        raise DataError(
            f"scale_target=log: {name}: the target of row {row + 1} is {amounts[row].tolist()}, "
            "which has no logarithm; use scale_target=standard"
        )
    return standard_scale(amounts[rows], log=True)


def standard_scale(amounts: Tensor, log: bool = False) -> Scale:
    """Return the scale that gives amounts, or their logarithms, mean 0 and deviation 1."""
    known = Scale(log=log).transform(amounts.double())
    axes = list(range(known.ndim))
    if known.ndim == 2 and known.shape[1] > 1:
        axes = [0]  # one scale would make the smaller values vanish beside the larger ones
    mean, std = mean_and_std(known, axes)
    return Scale(mean.tolist(), std.tolist(), log)


def scaled(amounts: Tensor, scale: Scale | None) -> Tensor:
    """Return amounts as float32 targets, computed in float64 where float32 would lose digits."""
    if scale is None:
        return amounts.float()
    mean = torch.as_tensor(scale.mean, dtype=torch.float64)
    std = torch.as_tensor(scale.std, dtype=torch.float64)
    if (mean.abs() > FAR * std).any():
        amounts = amounts.double()
    return scale.transform(amounts).float()


def scaled_as_before(amounts: Tensor, scale: Scale | None, name: str) -> Tensor:
    """Return other amounts than those of the training as targets; see `scaled`.

    Raises:
        DataError: an amount cannot be scaled: it has no logarithm.
    """
    targets = scaled(amounts, scale)
    if not targets.isfinite().all():
        row = int((~targets.isfinite()).nonzero()[0, 0])
        raise DataError(
            f"{name}: the target of row {row + 1} is {amounts[row].tolist()}, which has no "
            "logarithm; the targets of the training were scaled with log"
        )
    return targets


def needs_float64(inputs: Tensor, per: Per = "feature") -> bool:
    """Return whether numbers must be scaled in float64, because float32 loses differences.

    This is so for a feature that is further from 0 than 1,000 of its deviations, or of which the
    squares exceed float32. All others are computed in float32: the results of old runs stay the
    same, bit for bit.
    """
    if inputs.dtype in (torch.uint8, torch.bool):
        return False
    axes = reduced_axes(inputs, per)
    variance, mean = torch.var_mean(inputs.float(), axes, correction=0)
    low = inputs.amin(axes)
    high = inputs.amax(axes)
    largest = torch.maximum(low.double().abs(), high.double().abs())
    is_constant = low == high
    std = torch.where(is_constant, 1.0, variance.double().sqrt())
    fits = (largest <= FAR * std) & (largest < 1e15) & (std > 1e-15)
    constant_fits = is_constant & (mean.double() == low.double())
    return not bool((fits | constant_fits).all())


def check_integers(inputs: Tensor, where: str) -> None:
    """Raise DataError for integers beyond 2^53 that float64 cannot distinguish."""
    if inputs.dtype != torch.int64 or max(-int(inputs.min()), int(inputs.max())) <= 2**53:
        return
    axes = reduced_axes(inputs, "feature")
    known = inputs.double()
    error = (inputs - inputs[:1]).double() - (known - known[:1])
    is_narrow = known.amax(axes) - known.amin(axes) <= 2**53
    is_lost = is_narrow & (error.abs().amax(axes) > MAX_LOSS * known.std(axes, correction=0))
    if is_lost.any():
        largest = int(inputs.abs().max())
        raise DataError(
            f"{where}: float64 cannot hold integers up to {largest}; subtract an offset"
        )


def check_digits(inputs: Tensor, where: str, advice: str) -> None:
    """Raise DataError where float32 cannot distinguish numbers.

    Args:
        inputs: numbers, shape (rows, ...).
        where: their place, for the error.
        advice: the setting that keeps the digits, for the error.
    """
    if inputs.dtype not in (torch.float64, torch.int64):
        return
    axes = reduced_axes(inputs, "feature")
    known = inputs.double()
    error = (known - known.float()).square().mean(axes).sqrt()
    std = known.std(axes, correction=0)
    is_lost = (known.amin(axes) != known.amax(axes)) & (error > MAX_LOSS * std)
    if is_lost.any():
        index = int(is_lost.flatten().nonzero()[0, 0])
        largest = float(known.abs().amax(axes).flatten()[index])
        spread = float(std.flatten()[index])
        raise DataError(
            f"{where}: float32 cannot hold numbers up to {largest:.6g} with a deviation of "
            f"{spread:.3g}; use {advice}"
        )


def standard_facts(data: Any) -> dict[str, Any]:
    """Return how an input of a data set with a mean and a std is scaled, and the classes."""
    return {
        "in_shape": list(data.in_shape),
        "mean": data.mean,
        "std": data.std,
        "target": data.target,
        "classes": list(data.classes),
    }
