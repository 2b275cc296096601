"""Audio features as blocks, so that a model takes waveforms; SpecAugment; images of the features.

Waveforms and features follow the convention of `layers/sequence.py`: (channels + 1, length), the
last channel being the mask.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from framework import (
    BuildError,
    Context,
    Every,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SettingError,
    Shape,
    blocks,
    callbacks,
    class_names,
    drawing,
    markdown,
    names_or_numbers,
    read_spread_samples,
    shapes,
)
from framework.contracts.metric import predicted_classes
from framework.contracts.periodic_callback import ValidationCallback

Scale = Literal["slaney", "htk"]
WAVEFORM = "a waveform with its mask (channels+1, samples)"


class LogMel(nn.Module):
    """Log energies of mel bands: (batch, channels + 1, samples) -> (batch, mels + 1, frames).

    Args:
        window: window function, (samples of a frame,).
        filters: weights of the frequency bins in each band, (mels, n_fft / 2 + 1).
        hop: samples between frames.
        floor: lower bound of the energy.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, window: Tensor, filters: Tensor, hop: int, floor: float):
        super().__init__()
        self.hop = hop
        self.floor = floor
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[:, -1:] > 0).to(x.dtype)
        wave = (x[:, :-1].mean(1, keepdim=True) * mask).squeeze(1)
        # Half precision is too coarse for energies before the logarithm.
        with torch.autocast(x.device.type, enabled=False):
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
        mask = mask[:, :, :: self.hop]  # a frame is real if its middle sample is real
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
    """Logarithm of the energy in mel bands: ln max(floor, energy), for each frame of a waveform.

    (channels + 1, samples) -> (mels + 1, frames). Channels are averaged. Frame t is centered at
    sample t * hop. The energy of a band is the squared magnitude of the windowed Fourier transform,
    weighted by a triangle on the mel scale. The waveform is zero-padded at both ends.

    Args:
        sample_rate: samples per second; must be that of the data.
        mels: number of mel bands.
        window_ms: length of the window in milliseconds.
        hop_ms: step between frames in milliseconds.
        n_fft: length of the Fourier transform, an even number; null: the smallest power of two that
            is not below the window.
        window: window function.
        scale: slaney: 3 f / 200 mels up to 1 kHz, logarithmic above, triangles of equal area
            (Slaney 1998, Auditory Toolbox, report 1998-010); htk: 2595 log10(1 + f / 700),
            triangles of height 1 (HTK Book, 5.4).
        low_hz: lower end of the first band.
        high_hz: upper end of the last band; null: half the sample rate.
        floor: lower bound of the energy.
    """
    shapes.expect(in_shape, "(channels+1, samples)", "log_mel")
    if in_shape[0] < 2:
        raise BuildError(
            f"log_mel expects {WAVEFORM}, got {tuple(in_shape)}, which is the mask only"
        )
    length = round(window_ms * sample_rate / 1000)
    hop = round(hop_ms * sample_rate / 1000)
    n_fft = n_fft or 2 ** math.ceil(math.log2(max(length, 2)))
    high_hz = high_hz or sample_rate / 2
    check_frames(sample_rate, length, hop, n_fft, low_hz, high_hz)
    shape = {"hann": torch.hann_window, "hamming": torch.hamming_window}[window](length)
    filters = mel_filters(sample_rate, n_fft, mels, scale, low_hz, high_hz)
    return LogMel(shape, filters, hop, floor)


def check_frames(
    sample_rate: int, length: int, hop: int, n_fft: int, low_hz: float, high_hz: float
) -> None:
    """Raise BuildError for impossible frames or bands."""
    if length < 1 or hop < 1:
        raise BuildError(
            f"log_mel: expected a window_ms and hop_ms of at least one sample "
            f"({1000 / sample_rate:g} ms)"
        )
    if n_fft < length or n_fft % 2:
        raise BuildError(
            f"log_mel: n_fft={n_fft}: expected an even number >= {length} (samples of the window)"
        )
    if not low_hz < high_hz <= sample_rate / 2:
        raise BuildError(
            f"log_mel: expected low_hz < high_hz <= sample_rate / 2, got low_hz={low_hz:g},"
            f" high_hz={high_hz:g}, sample_rate={sample_rate}"
        )


def mel_filters(
    sample_rate: int, n_fft: int, mels: int, scale: Scale, low_hz: float, high_hz: float
) -> Tensor:
    """Return the triangles over the bins of a spectrum, (mels, n_fft / 2 + 1).

    Raises:
        BuildError: a triangle contains no bin.
    """
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
            f"log_mel: {empty} of mels={mels} bands contain no frequency bin of n_fft={n_fft};"
            " reduce mels"
        )
    if scale == "slaney":
        filters *= (2 / (corners[2:] - corners[:-2]))[:, None]
    return filters.float()


