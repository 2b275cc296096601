"""Sound in files, a folder for each class; the spoken prompts of Asterisk; and tones made by a formula.

An input is (2, samples): the waveform, channels averaged, in [-1, 1], and its mask (see `layers/sequence.py`). A longer
sound is cut to its middle, a shorter one filled up with zeros.
"""

import math
import os
import wave
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework import (
    Data,
    DataError,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Rate,
    TensorSplit,
    datasets,
    did_you_mean,
    memory,
    seeds,
)
from framework_plugins.datasets.readers.arrays import cache_folder, fetching, split_rows
from framework_plugins.datasets.readers.data_files import (
    check_memory,
    one_line,
    open_data,
    readable,
)

from .images import part_folders

ENDINGS = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au"}
BYTES_OF_A_SAMPLE = 12  # while a wav is read: as float32, and as 32 bits before
MEMORY_BYTES = 2**30  # as much sound as `audio_folder` holds in memory unless told


class SoundFiles(torch.utils.data.Dataset):
    """Sound files with the number of their class, decoded when they are read (by whichever worker reads them)."""

    def __init__(self, files: Sequence[Path], labels: Tensor, facts: dict[str, Any]):
        self.files, self.labels, self.facts = files, labels, facts

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return read_sound(self.files[index], self.facts), self.labels[index]

    def content(self) -> Any:
        """Return the files and labels, by which the data is the same at another path."""
        return [list(self.files), self.labels]

    def subset(self, rows: Tensor) -> "SoundFiles":
        """Return the part with these row numbers."""
        return SoundFiles([self.files[row] for row in rows.tolist()], self.labels[rows], self.facts)

    def in_memory(self) -> TensorSplit:
        """Read all files. Raises DataError for one that cannot be read, and when there is no room."""
        channels, samples = self.facts["in_shape"]
        memory.check_room(len(self) * channels * samples * 4, f"{len(self)} sounds")
        inputs = torch.zeros(len(self), channels, samples)
        for row, file in enumerate(self.files):
            inputs[row] = read_sound(file, self.facts)
        return TensorSplit(inputs, self.labels)


class SoundData(Data):
    """A data set of sounds of one rate and one length, in classes."""

    measures_training = False

    def __init__(
        self,
        classes: Sequence[str],
        sample_rate: int,
        seconds: float,
        resample: bool = False,
        min_seconds: float = 0.0,
    ):
        self.classes, self.out_shape = list(classes), (len(classes),)
        memory.check_room(
            8 * seconds * sample_rate, f"a sound of {seconds:g} s at {sample_rate} samples a second"
        )
        self.in_shape = (2, max(1, round(seconds * sample_rate)))
        self.sample_rate, self.resample, self.min_seconds = sample_rate, resample, min_seconds

    def facts(self) -> dict[str, Any]:
        """Return how a sound becomes an input, and the classes."""
        given = {
            name: getattr(self, name)
            for name in ("sample_rate", "resample", "min_seconds", "target")
        }
        return {**given, "in_shape": list(self.in_shape), "classes": list(self.classes)}

    @classmethod
    def read_inputs(cls, path: Path, facts: dict[str, Any]) -> Tensor:
        """Read a sound file, or those of a folder in the order of their names."""
        if not path.exists():
            raise DataError(f"{path}: there is no such file or folder (looked from {Path.cwd()})")
        return torch.stack(
            [read_sound(file, facts) for file in (sound_files(path) if path.is_dir() else [path])]
        )


