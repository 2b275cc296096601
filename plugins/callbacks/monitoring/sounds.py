"""A callback that records validation samples of sound data as sounds."""

import torch
from torch import Tensor

from framework import (
    Callback,
    Context,
    PositiveInt,
    SettingError,
    callbacks,
    check_has_validation,
    evaluation,
)

from .samples import labels_of, spread_samples


@callbacks.register("sounds")
class Sounds(Callback):
    """Records validation samples as sounds with their classes, once before the training.

    The inputs are waveforms in [-1, 1]: (samples,), (1, samples), or (2, samples) with a mask, as
    the audio data sets of the framework give them.

    Args:
        count: number of sounds, evenly spaced in the validation split.
        sample_rate: samples per second; null: that of the data set.
    """

    changes_training = False

    def __init__(self, count: PositiveInt = 8, sample_rate: PositiveInt | None = None):
        self.count = count
        self.sample_rate = sample_rate

    def on_fit_start(self, trainer: Context) -> None:
        check_has_validation(trainer.val_batches, "callbacks.sounds")
        if trainer.state.step > 0:
            return
        facts = evaluation.facts_of(trainer.folder).get("data", {})
        rate = self.sample_rate or facts.get("sample_rate")
        if not isinstance(rate, int):
            raise SettingError(
                "callbacks.sounds: the data set has no sample rate: if its inputs are waveforms, "
                "set callbacks.sounds.sample_rate"
            )
        batch = spread_samples(trainer, self.count)
        inputs = trainer.task.fields.only_input(batch)
        for number, (wave, label) in enumerate(
            zip(waveforms(inputs), labels_of(trainer, batch), strict=True)
        ):
            tag = f"sounds/{number} {label}".strip()
            for logger in trainer.loggers:
                logger.audio(tag, wave[None], rate, trainer.state.step)


def waveforms(inputs: Tensor) -> list[Tensor]:
    """Return the waveform of each input without its padding.

    Raises:
        SettingError: the inputs are no waveforms.
    """
    shape = tuple(inputs.shape[1:])
    is_wave = inputs.ndim == 2 or (inputs.ndim == 3 and shape[0] in (1, 2))
    if not is_wave or not inputs.is_floating_point():
        raise SettingError(
            "callbacks.sounds: expected waveforms (samples,), (1, samples) or (2, samples) of "
            f"floating-point numbers, got {inputs.dtype} {shape}"
        )
    inputs = inputs.detach().float().cpu()
    if inputs.ndim == 2:
        return list(inputs)
    if shape[0] == 1:
        return list(inputs[:, 0])
    waves = []
    for wave, mask in inputs:
        real = wave[mask > 0]
        waves.append(real if len(real) else torch.zeros(1))
    return waves