# The mel scale of Slaney is linear below this frequency and logarithmic above.
BREAK_HZ = 1000.0
BREAK_MEL = 15.0
LOG_STEP = math.log(6.4) / 27


def hz_to_mel(hz: Tensor, scale: Scale) -> Tensor:
    """Convert frequencies to mels."""
    if scale == "htk":
        return 2595 * torch.log10(1 + hz / 700)
    above = BREAK_MEL + (hz.clamp(min=BREAK_HZ) / BREAK_HZ).log() / LOG_STEP
    return torch.where(hz < BREAK_HZ, hz * BREAK_MEL / BREAK_HZ, above)


def mel_to_hz(mel: Tensor, scale: Scale) -> Tensor:
    """Convert mels to frequencies."""
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    above = BREAK_HZ * ((mel - BREAK_MEL) * LOG_STEP).exp()
    return torch.where(mel < BREAK_MEL, mel * BREAK_HZ / BREAK_MEL, above)


class Cepstrum(nn.Module):
    """The first coefficients of the cosine transform (DCT-II) of log energies, for each frame."""

    basis: Tensor

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
    """Mel-frequency cepstral coefficients: the orthonormal DCT-II of `log_mel` for each frame.

    (channels + 1, samples) -> (coefficients + 1, frames) (Davis & Mermelstein 1980). There is no
    liftering.

    Args:
        sample_rate: samples per second; must be that of the data.
        coefficients: number of coefficients, counted from 0 (the mean level); at most mels.
        mels: number of mel bands.
        window_ms: length of the window in milliseconds.
        hop_ms: step between frames in milliseconds.
        n_fft: length of the Fourier transform, an even number; null: the smallest power of two that
            is not below the window.
        window: window function.
        scale: mel scale, see log_mel.
        low_hz: lower end of the first band.
        high_hz: upper end of the last band; null: half the sample rate.
        floor: lower bound of the energy.
    """
    if coefficients > mels:
        raise BuildError(f"mfcc: coefficients={coefficients}: expected at most mels={mels}")
    energies = blocks.build(
        "log_mel",
        in_shape,
        sample_rate=sample_rate,
        mels=mels,
        window_ms=window_ms,
        hop_ms=hop_ms,
        n_fft=n_fft,
        window=window,
        scale=scale,
        low_hz=low_hz,
        high_hz=high_hz,
        floor=floor,
    )
    return nn.Sequential(energies, Cepstrum(mels, coefficients))