@datasets.register("audio_folder")
class AudioFolder(SoundData):
    """Sounds in ROOT/CLASS/*.wav (or flac, ogg ...), or in ROOT/train/CLASS/ with val/ and test/ beside it."""

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
        """List the files. Parts that have a folder of their own are kept, the others are drawn from train.

        Args:
            path: ROOT; the classes are its sub-folders (or those of ROOT/train), in sorted order.
            sample_rate: samples a second of the inputs; a file of another rate is an error, unless resample is true.
            seconds: length of an input: the middle of a longer sound, a shorter one with zeros after it.
            resample: bring files of another rate to sample_rate, by a windowed sinc (see `resampled`).
            min_seconds: a file that is shorter is an error.
            in_memory: read all files at once; false: when they are needed, by the loader's workers; null: at once when
                they fit into 1 GiB.
            val_fraction: share of the training sounds drawn for validation, if there is no folder for it.
            test_fraction: share of the training sounds drawn for the test, if there is no folder for it.
            split_seed: seed of the drawing.
        """
        folders = part_folders(path.expanduser())
        super().__init__(
            class_folders(folders["train"]), sample_rate, seconds, resample, min_seconds
        )
        given = {part: self.list_files(folder) for part, folder in folders.items()}
        shares = {"val": val_fraction, "test": test_fraction} | dict.fromkeys(given, 0.0)
        rows = split_rows(given["train"].labels, shares["val"], shares["test"], split_seed)
        parts = given | {part: given["train"].subset(chosen) for part, chosen in rows.items()}
        if in_memory is None:
            in_memory = sum(map(len, parts.values())) * math.prod(self.in_shape) * 4 <= MEMORY_BYTES
        for part, files in parts.items():
            setattr(self, part, files.in_memory() if in_memory else files)

    def list_files(self, folder: Path) -> SoundFiles:
        """Return the sounds of a folder of class folders. Raises DataError for an empty one and an unknown class."""
        files, labels = [], []
        for name in class_folders(folder):
            if name not in self.classes:
                raise DataError(
                    f"{folder / name}: no such class in train; {did_you_mean(name, self.classes)}"
                )
            found = sound_files(folder / name)
            files += found
            labels += [self.classes.index(name)] * len(found)
        return SoundFiles(files, torch.tensor(labels), self.facts())


def class_folders(folder: Path) -> list[str]:
    """Return the names of the sub-folders, sorted. Raises DataError for fewer than two of a folder to train on."""
    names = sorted(
        each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")
    )
    if not names:
        raise DataError(
            f"{folder} has no folders; put the sounds of each class into a folder named after it"
        )
    if len(names) == 1 and folder.name not in ("val", "valid", "validation", "test"):
        raise DataError(
            f"{folder} has one class only, {names[0]!r}; classes to tell apart are two or more"
        )
    return names


def sound_files(folder: Path) -> list[Path]:
    """Return the sound files in a folder, at any depth, sorted. Raises DataError when there is none."""
    files = sorted(
        f for f in folder.rglob("*") if f.suffix.lower() in ENDINGS and not f.name.startswith(".")
    )
    if not files:
        raise DataError(f"{folder} has no sounds; known are {', '.join(sorted(ENDINGS))}")
    return files


def read_sound(file: Path, facts: dict[str, Any]) -> Tensor:
    """Return a file as an input (2, samples). Raises DataError, naming it, when it is not as the facts say."""
    waveform, rate = read_waveform(file)
    wanted = facts["sample_rate"]
    if len(waveform) < max(1, facts["min_seconds"] * rate):
        least = f"at least {facts['min_seconds']:g} s (data.min_seconds) are needed"
        raise DataError(
            f"{file} is {len(waveform) / rate:g} s long; {least}: delete it, or put the sound back"
        )
    if not waveform.isfinite().all():
        raise DataError(f"{file} holds NaN or infinity; delete it, or put the sound back")
    if rate != wanted and not facts["resample"]:
        raise DataError(
            f"{file} has {rate} samples a second, not {wanted}: give data.sample_rate={rate} if all have, or "
            "data.resample=true"
        )
    return fitted(resampled(waveform, rate, wanted), facts["in_shape"][1])


