"""Small sound files that several test files read."""

import wave

import numpy as np

from framework_plugins.datasets.audio import VOICES

RATE = 8000


def write_wav(file, samples, rate=RATE, width=2, channels=1):
    file.parent.mkdir(parents=True, exist_ok=True)
    scaled = (np.asarray(samples) * (2 ** (8 * width - 1) - 1)).round().astype("<i8")
    scaled += 128 if width == 1 else 0
    with wave.open(str(file), "wb") as opened:
        opened.setparams((channels, width, rate, 0, "NONE", ""))
        opened.writeframes(scaled.view(np.uint8).reshape(-1, 8)[:, :width].tobytes())


def tone(hertz, seconds=0.3, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def small_voices(root):
    """Write five folders of four prompts each, and files that the data set leaves out."""
    for voice in VOICES.values():
        for name in ("a", "b", "digits/1", "digits/2"):
            write_wav(root / voice / f"{name}.wav", tone(300))
        write_wav(root / voice / "silence/1.wav", np.zeros(8000))
        write_wav(root / voice / "short.wav", np.zeros(100))