@blocks.register("spec_augment")
class SpecAugment(nn.Module):
    """Set random bands of channels and stretches of frames of each sample to 0 in training.

    Time and frequency masking of Park et al. 2019, arXiv:1904.08779, section 2 (without the time
    warping, which they found to matter least): a width drawn from 0 to its limit, then the place. 0
    is the mean after `masked_norm`.

    Args:
        frequency_masks: number of bands.
        frequency_width: largest number of channels of a band (F in the paper).
        time_masks: number of stretches.
        time_width: largest number of frames of a stretch (T in the paper).
        time_share: largest fraction of the real frames of the sample in a stretch (p in the
            paper).
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
        super().__init__()
        shapes.expect(in_shape, "(C+1, L)", "spec_augment")
        self.frequency_masks = frequency_masks
        self.frequency_width = frequency_width
        self.time_masks = time_masks
        self.time_width = time_width
        self.time_share = time_share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        values = x[:, :-1]
        mask = x[:, -1:]
        channels = torch.full((len(x), 1), float(values.shape[1]), device=x.device)
        frames = (mask > 0).sum(2).to(channels.dtype)
        widest = (self.time_share * frames).floor().clamp(max=self.time_width)
        widest_band = channels.clamp(max=self.frequency_width)
        bands = draw_bands(self.frequency_masks, widest_band, channels, values.shape[1])
        stretches = draw_bands(self.time_masks, widest, frames, values.shape[2])
        hidden = bands.unsqueeze(2) | stretches.unsqueeze(1)
        return torch.cat([values.masked_fill(hidden, 0.0), mask], dim=1)


def draw_bands(count: int, widest: Tensor, size: Tensor, positions: int) -> Tensor:
    """Draw bands for each sample and return the mask of their positions, (batch, positions).

    Args:
        count: number of bands of a sample.
        widest: the largest width of a band, (batch, 1).
        size: the number of positions from which a band is drawn, (batch, 1).
        positions: the size of the masked axis.
    """
    width = torch.rand(len(size), count, device=size.device) * (widest + 1)
    width = width.floor().minimum(widest)
    start = torch.rand(len(size), count, device=size.device) * (size - width + 1)
    start = start.floor()
    position = torch.arange(positions, device=size.device)
    inside = (position >= start.unsqueeze(2)) & (position < (start + width).unsqueeze(2))
    return inside.any(1)


@callbacks.register("spectrograms")
class Spectrograms(ValidationCallback):
    """Logs spectrograms of validation samples, framed green if predicted correctly, else red.

    Below each is the predicted class with its probability, and the true class; a table also lists
    them. The features are the output of the log_mel or mfcc block of the model; without such a
    block, its inputs.

    Args:
        samples: number of samples, evenly spaced in the validation split.
        every: how often they are logged.
    """

    name = "spectrograms"

    def __init__(self, samples: PositiveInt = 8, every: Every = "1epoch"):
        super().__init__(every)
        self.samples = samples

    def cost(self) -> str:
        return f"runs the model on {self.samples:,} samples, {self.cadence}"

    def on_fit_start(self, trainer: Context) -> None:
        super().on_fit_start(trainer)
        self._read_sounds(trainer, 1)

    def show(self, trainer: Context) -> None:
        inputs, targets = self._read_sounds(trainer, self.samples)
        features, outputs = features_and_outputs(trainer.model, inputs)
        outputs = outputs.float().cpu()
        shares = outputs.softmax(1).amax(1).tolist()
        predicted = predicted_classes(outputs).tolist()
        names = names_or_numbers(class_names(trainer.folder), outputs.shape[1])
        names.append("NaN")  # no prediction
        images = []
        rows = []
        captions = []
        samples = zip(features.cpu(), targets.tolist(), predicted, shares, strict=True)
        for feature, target, guess, share in samples:
            images.append(framed_image(feature, guess == target))
            label = names[target] if target >= 0 else str(target)
            shown = [markdown.literal(name) for name in (label, names[guess])]
            rows.append([len(images), *shown, f"{share:.2f}"])
            captions.append(f"{names[guess]} {share:.0%}\ntrue: {label}")
        table = markdown.table(["sample", "true", "predicted", "probability"], rows)
        columns = min(4, max(1, drawing.CARD // (images[0].shape[-1] + 8)))
        pictures = drawing.captioned(torch.stack(images), captions, columns)
        for logger in trainer.loggers:
            logger.images("spectrograms", pictures, trainer.state.step)
            logger.text("spectrograms/predictions", table, trainer.state.step)

    def _read_sounds(self, trainer: Context, count: int) -> tuple[Tensor, Tensor]:
        """Return inputs and classes of samples of the validation split (collective).

        Raises:
            SettingError: they are no sounds with one class each.
        """
        assert trainer.val_batches is not None
        batch = read_spread_samples(trainer.val_batches, count, trainer.device)
        inputs = trainer.task.fields.only_input(batch)
        targets = trainer.task.fields.targets(batch)
        if inputs.ndim != 3 or targets.ndim != 1 or targets.is_floating_point():
            raise SettingError(
                "callbacks.spectrograms: expected inputs (channels, length) with one class each, "
                f"got inputs {tuple(inputs.shape[1:])} and targets {targets.dtype} "
                f"{tuple(targets.shape[1:])}"
            )
        return inputs, targets


def features_and_outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of the LogMel module of the model, or its inputs, and its outputs."""
    log_mel = next((module for module in model.modules() if isinstance(module, LogMel)), None)
    if log_mel is None:
        return inputs, shapes.dry_run(model, inputs)
    features = []
    hook = log_mel.register_forward_hook(lambda module, args, output: features.append(output))
    try:
        outputs = shapes.dry_run(model, inputs)
    finally:
        hook.remove()
    return features[-1], outputs


def framed_image(features: Tensor, correct: bool) -> Tensor:
    """Return features (channels + 1, frames) as an image with a green or red frame.

    Low frequencies are at the bottom; each band has two rows.
    """
    values = features[:-1].float()
    real = features[-1] > 0
    shown = values[:, real] if real.any() else values
    low, high = shown.aminmax()
    gray = ((values - low) / (high - low).clamp(min=1e-6) * real).flip(0).clamp(0, 1)
    rgb = gray.repeat_interleave(2, 0).expand(3, -1, -1)
    color = torch.tensor([0.2, 0.7, 0.2] if correct else [0.9, 0.1, 0.1])
    frame = 3
    _, height, width = rgb.shape
    image = color[:, None, None].repeat(1, height + 2 * frame, width + 2 * frame)
    image[:, frame:-frame, frame:-frame] = rgb
    return image
