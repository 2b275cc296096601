"""Features of sound as blocks, so that a model takes waveforms; SpecAugment; and pictures of what a model hears.

Waveforms and features follow the convention of `sequence.py` here: (channels + 1, length), the last channel being
the mask.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from framework import (
    BuildError,
    Callback,
    Context,
    Every,
    Fraction,
    Loader,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Shape,
    blocks,
    callbacks,
    class_names,
    shapes,
)
from framework.contracts.state import Cadence

Scale = Literal["slaney", "htk"]
WAVEFORM = "a waveform with its mask (channels+1, samples)"


class LogMel(nn.Module):
    """Waveforms (batch, channels + 1, samples) to log energies of mel bands (batch, mels + 1, frames)."""

    def __init__(self, window: Tensor, filters: Tensor, hop: int, floor: float):
        super().__init__()
        self.hop, self.floor = hop, floor
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[:, -1:] > 0).to(x.dtype)
        wave = (x[:, :-1].mean(1, keepdim=True) * mask).squeeze(1)
        with torch.autocast(
            x.device.type, enabled=False
        ):  # half the bits are too few for energies before the logarithm
            n_fft = 2 * (self.filters.shape[1] - 1)
            spectrum = torch.stft(
                wave,
                n_fft,
                self.hop,
                len(self.window),
                self.window,
                pad_mode="constant",
                return_complex=True,
            )
            power = torch.view_as_real(spectrum).square().sum(-1)
            energies = (self.filters @ power).clamp(min=self.floor).log()
        mask = mask[:, :, :: self.hop]  # a frame is what its middle sample is
        return torch.cat([energies[:, :, : mask.shape[2]] * mask, mask], dim=1)


@blocks.register("log_mel", aliases=["mel_spectrogram"])
def log_mel(
    in_shape: Shape,
    sample_rate: PositiveInt = 16_000,
    mels: PositiveInt = 40,
    window_ms: PositiveFloat = 25.0,
    hop_ms: PositiveFloat = 10.0,
    n_fft: PositiveInt | None = None,
    window: Literal["hann", "hamming"] = "hann",
    scale: Scale = "slaney",
    low_hz: NonNegativeFloat = 0.0,
    high_hz: PositiveFloat | None = None,
    floor: PositiveFloat = 1e-6,
) -> nn.Module:
    """ln max(floor, energy) in overlapping triangles on the mel scale, of the short-time spectrum of a waveform.

    (channels + 1, samples) -> (mels + 1, frames), a frame every hop, about its first sample; channels are averaged.
    Energy is the squared magnitude of the windowed Fourier transform, zeros beyond the ends.

    Args:
        sample_rate: samples a second; must be that of the data.
        mels: triangles.
        window_ms: milliseconds that a frame looks at.
        hop_ms: milliseconds from frame to frame.
        n_fft: points of the transform, an even number; null: the power of two that holds the window.
        window: its form.
        scale: slaney: 3 f / 200 mels up to 1 kHz, logarithmic above, triangles of one area (Slaney 1998, Auditory
            Toolbox, report 1998-010); htk: 2595 log10(1 + f / 700), triangles of height 1 (HTK Book, 5.4).
        low_hz: where the first triangle begins.
        high_hz: where the last one ends; null: half the sample rate.
        floor: the least energy; what is below counts as silence.
    """
    shapes.expect(in_shape, "(channels+1, samples)", "log_mel")
    if in_shape[0] < 2:
        raise BuildError(
            f"log_mel expects {WAVEFORM}; {tuple(in_shape)} has no channel beside the mask"
        )
    length, hop = round(window_ms * sample_rate / 1000), round(hop_ms * sample_rate / 1000)
    n_fft = n_fft or 2 ** math.ceil(math.log2(max(length, 2)))
    high_hz = high_hz or sample_rate / 2
    check_frames(sample_rate, length, hop, n_fft, low_hz, high_hz)
    shape = {"hann": torch.hann_window, "hamming": torch.hamming_window}[window](length)
    filters = mel_filters(sample_rate, n_fft, mels, scale, low_hz, high_hz)
    return LogMel(shape, filters, hop, floor)


def check_frames(
    sample_rate: int, length: int, hop: int, n_fft: int, low_hz: float, high_hz: float
) -> None:
    """Raise BuildError for frames and bands that cannot be."""
    if length < 1 or hop < 1:
        raise BuildError(
            f"log_mel: window_ms and hop_ms must be a sample at least, {1000 / sample_rate:g} ms"
        )
    if n_fft < length or n_fft % 2:
        raise BuildError(
            f"log_mel: n_fft={n_fft} must be even, and hold the window of {length} samples"
        )
    if not low_hz < high_hz <= sample_rate / 2:
        raise BuildError(
            f"log_mel: bands from low_hz={low_hz:g} to high_hz={high_hz:g} must lie, in this order, below half of "
            f"sample_rate={sample_rate}"
        )


def mel_filters(
    sample_rate: int, n_fft: int, mels: int, scale: Scale, low_hz: float, high_hz: float
) -> Tensor:
    """Return the triangles over the bins of a spectrum, (mels, n_fft / 2 + 1). Raises BuildError for an empty one."""
    ends = torch.tensor([low_hz, high_hz], dtype=torch.float64)
    low, high = hz_to_mel(ends, scale).tolist()
    corners = mel_to_hz(torch.linspace(low, high, mels + 2, dtype=torch.float64), scale)
    bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    filters = torch.minimum(rising, falling).clamp(min=0)
    empty = int((filters.amax(1) == 0).sum())
    if empty:
        raise BuildError(
            f"log_mel: {empty} of {mels} mels fall between the points of n_fft={n_fft}; take fewer mels"
        )
    if scale == "slaney":
        filters *= (2 / (corners[2:] - corners[:-2]))[:, None]
    return filters.float()


BREAK_HZ, BREAK_MEL, LOG_STEP = (
    1000.0,
    15.0,
    math.log(6.4) / 27,
)  # of Slaney's scale: linear below, logarithmic above


def hz_to_mel(hz: Tensor, scale: Scale) -> Tensor:
    if scale == "htk":
        return 2595 * torch.log10(1 + hz / 700)
    above = BREAK_MEL + (hz.clamp(min=BREAK_HZ) / BREAK_HZ).log() / LOG_STEP
    return torch.where(hz < BREAK_HZ, hz * BREAK_MEL / BREAK_HZ, above)


def mel_to_hz(mel: Tensor, scale: Scale) -> Tensor:
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    above = BREAK_HZ * ((mel - BREAK_MEL) * LOG_STEP).exp()
    return torch.where(mel < BREAK_MEL, mel * BREAK_HZ / BREAK_MEL, above)


class Cepstrum(nn.Module):
    """The first coefficients of the cosine transform of log energies, at each frame."""

    def __init__(self, mels: int, coefficients: int):
        super().__init__()
        angle = math.pi / mels * torch.outer(torch.arange(coefficients), torch.arange(mels) + 0.5)
        basis = angle.cos() * math.sqrt(2 / mels)
        basis[0] /= math.sqrt(2)
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.basis @ x[:, :-1], x[:, -1:]], dim=1)


@blocks.register("mfcc")
def mfcc(
    in_shape: Shape,
    sample_rate: PositiveInt = 16_000,
    coefficients: PositiveInt = 13,
    mels: PositiveInt = 40,
    window_ms: PositiveFloat = 25.0,
    hop_ms: PositiveFloat = 10.0,
    n_fft: PositiveInt | None = None,
    window: Literal["hann", "hamming"] = "hann",
    scale: Scale = "slaney",
    low_hz: NonNegativeFloat = 0.0,
    high_hz: PositiveFloat | None = None,
    floor: PositiveFloat = 1e-6,
) -> nn.Module:
    """Mel-frequency cepstral coefficients: the orthonormal cosine transform (DCT-II) of `log_mel` at each frame.

    (channels + 1, samples) -> (coefficients + 1, frames) (Davis & Mermelstein 1980). Without a lifter.

    Args:
        sample_rate: samples a second; must be that of the data.
        coefficients: how many, from number 0 (the mean level) on; at most mels.
        mels: triangles of the spectrum.
        window_ms: milliseconds that a frame looks at.
        hop_ms: milliseconds from frame to frame.
        n_fft: points of the transform, an even number; null: the power of two that holds the window.
        window: its form.
        scale: of the triangles, see log_mel.
        low_hz: where the first triangle begins.
        high_hz: where the last one ends; null: half the sample rate.
        floor: the least energy; what is below counts as silence.
    """
    if coefficients > mels:
        raise BuildError(
            f"mfcc: {mels} mels have no {coefficients} coefficients; take at most as many"
        )
    spectrum = {"window_ms": window_ms, "hop_ms": hop_ms, "n_fft": n_fft, "window": window}
    bands = {"mels": mels, "scale": scale, "low_hz": low_hz, "high_hz": high_hz, "floor": floor}
    energies = blocks.build("log_mel", in_shape, sample_rate=sample_rate, **spectrum, **bands)
    return nn.Sequential(energies, Cepstrum(mels, coefficients))


@blocks.register("spec_augment")
class SpecAugment(nn.Module):
    """In training, some bands of frequency and stretches of time of each sample become 0.

    Time and frequency masking of Park et al. 2019, arXiv:1904.08779, section 2 (without the time warping, which they
    found to matter least): a width drawn from 0 to its limit, then the place. 0 is the mean after `masked_norm`.
    """

    def __init__(
        self,
        in_shape: Shape,
        frequency_masks: NonNegativeInt = 2,
        frequency_width: NonNegativeInt = 8,
        time_masks: NonNegativeInt = 2,
        time_width: NonNegativeInt = 25,
        time_share: Fraction = 0.2,
    ):
        """Keep the limits.

        Args:
            frequency_masks: bands.
            frequency_width: channels of a band, at most (the paper's F).
            time_masks: stretches.
            time_width: frames of a stretch, at most (the paper's T).
            time_share: share of the sample's real frames that a stretch has, at most (the paper's p).
        """
        super().__init__()
        shapes.expect(in_shape, "(C+1, L)", "spec_augment")
        self.frequency_masks, self.frequency_width = frequency_masks, frequency_width
        self.time_masks, self.time_width, self.time_share = time_masks, time_width, time_share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        values, mask = x[:, :-1], x[:, -1:]
        channels = torch.full((len(x), 1), float(values.shape[1]), device=x.device)
        frames = (mask > 0).sum(2).to(channels.dtype)
        widest = (self.time_share * frames).floor().clamp(max=self.time_width)
        bands = draw_bands(
            self.frequency_masks,
            channels.clamp(max=self.frequency_width),
            channels,
            values.shape[1],
        )
        stretches = draw_bands(self.time_masks, widest, frames, values.shape[2])
        hidden = bands.unsqueeze(2) | stretches.unsqueeze(1)
        return torch.cat([values.masked_fill(hidden, 0.0), mask], dim=1)


def draw_bands(count: int, widest: Tensor, size: Tensor, positions: int) -> Tensor:
    """Return for each sample which of its positions lie in one of `count` bands drawn for it, (batch, positions).

    widest, size: (batch, 1): the greatest width of a band, and of how many positions it is drawn.
    """
    width = (
        (torch.rand(len(size), count, device=size.device) * (widest + 1)).floor().minimum(widest)
    )
    start = (torch.rand(len(size), count, device=size.device) * (size - width + 1)).floor()
    position = torch.arange(positions, device=size.device)
    inside = (position >= start.unsqueeze(2)) & (position < (start + width).unsqueeze(2))
    return inside.any(1)


@callbacks.register("spectrograms")
class Spectrograms(Callback):
    """Shows the log-mel pictures of some validation samples, framed green where the model is right, red where not.

    With them goes a table of what they are and what they are taken for. The features are those of the model's own
    log_mel or mfcc block; without one, its inputs.
    """

    changes_training = False

    def __init__(self, samples: PositiveInt = 8, every: Every = "1epoch"):
        """Say how many, and how often.

        Args:
            samples: how many, at even distances in the validation split.
            every: how often.
        """
        self.samples, self.cadence = samples, Cadence(every)

    def on_validation_end(self, trainer: Context) -> None:
        if self.cadence.due(trainer.state, epoch_end=trainer.state.batch == 0):
            self.show(trainer)

    def show(self, trainer: Context) -> None:
        chosen = validation_samples(trainer, self.samples)
        if chosen is None:
            return
        inputs, targets = chosen
        features, outputs = heard(trainer.model, inputs.to(trainer.device))
        probability, found = outputs.float().cpu().softmax(1).max(1)
        pictures = torch.stack(
            [framed(*each) for each in zip(features.cpu(), found == targets, strict=True)]
        )
        table = predictions_table(
            targets.tolist(), found.tolist(), probability.tolist(), class_names(trainer.folder)
        )
        for logger in trainer.loggers:
            logger.images("spectrograms", pictures, trainer.state.step)
            logger.text("spectrograms/predictions", table, trainer.state.step)


def validation_samples(trainer: Context, count: int) -> tuple[Tensor, Tensor] | None:
    """Return inputs (rows, channels + 1, length) and classes of some validation samples; None where there are none."""
    batches = trainer.val_batches
    if not isinstance(batches, Loader):
        return None
    size = len(batches.split)
    rows = [batches.split[row] for row in range(0, size, -(-size // count))]
    inputs, targets = (torch.stack([torch.as_tensor(row[n]) for row in rows]) for n in (0, 1))
    return (
        (inputs, targets)
        if inputs.ndim == 3 and targets.ndim == 1 and not targets.is_floating_point()
        else None
    )


def heard(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features that the model makes of its inputs, and its outputs."""
    features = [inputs]
    front = next((module for module in model.modules() if isinstance(module, LogMel)), None)
    if front is None:
        return inputs, shapes.dry_run(model, inputs)
    hook = front.register_forward_hook(lambda module, given, output: features.append(output))
    try:
        outputs = shapes.dry_run(model, inputs)
    finally:
        hook.remove()
    return features[-1], outputs


def framed(features: Tensor, right: Any) -> Tensor:
    """Return features (channels + 1, frames) as a picture, low frequencies below, in a frame of green or red."""
    values, real = features[:-1].float(), features[-1] > 0
    low, high = values[:, real].aminmax() if real.any() else (values.min(), values.max())
    grey = ((values - low) / (high - low).clamp(min=1e-6) * real).flip(0).clamp(0, 1)
    picture = nn.functional.pad(grey.repeat_interleave(2, 0).expand(3, -1, -1), [3, 3, 3, 3])
    border = (
        nn.functional.pad(torch.zeros_like(picture[0, 3:-3, 3:-3]), [3, 3, 3, 3], value=1.0) > 0
    )
    color = torch.tensor([0.2, 0.7, 0.2] if right else [0.9, 0.1, 0.1])
    return torch.where(border, color[:, None, None], picture)


def predictions_table(
    targets: list[int], found: list[int], probability: list[float], names: list[str]
) -> str:
    """Return a table in markdown: what each sample is, and what it is taken for."""

    def name(index: int) -> str:
        return names[index] if index < len(names) else str(index)

    rows = [
        f"| {number} | {name(target)} | {name(guess)} | {share:.2f} |"
        for number, (target, guess, share) in enumerate(
            zip(targets, found, probability, strict=True), 1
        )
    ]
    return "\n".join(["| sample | is | taken for | probability |", "|---|---|---|---|", *rows])
