"""A callback that records validation samples of sound data as sounds."""

from framework import (
    Callback,
    Context,
    PositiveInt,
    SettingError,
    callbacks,
    check_has_validation,
    evaluation,
)

from .samples import labels_of, measured_samples


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
        batch = measured_samples(trainer, self.count)
        inputs = trainer.task.fields.only_input(batch)
        rate = {} if self.sample_rate is None else {"sample_rate": self.sample_rate}
        shown = evaluation.show_inputs(trainer, inputs, rate)
        if shown.waves is None:
            raise SettingError(
                "callbacks.sounds: expected waveforms (samples,), (1, samples) or (2, samples) of "
                f"floating-point numbers, got {inputs.dtype} {tuple(inputs.shape[1:])}; the sample "
                "rate is that of the data set, or callbacks.sounds.sample_rate"
            )
        for number, label in enumerate(labels_of(trainer, batch)):
            tag = f"sounds/{number} {label}".strip()
            for logger in trainer.loggers:
                logger.audio(tag, shown.waves[number][None], shown.rate, trainer.state.step)