def fitted(waveform: Tensor, samples: int) -> Tensor:
    """Return the middle of a waveform, or all of it and zeros, with its mask: (2, samples)."""
    start = max(0, len(waveform) - samples) // 2
    kept = waveform[start : start + samples]
    sound = torch.zeros(2, samples)
    sound[0, : len(kept)], sound[1, : len(kept)] = kept, 1.0
    return sound


def read_waveform(file: Path) -> tuple[Tensor, int]:
    """Return the mean of a file's channels, float32 in [-1, 1], and its samples a second.

    wav with integer samples is read by the standard library, everything else by soundfile.
    """
    if file.suffix.lower() == ".wav":
        with readable(file):
            try:
                return read_pcm(file)
            except (wave.Error, EOFError) as error:  # float samples, say, or no wav at all
                reason = str(error) or "it ends within its header"
        return read_by_soundfile(file, reason)
    return read_by_soundfile(file, f"{file.suffix or 'a file without an ending'} is not wav")


def read_pcm(file: Path) -> tuple[Tensor, int]:
    """Read a wav file of integers of 1 to 4 bytes. Raises wave.Error for another one, DataError for a cut one."""
    import numpy

    with open_data(file) as raw, wave.open(raw) as opened:
        size = os.fstat(raw.fileno()).st_size
        width, channels, frames = opened.getsampwidth(), opened.getnchannels(), opened.getnframes()
        rate = opened.getframerate()
        check_header(file, rate, channels, width)
        check_memory(BYTES_OF_A_SAMPLE * min(size, frames * channels * width) // width, file)
        content = opened.readframes(
            min(frames, size // (channels * width))
        )  # a header may claim any number
    if len(content) != frames * channels * width:
        raise DataError(
            f"{file} is cut off: {len(content) // (channels * width)} of {frames} frames; replace it"
        )
    octets = numpy.frombuffer(content, numpy.uint8).reshape(-1, width)
    if width == 1:  # the only width without a sign
        octets = octets ^ 0x80
    whole = numpy.zeros((len(octets), 4), numpy.uint8)
    whole[:, 4 - width :] = octets  # little-endian: the high bytes come last
    samples = whole.view("<i4").reshape(-1, channels).astype(numpy.float32) / 2**31
    return torch.from_numpy(samples.mean(1)), rate


def check_header(file: Path, rate: int, channels: int, width: int) -> None:
    """Raise DataError for a header that no sound has."""
    if rate < 1 or channels < 1:
        raise DataError(
            f"{file} is damaged: it says that it has {channels} channels of {rate} samples a second"
        )
    if width not in (1, 2, 3, 4):
        raise DataError(f"{file} has integers of {width} bytes a sample; expected 1 to 4")


def read_by_soundfile(file: Path, why: str) -> tuple[Tensor, int]:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its library is not there
        raise DataError(
            f"{file} needs soundfile ({why}): pip install 'framework[audio]'"
        ) from error
    with open_data(file) as raw:
        try:
            with soundfile.SoundFile(raw.fileno(), closefd=False) as opened:
                check_header(file, opened.samplerate, opened.channels, 4)
                check_memory(2 * 4 * opened.frames * opened.channels, file)
                samples, rate = opened.read(dtype="float32", always_2d=True), opened.samplerate
        except (
            soundfile.LibsndfileError,
            RuntimeError,
            TypeError,
            ValueError,
            MemoryError,
        ) as error:
            raise DataError(
                f"{file} cannot be read as sound ({one_line(error)}); delete or replace it"
            ) from error
    return torch.from_numpy(samples).mean(1), int(rate)


ZEROS = 10  # of the sinc on each side of its middle, as in scipy.signal.resample_poly
KAISER_BETA = 5.0


def resampled(waveform: Tensor, rate: int, wanted: int) -> Tensor:
    """Return a waveform (samples,) at another rate: ceil(samples · wanted / rate) samples.

    A low-pass at the lower of the two half rates, a sinc of 10 zeros a side under a Kaiser window (β = 5), in its
    polyphase form: each of the `up` phases is a filter of a strided convolution (Crochiere & Rabiner 1983, chapter 3).
    The filter is that of scipy.signal.resample_poly.
    """
    if rate == wanted:
        return waveform
    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    half = ZEROS * max(up, down)
    low_pass = sinc_filter(half, 1 / max(up, down)) * up
    reach = -(-half // up)  # samples of the input that an output looks at, before and after
    taps = torch.arange(-reach, reach + down + 1)
    place = torch.arange(up)[:, None] * down - taps * up + half
    phases = torch.where(
        (place >= 0) & (place <= 2 * half), low_pass[place.clamp(0, 2 * half)], 0.0
    )
    length = -(-len(waveform) * up // down)
    padded = torch.nn.functional.pad(waveform.double(), [reach, reach + 2 * down])
    outputs = torch.nn.functional.conv1d(padded[None, None], phases[:, None], stride=down)
    return outputs[0].T.flatten()[:length].float()


def sinc_filter(half: int, cutoff: float) -> Tensor:
    """Return a low-pass of 2 half + 1 taps with unit gain at 0; cutoff as a share of half the rate."""
    time = torch.arange(-half, half + 1, dtype=torch.float64)
    window = torch.kaiser_window(
        2 * half + 1, periodic=False, beta=KAISER_BETA, dtype=torch.float64
    )
    taps = torch.sinc(cutoff * time) * window
    return taps / taps.sum()


SOUNDS = Path("/usr/share/asterisk/sounds")  # where the Debian packages put them
VOICES = {
    "English": "en_US_f_Allison",
    "Spanish": "es_MX_f_Allison",
    "French": "fr_CA_f_June",
    "Italian": "it_IT_m_Carlo",
    "Russian": "ru_RU_f_IvrvoiceRU",
}
SHORTEST_BYTES = 44 + 2 * 800  # of a header, and a tenth of a second


@datasets.register("asterisk")
class Asterisk(SoundData):
    """2,780 spoken prompts of a telephone exchange in 5 languages, 8 kHz (Asterisk core sounds 1.6.1): which language?

    A prompt (the same words in each language) is in one split with all of its languages. But each language has one
    voice (English and Spanish have the same one): a model may know voices, not languages. What it makes of voices that
    it has not heard is another matter: that of the experiment `languages`, right on 0.976 of the test, is right on 0.45
    of the prompts of three other voices (Debian: asterisk-prompt-it-menardi-wav, -es-co, -fr-armelle), where always
    saying Italian is right on 0.47.
    """

    def __init__(
        self,
        path: Path | None = None,
        seconds: PositiveFloat = 3.0,
        val_fraction: Rate = 0.1,
        test_fraction: Rate = 0.25,
        split_seed: int = 0,
    ):
        """Read what `scripts/fetch_data asterisk` puts in place. Silence, and what is under 0.1 s, is left out.

        Args:
            path: the folder of the five folders of voices; null: where Debian or scripts/fetch_data puts them.
            seconds: length of an input: the middle of a longer prompt, a shorter one with zeros after it.
            val_fraction: share of the prompts drawn for validation.
            test_fraction: share of the prompts drawn for the test.
            split_seed: seed of the drawing.
        """
        super().__init__(VOICES, 8000, seconds)
        root = find_voices([path.expanduser()] if path else [SOUNDS, cache_folder() / "asterisk"])
        prompts = {voice: prompt_files(root / folder) for voice, folder in VOICES.items()}
        names = sorted(set().union(*prompts.values()))
        rows = split_rows(torch.zeros(len(names)), val_fraction, test_fraction, split_seed)
        self.learn(prompts, names, rows)

    def learn(
        self,
        prompts: Mapping[str, dict[str, Path]],
        names: Sequence[str],
        rows: Mapping[str, Tensor],
    ) -> None:
        """Read the sounds.

        Args:
            prompts: the files of each voice by name.
            names: of all prompts, which are numbered in this order.
            rows: the numbers of the prompts of each split.
        """
        self.rows = rows
        self.refit = partial(self.learn, prompts, names)
        for part, taken in rows.items():
            chosen = []
            for row in taken.tolist():
                chosen += [(names[row], voice) for voice in VOICES if names[row] in prompts[voice]]
            labels = torch.tensor([self.classes.index(voice) for _, voice in chosen])
            files = [prompts[voice][name] for name, voice in chosen]
            setattr(self, part, SoundFiles(files, labels, self.facts()).in_memory())


def find_voices(roots: Sequence[Path]) -> Path:
    """Return the first folder that has all voices. Raises DataError that says how to get them, or do without."""
    for root in roots:
        if all((root / folder).is_dir() for folder in VOICES.values()):
            return root
    looked = " or ".join(map(str, roots))
    raise DataError(
        f"the Asterisk prompts are not in {looked}; fetch them (98 MB) with: {fetching('asterisk')}. "
        "Without them: data=tones"
    )


def prompt_files(folder: Path) -> dict[str, Path]:
    """Return the spoken prompts of a voice by their names, such as "digits/1.wav"."""
    files = {str(file.relative_to(folder)): file for file in sound_files(folder)}
    kept = {name: file for name, file in files.items() if not name.startswith("silence/")}
    return {name: file for name, file in kept.items() if file.stat().st_size > SHORTEST_BYTES}


PITCH: dict[
    str, Callable[[Tensor], Tensor]
] = {  # octaves above the first pitch, at a time from 0 to 1 (the whole tone)
    "steady": lambda time: torch.zeros_like(time),
    "rising": lambda time: time,
    "falling": lambda time: -time,
    "bowed": lambda time: 4 * time * (1 - time),
    "trill": lambda time: 0.3 * (2 * math.pi * 6 * time).sin(),
}


@datasets.register("tones")
class Tones(SoundData):
    """Synthetic sounds, a class for each course of the pitch: steady, rising, falling, bowed, trill. Nothing real."""

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
        """Draw first pitch (200 to 500 Hz), length (0.3 to 1 of the whole), loudness and phase of each; four harmonics.

        Args:
            samples: sounds in all, in classes of equal size.
            seconds: length of an input, zeros after the sound.
            sample_rate: samples a second.
            noise: deviation of the noise; the tones' amplitudes go up to 0.5.
            seed: seed of all that is drawn.
            val_fraction: share of the sounds for validation.
            test_fraction: share of the sounds for the test.
        """
        super().__init__(list(PITCH), sample_rate, seconds)
        memory.check_room(
            24 * samples * self.in_shape[1], f"tones with samples={samples}, seconds={seconds:g}"
        )
        draw = seeds.generator(seed, "tones")
        labels = torch.arange(samples) % len(PITCH)
        inputs = torch.stack([self.tone(label, noise, draw) for label in labels.tolist()])
        for part, rows in split_rows(labels, val_fraction, test_fraction, seed).items():
            setattr(self, part, TensorSplit(inputs[rows], labels[rows]))

    def tone(self, label: int, noise: float, draw: torch.Generator) -> Tensor:
        """Return one sound of a class with its mask."""
        pitch, length, loudness, phase = torch.rand(4, generator=draw).tolist()
        samples = max(1, int(self.in_shape[1] * (0.3 + 0.7 * length)))
        octaves = PITCH[self.classes[label]](torch.linspace(0, 1, samples))
        turns = phase + (200 * 2.5**pitch * 2**octaves).cumsum(0) / self.sample_rate
        sound = sum((2 * math.pi * harmonic * turns).sin() / harmonic for harmonic in range(1, 5))
        return fitted(
            (0.1 + 0.15 * loudness) * sound + noise * torch.randn(samples, generator=draw),
            self.in_shape[1],
        )
