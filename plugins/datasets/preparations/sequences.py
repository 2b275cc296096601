"""The preparation of sounds, sequences and series."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from framework import Preparation, RawInput


class Waveforms(Preparation):
    """Sounds with their mask: (samples,) and a length -> (2, samples), see `datasets/audio.py`.

    Args:
        facts: "sample_rate".
        in_shape: (2, samples).
    """

    imports = ("wave",)

    def __init__(self, facts: Mapping[str, Any], in_shape: Sequence[int]):
        super().__init__()
        samples = in_shape[1]
        rate = int(facts["sample_rate"])
        self.raw = {
            "waveform": RawInput(
                torch.float32,
                (samples,),
                f"the middle of a sound in [-1, 1], {rate} samples per second, zeros at the end",
            ),
            "lengths": RawInput(torch.int64, (), "number of samples before the zeros"),
        }
        self.samples = samples
        self.metadata = {"sample_rate": rate}
        self.example = "\n".join(
            [
                "with wave.open(file) as sound:  # of 16 bits",
                f"    assert sound.getframerate() == {rate} and sound.getsampwidth() == 2",
                "    integers = np.frombuffer(sound.readframes(sound.getnframes()), '<i2')",
                "    wave = integers.reshape(-1, sound.getnchannels()).mean(1) / 2**15",
                f"start = max(0, len(wave) - {samples}) // 2",
                f"wave = wave[start : start + {samples}]",
                f"padded = np.pad(wave, (0, {samples} - len(wave)))[None].astype('float32')",
                'raw = {"waveform": padded, "lengths": np.array([len(wave)])}',
            ]
        )

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(self.samples) < lengths[:, None]).float()
        return torch.stack([waveform * mask, mask], dim=1)

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return inputs[:, 0].contiguous(), inputs[:, 1].sum(1).long()


class Frames(Preparation):
    """Sequences of several channels, standardized, with their mask, see `datasets/sequences.py`.

    Args:
        facts: "length", "mean", "std" and "float64".
    """

    mean: Tensor
    std: Tensor

    def __init__(self, facts: Mapping[str, Any]):
        super().__init__()
        self.length = int(facts["length"])
        mean = torch.tensor(facts["mean"], dtype=torch.float64)[:, None]
        self.register_buffer("mean", mean)
        std = torch.tensor(facts["std"], dtype=torch.float64)[:, None]
        self.register_buffer("std", std)
        text = "channels of a sequence, zeros at the end"
        channels = len(mean)
        self.raw = {
            "frames": RawInput(torch.float64, (channels, self.length), text),
            "lengths": RawInput(torch.int64, (), "number of frames before the zeros"),
        }
        self.example = "\n".join(
            [
                "# a line is a sequence: channels separated by colons, their frames by commas",
                "lines = open(file, encoding='utf-8').read().splitlines()",
                "sequences = [[[float(frame) for frame in channel.split(',')]",
                "              for channel in line.split(':')] for line in lines]",
                f"frames = np.zeros((len(sequences), {channels}, {self.length}))",
                "for row, sequence in enumerate(sequences):",
                "    frames[row, :, : len(sequence[0])] = sequence",
                "lengths = np.array([len(sequence[0]) for sequence in sequences])",
                'raw = {"frames": frames, "lengths": lengths}',
            ]
        )

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        mask = (torch.arange(self.length) < lengths[:, None]).float()[:, None]
        scaled = ((frames - self.mean) / self.std).float()
        return torch.cat([scaled * mask, mask], dim=1)

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        mask = inputs[:, -1:]
        frames = (inputs[:, :-1].double() * self.std + self.mean) * mask
        return frames, mask.sum((1, 2)).long()


class Windows(Preparation):
    """Rows of a series with their calendar, see `datasets/series.py`.

    Args:
        facts: the settings of the series, with "mean" and "std".
    """

    mean: Tensor
    std: Tensor
    imports = ("csv", "datetime")

    def __init__(self, facts: Mapping[str, Any]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(facts["mean"], dtype=torch.float64))
        self.register_buffer("std", torch.tensor(facts["std"], dtype=torch.float64))
        self.calendar = facts["calendar"] if facts["time"] is not None else []
        lookback = int(facts["lookback"])  # becomes code: the facts may come from a stranger
        names = [facts["target"], *facts["features"]]
        text = f"the last {lookback} rows of the columns {', '.join(names)}"
        self.raw = {"amounts": RawInput(torch.float64, (lookback, len(names)), text)}
        lines = [
            "with open(file, newline='', encoding='utf-8') as table:",
            f"    rows = list(csv.DictReader(table))[-{lookback}:]  # a .csv file",
            f"amounts = np.array([[[float(row[name]) for name in {names!r}] for row in rows]])",
        ]
        if not self.calendar:
            lines.append('raw = {"amounts": amounts}')
        else:
            text = "of each row: hours since midnight, day of the week (Monday: 0), of the year"
            self.raw["times"] = RawInput(torch.float64, (lookback, 3), text)
            lines += [
                f"column = {facts['time']!r}",
                "times = [datetime.datetime.fromisoformat(row[column]) for row in rows]",
                "times = [[t.hour + t.minute / 60 + t.second / 3600, t.weekday(),",
                "          t.timetuple().tm_yday] for t in times]",
                'raw = {"amounts": amounts, "times": np.array([times], "float64")}',
            ]
        self.example = "\n".join(lines)

    def forward(self, amounts: Tensor, times: Tensor | None = None) -> Tensor:
        channels = [((amounts - self.mean) / self.std).float()]
        for part in self.calendar:
            if times is None:
                continue
            if part == "week":
                channels.append((times[..., 1:2] == torch.arange(7)).float())
                continue
            turns = times[..., 0] / 24 if part == "day" else times[..., 2] / 365.25
            angle = 2 * math.pi * turns
            channels.append(torch.stack([angle.sin(), angle.cos()], dim=2).float())
        return torch.cat(channels, dim=2)

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(self.mean)
        channels = inputs.double()
        amounts = channels[..., :count] * self.std + self.mean
        if not self.calendar:
            return (amounts,)
        times = torch.zeros(*inputs.shape[:2], 3, dtype=torch.float64)
        for part in self.calendar:
            size = 7 if part == "week" else 2
            values = channels[..., count : count + size]
            count += size
            if part == "week":
                times[..., 1] = values.argmax(2).double()
                continue
            turns = torch.atan2(values[..., 0], values[..., 1]) / (2 * math.pi) % 1
            if part == "day":
                times[..., 0] = turns * 24
            else:
                times[..., 2] = turns * 365.25
        return amounts, times
