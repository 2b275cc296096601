"""Sounds in files, a folder for each class; the spoken prompts of Asterisk; and synthetic tones.

An input has shape (2, samples): the waveform in [-1, 1], the mean of the channels, and its mask
(see `layers/sequence.py`). A longer sound is cut to its middle, a shorter one is padded with zeros.
"""

import io
import math
import os
import wave
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from framework import (
    Data,
    DataError,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Preparation,
    Rate,
    Scale,
    Shape,
    TensorSplit,
    datasets,
    memory,
    seeds,
)

from .preparations.sequences import Waveforms
from .readers.class_folders import (
    LabelledFiles,
    find_classes,
    find_files,
    find_labelled_files,
    find_parts,
)
from .readers.data_files import check_memory, file_errors, one_line, open_data
from .readers.fetched import cache_folder, fetch_command
from .readers.splits import split_parts, split_rows

SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au"}
BYTES_PER_SAMPLE = 12  # while a wav file is read: as float32, and before as 32 bits
MAX_IN_MEMORY = 2**30  # bytes that `audio_folder` holds in memory by default


class SoundFiles(LabelledFiles):
    """Sound files with the index of their class; a sound is decoded when its sample is read."""

    def read(self, file: Path) -> Tensor:
        return read_sound(file, self.facts)

    def in_memory(self) -> TensorSplit:
        """Read all files.

        Raises:
            DataError: a file cannot be read, or the sounds need more memory than is available.
        """
        channels, samples = self.facts["in_shape"]
        memory.check_room(len(self) * channels * samples * 4, f"{len(self)} sounds")
        inputs = torch.zeros(len(self), channels, samples)
        for row, file in enumerate(self.files):
            inputs[row] = read_sound(file, self.facts)
        return TensorSplit(inputs, self.labels)


