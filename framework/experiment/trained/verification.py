"""Compare the outputs of exported files with those of the run."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from framework.contracts.exporter import ExportedModel, Run
from framework.data.preparation import RawInput
from framework.errors import RunError
from framework.runtime.batch import count_rows

from .pipeline import Inputs, Pipeline

TOLERANCE = 1e-5


def verify(
    pipeline: Pipeline,
    run: Run,
    model: ExportedModel,
    batches: Sequence[Inputs],
    name: str,
) -> float:
    """Compare the exported files with the run.

    The difference of floats is relative to the largest output of the batch if that is above 1:
    max |exported - expected| / max(1, max |expected|). Other outputs must be equal.

    Returns:
        The largest difference.

    Raises:
        RunError: it is above `TOLERANCE`, or outputs are missing or of another shape or type.
    """
    largest = 0.0
    for inputs in batches:
        rows = count_rows(inputs)
        with torch.no_grad():
            expected = pipeline.named_outputs(inputs)
            raw = fitted_to(model.raw, pipeline.preparation.recover(inputs))
            found = run(*raw)
        if len(found) != len(expected):
            raise RunError(f"--to {name}: {len(found)} outputs; the run has {len(expected)}")
        for (key, value), other in zip(expected.items(), found, strict=True):
            actual = trimmed(torch.as_tensor(other), value)
            if actual.shape != value.shape or actual.dtype != value.dtype:
                raise RunError(
                    f"--to {name}: output {key} of {rows} samples is {actual.dtype} "
                    f"{tuple(actual.shape)}; that of the run is {value.dtype} {tuple(value.shape)}"
                )
            difference = difference_of(actual, value)
            if not difference <= TOLERANCE:
                raise RunError(
                    f"--to {name}: output {key} of {rows} samples differs from that of the "
                    f"run by {difference:.3g}, more than {TOLERANCE:g}; nothing is written"
                )
            largest = max(largest, difference)
    return largest


def trimmed(outputs: Tensor, like: Tensor) -> Tensor:
    """Return outputs for each position without those of the padding."""
    if outputs.ndim == like.ndim and outputs.ndim > 2 and outputs.shape[1] > like.shape[1]:
        return outputs[:, : like.shape[1]]
    return outputs


def difference_of(actual: Tensor, expected: Tensor) -> float:
    """Return the difference of outputs, see `verify`; infinity if integers are not equal."""
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    if expected.numel() == 0:
        return 0.0
    unequal = torch.where(actual == expected, 0.0, (actual - expected).abs())  # equal infinities
    finite = expected[expected.isfinite()]
    size = max(1.0, float(finite.abs().max())) if len(finite) else 1.0
    return float(unequal.max()) / size


def fitted_to(raw: Mapping[str, RawInput], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return raw inputs, padded with zeros at the end to the (smallest) size of each axis."""
    fitted = []
    for each, tensor in zip(raw.values(), tensors, strict=True):
        padding: list[int] = []
        for smallest, found in zip(each.smallest_shape, tensor.shape[1:], strict=True):
            padding = [0, max(0, smallest - found), *padding]
        fitted.append(nn.functional.pad(tensor, padding) if any(padding) else tensor)
    return tuple(fitted)
