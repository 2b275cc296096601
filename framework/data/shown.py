"""What a reader sees of the inputs of a model: images, sounds, texts, cells of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MOST_NUMBERS = 8  # of an input that is shown as numbers


@dataclass
class Shown:
    """Inputs in a readable form, an item for each sample.

    Attributes:
        columns: such as {"text": [...]}, or the cells of a table by column.
        images: shape (samples, 1 or 3, height, width), values in [0, 1]; None for other inputs.
        waves: amplitudes in [-1, 1] of each sound without padding; None for other inputs.
        rate: frames per second of the sounds.
    """

    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    images: Tensor | None = None
    waves: Sequence[Tensor] | None = None
    rate: int = 0


def show_numbers(inputs: Tensor, facts: Mapping[str, Any], max_pixel: float | None) -> Shown:
    """Return inputs as sounds or images if they have such a shape, or as a few numbers.

    Args:
        inputs: shape (samples, ...). Images with other channels than 1 or 3 are averaged over them.
        facts: "mean" and "std", if the inputs were standardized; "sample_rate" of sounds.
        max_pixel: see `Data.max_pixel`; None scales the images to their smallest and largest value.
    """
    rate = facts.get("sample_rate", 0)
    waves = waveforms(inputs) if rate else None
    if waves is not None:
        return Shown({"seconds": [len(wave) / rate for wave in waves]}, waves=waves, rate=rate)
    numbers = inputs.detach().double()
    if "mean" in facts and "std" in facts:
        std = torch.as_tensor(facts["std"], dtype=torch.float64, device=inputs.device)
        mean = torch.as_tensor(facts["mean"], dtype=torch.float64, device=inputs.device)
        numbers = numbers * std + mean
    if inputs.ndim == 4:
        if inputs.shape[1] not in (1, 3):
            numbers = numbers.mean(1, keepdim=True)
        if max_pixel is not None:
            return Shown(images=(numbers / max_pixel).clamp(0, 1).float())
        low, high = numbers.aminmax()
        return Shown(images=((numbers - low) / (high - low).clamp(min=1e-12)).float())
    if inputs.ndim == 2 and inputs.shape[1] <= MOST_NUMBERS and inputs.is_floating_point():
        columns = {f"x{index}": cells.tolist() for index, cells in enumerate(numbers.unbind(1))}
        return Shown(columns)
    return Shown()


def waveforms(inputs: Tensor) -> list[Tensor] | None:
    """Return the waveform of each input without its padding; None for other inputs.

    Args:
        inputs: of shape (samples, frames), (samples, 1, frames), or (samples, 2, frames) with a
            mask as the second channel.
    """
    inputs = inputs.detach()
    if not inputs.is_floating_point() or inputs.ndim not in (2, 3):
        return None
    if inputs.ndim == 2:
        return list(inputs)
    if inputs.shape[1] == 1:
        return list(inputs[:, 0])
    if inputs.shape[1] != 2:
        return None
    return [wave[mask > 0] for wave, mask in inputs]