class SoundData(Data):
    """A data set of sounds with one sample rate and one length, in classes.

    Args:
        classes: the names of the classes.
        sample_rate: samples per second.
        seconds: length of an input.
        resample: convert files of another rate; false: such a file is an error.
        min_seconds: a shorter file is an error.
    """

    measures_training = False
    input_suffixes = tuple(sorted(SUFFIXES))
    single_input_suffixes = input_suffixes

    def __init__(
        self,
        classes: Sequence[str],
        sample_rate: int,
        seconds: float,
        resample: bool = False,
        min_seconds: float = 0.0,
    ):
        self.classes = list(classes)
        self.out_shape = (len(classes),)
        memory.check_room(
            8 * seconds * sample_rate, f"a sound of {seconds:g} s at {sample_rate} Hz"
        )
        self.in_shape = (2, max(1, round(seconds * sample_rate)))
        self.sample_rate = sample_rate
        self.resample = resample
        self.min_seconds = min_seconds

    def facts(self) -> dict[str, Any]:
        """Return how a sound becomes an input, and the classes."""
        return {
            "sample_rate": self.sample_rate,
            "resample": self.resample,
            "min_seconds": self.min_seconds,
            "target": self.target,
            "in_shape": list(self.in_shape),
            "classes": list(self.classes),
        }

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read a sound file, or all sounds of a folder in sorted order."""
        if not path.exists():
            raise DataError(f"{path}: no such file or folder (looked in {Path.cwd()})")
        files = find_sounds(path) if path.is_dir() else [path]
        return torch.stack([read_sound(file, facts) for file in files])

    @classmethod
    def read_labelled(
        cls,
        path: Path,
        facts: dict[str, Any],
        settings: Mapping[str, Any],
        scale: Scale | None = None,
    ) -> SoundFiles:
        """Return the sounds of PATH/CLASS/*.wav; they are read when needed."""
        files, labels = find_labelled_files(path, facts["classes"], "sounds", find_sounds)
        return SoundFiles(files, labels, facts)

    @classmethod
    def preparation(cls, facts: dict[str, Any], in_shape: Shape) -> Preparation | None:
        return Waveforms(facts, in_shape)


@datasets.register("audio_folder")
class AudioFolder(SoundData):
    """Sounds in ROOT/CLASS/*.wav, or in ROOT/train/CLASS/, ROOT/val/CLASS/ and ROOT/test/CLASS/.

    Other formats than wav, such as flac and ogg, need the package soundfile. A part without a
    folder is drawn from train.

    Args:
        path: ROOT; the classes are its sub-folders (or those of ROOT/train), in sorted order.
        sample_rate: samples per second; a file of another rate is an error without resample.
        seconds: length of an input: a longer sound is cut to its middle, a shorter one is
            padded with zeros.
        resample: convert files of another rate to sample_rate, by a windowed sinc (see
            `resampled`).
        min_seconds: a shorter file is an error.
        in_memory: true: read all files at the start; false: the loader's workers read them
            when they are needed; null: true if they fit into 1 GiB.
        val_fraction: share of the training sounds for validation, if it has no folder.
        test_fraction: share of the training sounds for the test, if it has no folder.
        split_seed: seed of the draw.
    """

    def __init__(
        self,
        path: Path,
        sample_rate: PositiveInt = 16_000,
        seconds: PositiveFloat = 1.0,
        resample: bool = False,
        min_seconds: NonNegativeFloat = 0.01,
        in_memory: bool | None = None,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
        split_seed: int = 0,
    ):
        folders = find_parts(path.expanduser())
        classes = find_classes(folders["train"], "sounds")
        super().__init__(classes, sample_rate, seconds, resample, min_seconds)
        splits: dict[str, SoundFiles] = {}
        for part, folder in folders.items():
            files, labels = find_labelled_files(folder, classes, "sounds", find_sounds)
            splits[part] = SoundFiles(files, labels, self.facts())
        train = splits["train"]
        sizes = {part: len(files) for part, files in splits.items()}
        rows = split_parts(train.labels, sizes, val_fraction, test_fraction, split_seed)
        for part, chosen in rows.items():
            if part == "train" or part not in folders:
                splits[part] = train.subset(chosen)
        if in_memory is None:
            bytes_per_sound = 4 * math.prod(self.in_shape)
            in_memory = bytes_per_sound * sum(map(len, splits.values())) <= MAX_IN_MEMORY
        for part, split in splits.items():
            setattr(self, part, split.in_memory() if in_memory else split)


def find_sounds(folder: Path) -> list[Path]:
    """Return the sound files in a folder, at any depth, sorted.

    Raises:
        DataError: there is no sound file.
    """
    return find_files(folder, SUFFIXES, "sounds")


def read_sound(file: Path, facts: dict[str, Any]) -> Tensor:
    """Return a file as an input, shape (2, samples).

    Raises:
        DataError: the file cannot be read, or is not as the facts say.
    """
    with open_data(file) as raw:
        return decode_sound(raw, str(file), file.suffix, facts)


def decode_sound(raw: IO[bytes], name: str, suffix: str, facts: dict[str, Any]) -> Tensor:
    """Return a sound file as an input, shape (2, samples).

    Args:
        raw: the bytes of the file.
        name: its name, for errors.
        suffix: the suffix of the file, such as ".wav".
        facts: those of `SoundData`.

    Raises:
        DataError: the file cannot be read, or is not as the facts say.
    """
    waveform, rate = decode_waveform(raw, name, suffix)
    expected = facts["sample_rate"]
    if len(waveform) < max(1, facts["min_seconds"] * rate):
        raise DataError(
            f"{name} is {len(waveform) / rate:g} s long, shorter than "
            f"data.min_seconds={facts['min_seconds']:g}; delete it, or restore the sound"
        )
    if not waveform.isfinite().all():
        raise DataError(f"{name} contains NaN or infinity; delete it, or restore the sound")
    if rate != expected and not facts["resample"]:
        raise DataError(
            f"{name} has {rate} samples per second, expected {expected}: set "
            f"data.sample_rate={rate} if all files have this rate, or data.resample=true"
        )
    return padded(resampled(waveform, rate, expected), facts["in_shape"][1])


def padded(waveform: Tensor, samples: int) -> Tensor:
    """Return the middle of a waveform, or all of it and zeros, with its mask: (2, samples)."""
    start = max(0, len(waveform) - samples) // 2
    kept = waveform[start : start + samples]
    sound = torch.zeros(2, samples)
    sound[0, : len(kept)] = kept
    sound[1, : len(kept)] = 1.0
    return sound


def read_waveform(file: Path) -> tuple[Tensor, int]:
    """Return the mean of a file's channels, float32 in [-1, 1], and its samples per second."""
    with open_data(file) as raw:
        return decode_waveform(raw, str(file), file.suffix)


def decode_waveform(raw: IO[bytes], name: str, suffix: str) -> tuple[Tensor, int]:
    """Return the mean of the channels of a sound, float32 in [-1, 1], and its samples per second.

    The standard library reads wav files of integers, and soundfile reads all others.

    Args:
        raw: the bytes of a sound file.
        name: its name, for errors.
        suffix: the suffix of the file, such as ".wav".
    """
    if suffix.lower() != ".wav":
        return read_by_soundfile(raw, name, f"{suffix or 'a file without suffix'} is not wav")
    with file_errors(name):
        try:
            return read_pcm(raw, name)
        except (wave.Error, EOFError) as error:  # such as samples that are floats
            reason = str(error) or "it ends within its header"
    return read_by_soundfile(raw, name, reason)


def read_pcm(raw: IO[bytes], name: str) -> tuple[Tensor, int]:
    """Read a wav file of integers of 1 to 4 bytes.

    Raises:
        wave.Error: the file is not such a wav file.
        DataError: the file is damaged or cut off.
    """
    import numpy

    size = raw.seek(0, os.SEEK_END)
    raw.seek(0)
    with wave.open(raw) as opened:
        width = opened.getsampwidth()
        channels = opened.getnchannels()
        frames = opened.getnframes()
        rate = opened.getframerate()
        check_header(name, rate, channels, width)
        check_memory(BYTES_PER_SAMPLE * min(size, frames * channels * width) // width, name)
        # The header may announce more frames than the file has.
        content = opened.readframes(min(frames, size // (channels * width)))
    if len(content) != frames * channels * width:
        raise DataError(
            f"{name} is cut off: it has {len(content) // (channels * width)} of {frames} frames; "
            "replace it"
        )
    octets: Any = numpy.frombuffer(content, numpy.uint8).reshape(-1, width)
    if width == 1:  # the only width whose integers are unsigned
        octets = octets ^ 0x80
    four_bytes: Any = numpy.zeros((len(octets), 4), numpy.uint8)
    four_bytes[:, 4 - width :] = octets  # little-endian: the high bytes are the last ones
    integers = four_bytes.view("<i4").reshape(-1, channels)
    samples = integers.astype(numpy.float32) / 2**31
    return torch.from_numpy(samples.mean(1)), rate


def check_header(name: str, rate: int, channels: int, width: int) -> None:
    """Raise DataError for impossible values in the header of a sound file."""
    if rate < 1 or channels < 1:
        raise DataError(
            f"{name} is damaged: its header says {channels} channels of {rate} samples per second"
        )
    if width not in (1, 2, 3, 4):
        raise DataError(f"{name} has integers of {width} bytes per sample; expected 1 to 4")


def read_by_soundfile(raw: IO[bytes], name: str, reason: str) -> tuple[Tensor, int]:
    """Read any sound file. `reason` says why soundfile is needed, for the error."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the library libsndfile is missing
        raise DataError(
            f"{name} needs soundfile ({reason}): pip install 'framework[audio]'"
        ) from error
    source: Any = raw
    raw.seek(0)
    if not isinstance(raw, io.BytesIO):
        source = raw.fileno()
        os.lseek(source, 0, os.SEEK_SET)  # `seek` may move within the buffer of Python only
    try:
        with soundfile.SoundFile(source, closefd=False) as opened:
            rate = opened.samplerate
            check_header(name, rate, opened.channels, 4)
            check_memory(2 * 4 * opened.frames * opened.channels, name)
            samples = opened.read(dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        raise DataError(
            f"{name} cannot be read as sound ({one_line(error)}); delete or replace it"
        ) from error
    return torch.from_numpy(samples).mean(1), int(rate)


ZEROS = 10  # of the sinc on each side of its middle, as in scipy.signal.resample_poly
KAISER_BETA = 5.0


def resampled(waveform: Tensor, rate: int, new_rate: int) -> Tensor:
    """Return a waveform (samples,) at another rate: ceil(samples · new_rate / rate) samples.

    A low-pass filter at half of the lower rate: a sinc with 10 zeros on each side under a Kaiser
    window (β = 5), the filter of scipy.signal.resample_poly. It has polyphase form: each of the
    `up` phases is a filter of a strided convolution (Crochiere & Rabiner 1983, chapter 3).
    """
    if rate == new_rate:
        return waveform
    common = math.gcd(rate, new_rate)
    up = new_rate // common
    down = rate // common
    half = ZEROS * max(up, down)
    low_pass = sinc_filter(half, 1 / max(up, down)) * up
    reach = -(-half // up)  # input samples before and after an output that it depends on
    taps = torch.arange(-reach, reach + down + 1)
    index = torch.arange(up)[:, None] * down - taps * up + half
    is_inside = (index >= 0) & (index <= 2 * half)
    phases = torch.where(is_inside, low_pass[index.clamp(0, 2 * half)], 0.0)
    length = -(-len(waveform) * up // down)
    inputs = torch.nn.functional.pad(waveform.double(), [reach, reach + 2 * down])
    outputs = torch.nn.functional.conv1d(inputs[None, None], phases[:, None], stride=down)
    return outputs[0].T.flatten()[:length].float()


def sinc_filter(half: int, cutoff: float) -> Tensor:
    """Return a low-pass filter of 2 half + 1 taps with unit gain at 0; cutoff in half rates."""
    time = torch.arange(-half, half + 1, dtype=torch.float64)
    window = torch.kaiser_window(
        2 * half + 1, periodic=False, beta=KAISER_BETA, dtype=torch.float64
    )
    taps = torch.sinc(cutoff * time) * window
    return taps / taps.sum()


DEBIAN_FOLDER = Path("/usr/share/asterisk/sounds")
VOICES = {
    "English": "en_US_f_Allison",
    "Spanish": "es_MX_f_Allison",
    "French": "fr_CA_f_June",
    "Italian": "it_IT_m_Carlo",
    "Russian": "ru_RU_f_IvrvoiceRU",
}
MIN_BYTES = 44 + 2 * 800  # a header and a tenth of a second


@datasets.register("asterisk")
class Asterisk(SoundData):
    """2,780 spoken prompts of a telephone exchange; the class is one of 5 languages.

    (Asterisk core sounds 1.6.1, 8 kHz.) A prompt, the same words in each language, is in one split
    with all of its languages. But each language has one voice, and English and Spanish have the
    same: a model may recognize voices, not languages. The model of the experiment `languages` has a
    test accuracy of 0.976, but only 0.45 on the prompts of three other voices (Debian:
    asterisk-prompt-it-menardi-wav, -es-co, -fr-armelle), where always predicting Italian has 0.47.
    `scripts/fetch_data asterisk` downloads the files; silence and files below 0.1 s are left out.

    Args:
        path: the folder of the five voices; null: where Debian or scripts/fetch_data puts them.
        seconds: length of an input: a longer prompt is cut to its middle, a shorter one is
            padded with zeros.
        val_fraction: share of the prompts for validation.
        test_fraction: share of the prompts for the test.
        split_seed: seed of the draw.
    """

    def __init__(
        self,
        path: Path | None = None,
        seconds: PositiveFloat = 3.0,
        val_fraction: Rate = 0.1,
        test_fraction: Rate = 0.25,
        split_seed: int = 0,
    ):
        super().__init__(list(VOICES), 8000, seconds)
        roots = [path.expanduser()] if path else [DEBIAN_FOLDER, cache_folder() / "asterisk"]
        root = find_voices(roots)
        prompts = {voice: find_prompts(root / folder) for voice, folder in VOICES.items()}
        names = sorted(set().union(*prompts.values()))
        rows = split_rows(torch.zeros(len(names)), val_fraction, test_fraction, split_seed)
        self.fit(prompts, names, rows)

    def fit(
        self,
        prompts: Mapping[str, dict[str, Path]],
        names: Sequence[str],
        rows: Mapping[str, Tensor],
    ) -> None:
        """Read the sounds, and set the splits.

        Args:
            prompts: for each voice, the file of each prompt.
            names: all prompts, numbered in this order.
            rows: the numbers of the prompts of each split.
        """
        self.rows = rows
        self.refit = partial(self.fit, prompts, names)
        for part, chosen in rows.items():
            files = []
            labels = []
            for row in chosen.tolist():
                for label, voice in enumerate(self.classes):
                    if names[row] in prompts[voice]:
                        files.append(prompts[voice][names[row]])
                        labels.append(label)
            split = SoundFiles(files, torch.tensor(labels), self.facts())
            setattr(self, part, split.in_memory())


def find_voices(roots: Sequence[Path]) -> Path:
    """Return the first folder that has all voices.

    Raises:
        DataError: no folder has all voices.
    """
    for root in roots:
        if all((root / folder).is_dir() for folder in VOICES.values()):
            return root
    searched = " or ".join(map(str, roots))
    raise DataError(
        f"the Asterisk prompts are not in {searched}; fetch them (98 MB) with: "
        f"{fetch_command('asterisk')} (data=tones needs no file)"
    )


def find_prompts(folder: Path) -> dict[str, Path]:
    """Return the spoken prompts of a voice by their names, such as "digits/1.wav"."""
    prompts = {}
    for file in find_sounds(folder):
        name = str(file.relative_to(folder))
        if not name.startswith("silence/") and file.stat().st_size > MIN_BYTES:
            prompts[name] = file
    return prompts


# Octaves above the first pitch, at times from 0 to 1, the end of the tone.
PITCH: dict[str, Callable[[Tensor], Tensor]] = {
    "steady": torch.zeros_like,
    "rising": lambda time: time,
    "falling": lambda time: -time,
    "bowed": lambda time: 4 * time * (1 - time),
    "trill": lambda time: 0.3 * (2 * math.pi * 6 * time).sin(),
}


@datasets.register("tones")
class Tones(SoundData):
    """Synthetic tones; the class is the pitch: steady, rising, falling, bowed or trill.

    A tone has four harmonics. Its first pitch (200 to 500 Hz), length (0.3 to 1 of an input),
    loudness and phase are drawn at random.

    Args:
        samples: number of tones, in classes of equal size.
        seconds: length of an input, padded with zeros after the tone.
        sample_rate: samples per second.
        noise: standard deviation of the noise; the amplitudes of the tones are at most 0.5.
        seed: seed of tones, noise and splits.
        val_fraction: share of the tones for validation.
        test_fraction: share of the tones for the test.
    """

    def __init__(
        self,
        samples: PositiveInt = 600,
        seconds: PositiveFloat = 1.0,
        sample_rate: PositiveInt = 8000,
        noise: NonNegativeFloat = 0.03,
        seed: int = 0,
        val_fraction: Rate = 0.15,
        test_fraction: Rate = 0.15,
    ):
        super().__init__(list(PITCH), sample_rate, seconds)
        memory.check_room(
            24 * samples * self.in_shape[1], f"tones with samples={samples}, seconds={seconds:g}"
        )
        generator = seeds.generator(seed, "tones")
        labels = torch.arange(samples) % len(PITCH)
        inputs = torch.stack([self.tone(label, noise, generator) for label in labels.tolist()])
        for part, rows in split_rows(labels, val_fraction, test_fraction, seed).items():
            setattr(self, part, TensorSplit(inputs[rows], labels[rows]))

    def tone(self, label: int, noise: float, generator: torch.Generator) -> Tensor:
        """Return one tone of a class with its mask."""
        pitch, length, loudness, phase = torch.rand(4, generator=generator).tolist()
        samples = max(1, int(self.in_shape[1] * (0.3 + 0.7 * length)))
        octaves = PITCH[self.classes[label]](torch.linspace(0, 1, samples))
        turns = phase + (200 * 2.5**pitch * 2**octaves).cumsum(0) / self.sample_rate
        sound = torch.zeros(samples)
        for harmonic in range(1, 5):
            sound += (2 * math.pi * harmonic * turns).sin() / harmonic
        amplitude = 0.1 + 0.15 * loudness
        waveform = amplitude * sound + noise * torch.randn(samples, generator=generator)
        return padded(waveform, self.in_shape[1])
