"""Quantiles of training values and of the normal distribution, by operations that ONNX has."""

import torch
from torch import Tensor

from framework_plugins.datasets.readers.encoding import MIN_SHARE


def share_below(values: Tensor, knots: Tensor) -> Tensor:
    """Return the share of the training values below each value, see `encoding.normal_scores`.

    Args:
        values: shape (rows,).
        knots: quantiles at even shares from 0 to 1, in order, shape (knots,).
    """
    last = len(knots) - 1
    equal_or_below = (knots <= values[:, None]).sum(1)
    strictly_below = (knots < values[:, None]).sum(1)
    # Of knots that equal the value, the first search ends at the last one, the second at the first.
    highest = between(values, knots, (equal_or_below - 1).clamp(0, last - 1))
    lowest = between(values, knots, (strictly_below - 1).clamp(0, last - 1))
    highest = torch.where(equal_or_below > last, 1.0, highest)
    lowest = torch.where(strictly_below > last, 1.0, lowest)
    is_first = strictly_below == 0
    highest = torch.where(equal_or_below == 0, 0.0, highest)
    share = (highest + torch.where(is_first, 0.0, lowest)) / 2
    return share.clamp(MIN_SHARE, 1 - MIN_SHARE)


def between(values: Tensor, knots: Tensor, index: Tensor) -> Tensor:
    """Return the share of a value between the knots `index` and `index + 1`."""
    low = knots[index]
    distance = knots[index + 1] - low
    fraction = torch.where(distance > 0, (values - low) / distance, 0.0)
    return (index + fraction) / (len(knots) - 1)


CENTRAL = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
MIDDLE = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
TAIL = (
    (
        6.65790464350110377720e0,
        5.46378491116411436990e0,
        1.78482653991729133580e0,
        2.96560571828504891230e-1,
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ),
    (
        1.0,
        5.99832206555887937690e-1,
        1.36929880922735805310e-1,
        1.48753612908506148525e-2,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)
"""Coefficients of numerator and denominator, of PPND16 in algorithm AS 241."""


def normal_quantile(share: Tensor) -> Tensor:
    """Return the inverse of the normal distribution function, with relative error 1e-16.

    Wichura 1988, Applied Statistics 37, algorithm AS 241. ONNX has no such operation, so that
    `torch.special.ndtri` cannot be exported.

    Args:
        share: float64, in (0, 1).
    """
    q = share - 0.5
    central = q * ratio(CENTRAL, 0.180625 - q * q)
    r = (-torch.where(q < 0, share, 1 - share).log()).sqrt()
    middle = ratio(MIDDLE, r - 1.6)
    tail = ratio(TAIL, r - 5)
    outer = torch.where(r <= 5, middle, tail)
    outer = torch.where(q < 0, -outer, outer)
    return torch.where(q.abs() <= 0.425, central, outer)


def ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Tensor) -> Tensor:
    """Return the ratio of two polynomials, by Horner's rule."""
    values = []
    for polynomial in coefficients:
        value = torch.full_like(x, polynomial[-1])
        for coefficient in reversed(polynomial[:-1]):
            value = value * x + coefficient
        values.append(value)
    return values[0] / values[1]
