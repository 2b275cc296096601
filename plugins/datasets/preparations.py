"""How the built-in data sets prepare raw inputs, as modules that are exported with the model.

Each computes what the `read_inputs` of its data set computes; the tests compare the two.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from framework import Axis, Preparation, RawInput

from .readers.columns import MISSING
from .readers.encoding import MIN_SHARE
from .readers.tokenizers import load_tokenizer

FAR = 10
"""Numbers at more deviations from 0 are taken as float64, so that rounding costs at most 1e-6."""
SHORTEST = 8
"""Tokens of the shortest text that an exported model takes; torch.export treats 0 and 1 apart, also
for what remains of a text without its first tokens."""


class Standardize(Preparation):
    """(raw - mean) / std, see `readers/scaling.standardize`.

    Args:
        facts: "mean", "std" and "float64".
        in_shape: shape of an input.
        pixels: whether the raw inputs are pixels from 0 to 255.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, facts: Mapping[str, Any], in_shape: Sequence[int], pixels: bool = False):
        super().__init__()
        mean = torch.as_tensor(facts.get("mean", 0.0), dtype=torch.float64)
        std = torch.as_tensor(facts.get("std", 1.0), dtype=torch.float64)
        is_far = bool((mean.abs() > FAR * std).any())
        self.dtype = torch.float64 if facts.get("float64") or is_far else torch.float32
        self.register_buffer("mean", mean.to(self.dtype))
        self.register_buffer("std", std.to(self.dtype))
        self.pixels = pixels
        raw_dtype = torch.uint8 if pixels else self.dtype
        text = "pixels from 0 to 255" if pixels else "numbers as in the data, not scaled"
        self.raw = {"inputs": RawInput(raw_dtype, tuple(in_shape), text)}
        self.example = array_example(raw_dtype, in_shape)

    def forward(self, inputs: Tensor) -> Tensor:
        return ((inputs.to(self.dtype) - self.mean) / self.std).float()

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        raw = inputs.double() * self.std.double() + self.mean.double()
        return (raw.round().to(torch.uint8) if self.pixels else raw.to(self.dtype),)


def array_example(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """Return statements that read a .npy file of raw inputs."""
    sizes = ", ".join(str(size) for size in (-1, *shape))
    name = str(dtype).removeprefix("torch.")
    return f'raw = {{"inputs": np.load(file).astype("{name}").reshape({sizes})}}  # a .npy file'


class Enlarge(Standardize):
    """Images of 8x8 pixels, scaled to another size and standardized, see `data=digits`.

    Args:
        facts: as for `Standardize`.
        in_shape: (1, size, size).
    """

    def __init__(self, facts: Mapping[str, Any], in_shape: Sequence[int]):
        super().__init__(facts, in_shape)
        self.size = in_shape[-1]
        text = "images of 8x8 pixels from 0 to 16"
        self.raw = {"inputs": RawInput(self.dtype, (1, 8, 8), text)}
        self.example = array_example(self.dtype, (1, 8, 8))

    def forward(self, inputs: Tensor) -> Tensor:
        size = (self.size, self.size)
        return super().forward(F.interpolate(inputs, size, mode="bilinear", align_corners=False))

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Solve for the 8x8 pixels: the interpolation is linear in each axis."""
        unit = torch.eye(8, dtype=torch.float64)[None]
        along = F.interpolate(unit, self.size, mode="linear", align_corners=False)[0]
        inverse = torch.linalg.pinv(along)  # (size, 8)
        pixels = super().recover(inputs)[0].double()
        return ((inverse.T @ pixels @ inverse).to(self.dtype),)


class Columns(Preparation):
    """Cells of a table as inputs, see `readers/encoding.py`.

    The raw inputs are the numbers, NaN for an empty cell, and the categories as indices: 1 for the
    first text of a column, 0 for an unknown one, -1 for an empty cell.

    Args:
        columns: how each column becomes inputs, see `fit_column`.
    """

    imports = ("csv",)

    def __init__(self, columns: Sequence[dict[str, Any]]):
        super().__init__()
        self.columns = columns
        numbers = [column["name"] for column in columns if "texts" not in column]
        categories = {each["name"]: each["texts"] for each in columns if "texts" in each}
        self.raw = {}
        lines = ["with open(file, newline='', encoding='utf-8') as table:"]
        lines.append("    rows = list(csv.DictReader(table))  # a .csv file with the columns")
        lines.append('empty = about["empty"]')
        fields = []
        if numbers:
            text = f"columns {', '.join(numbers)}; NaN for an empty cell"
            self.raw["numbers"] = RawInput(torch.float64, (len(numbers),), text)
            lines.append("numbers = [")
            lines.append("    [np.nan if row[name].strip().lower() in empty else float(row[name])")
            lines.append('     for name in about["numbers"]] for row in rows]')
            fields.append('"numbers": np.array(numbers)')
        if categories:
            text = f"columns {', '.join(categories)} as indices of their texts, counted from 1"
            self.raw["categories"] = RawInput(torch.int64, (len(categories),), text)
            lines.append("def index(text, known):  # from 1; 0: unknown; -1: empty")
            lines.append("    if text in known:")
            lines.append("        return known.index(text) + 1")
            lines.append("    return -1 if text.strip().lower() in empty else 0")
            lines.append("categories = [")
            lines.append("    [index(row[name], known)")
            lines.append('     for name, known in about["categories"].items()] for row in rows]')
            fields.append('"categories": np.array(categories)')
        lines.append(f"raw = {{{', '.join(fields)}}}")
        self.example = "\n".join(lines)
        empty = sorted(MISSING)
        self.metadata = {"numbers": numbers, "categories": categories, "empty": empty}
        for index, column in enumerate(columns):
            if "knots" in column:
                knots = torch.tensor(column["knots"], dtype=torch.float64)
                self.register_buffer(f"knots{index}", knots)

    def forward(self, *raw: Tensor) -> Tensor:
        tensors = dict(zip(self.raw, raw, strict=True))
        inputs: list[Tensor] = []
        number = 0
        category = 0
        for index, column in enumerate(self.columns):
            if "texts" in column:
                inputs.append(encode_indices(tensors["categories"][:, category], column))
                category += 1
                continue
            knots = getattr(self, f"knots{index}") if "knots" in column else None
            inputs.append(encode_numbers(tensors["numbers"][:, number], column, knots))
            number += 1
        return torch.cat(inputs, dim=1)

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        numbers: list[Tensor] = []
        categories: list[Tensor] = []
        start = 0
        for index, column in enumerate(self.columns):
            size = width(column)
            cells = inputs[:, start : start + size]
            start += size
            if "texts" in column:
                categories.append(decode_indices(cells, column))
            else:
                knots = getattr(self, f"knots{index}") if "knots" in column else None
                numbers.append(decode_numbers(cells.double(), column, knots))
        groups = [torch.stack(group, dim=1) for group in (numbers, categories) if group]
        return tuple(groups)

    def cells(self, inputs: Tensor) -> dict[str, list[Any]]:
        """Return the cells of each column; None for an empty cell or a text unknown in training.

        Args:
            inputs: shape (rows, inputs).
        """
        decoded = dict(zip(self.raw, self.recover(inputs.cpu()), strict=True))
        texts = iter(decoded["categories"].unbind(1) if "categories" in decoded else ())
        numbers = iter(decoded["numbers"].unbind(1) if "numbers" in decoded else ())
        cells: dict[str, list[Any]] = {}
        for column in self.columns:
            name = column["name"]
            if "texts" in column:
                known = column["texts"]
                indices = next(texts).tolist()
                cells[name] = [known[index - 1] if index > 0 else None for index in indices]
            else:
                values = next(numbers).tolist()
                cells[name] = [None if math.isnan(value) else value for value in values]
        return cells


def width(column: Mapping[str, Any]) -> int:
    """Return the number of inputs that a column becomes."""
    if "texts" not in column:
        return 1 + bool(column.get("missing"))
    return 1 if column.get("index") else len(column["texts"]) + bool(column.get("missing"))


def encode_indices(index: Tensor, column: Mapping[str, Any]) -> Tensor:
    """Return the inputs of a column of texts; see `encoding.encode_texts`."""
    categories = len(column["texts"]) + bool(column.get("missing"))
    empty = categories if column.get("missing") else 0
    index = torch.where(index < 0, empty, index)[:, None]
    if column.get("index"):
        return index.float()
    return (index == torch.arange(1, categories + 1)).float()


def decode_indices(cells: Tensor, column: Mapping[str, Any]) -> Tensor:
    """Return the indices that become the inputs of a column of texts."""
    if column.get("index"):
        index = cells[:, 0].round().long()
    else:
        index = torch.where(cells.any(1), cells.argmax(1) + 1, 0)
    is_empty = index > len(column["texts"])
    return index.masked_fill(is_empty, -1)


def encode_numbers(values: Tensor, column: Mapping[str, Any], knots: Tensor | None) -> Tensor:
    """Return the inputs of a column of numbers; see `encoding.encode_numbers`."""
    is_empty = values.isnan()
    known = torch.where(is_empty, float(column["fill"]), values)
    if knots is None:
        scaled = (known - column["mean"]) / column["std"]
    else:
        scaled = normal_quantile(share_below(known, knots))
    inputs = [scaled.float()]
    if column.get("missing"):
        inputs.append(is_empty.float())
    return torch.stack(inputs, dim=1)


def decode_numbers(cells: Tensor, column: Mapping[str, Any], knots: Tensor | None) -> Tensor:
    """Return the numbers that become the inputs of a column."""
    if knots is None:
        values = cells[:, 0] * column["std"] + column["mean"]
    else:
        place = torch.special.ndtr(cells[:, 0]) * (len(knots) - 1)
        below = place.long().clamp(0, len(knots) - 2)
        values = torch.lerp(knots[below], knots[below + 1], place - below)
    if column.get("missing"):
        values = values.masked_fill(cells[:, 1] > 0, math.nan)
    return values


def share_below(values: Tensor, knots: Tensor) -> Tensor:
    """Return the share of the training values below each value, see `encoding.normal_scores`.

    Args:
        values: shape (rows,).
        knots: quantiles at even shares from 0 to 1, in order, shape (knots,).
    """
    last = len(knots) - 1
    equal_or_below = (knots <= values[:, None]).sum(1)
    strictly_below = (knots < values[:, None]).sum(1)
    # Of knots that equal the value, the first search ends at the last one, the second at the first.
    highest = between(values, knots, (equal_or_below - 1).clamp(0, last - 1))
    lowest = between(values, knots, (strictly_below - 1).clamp(0, last - 1))
    highest = torch.where(equal_or_below > last, 1.0, highest)
    lowest = torch.where(strictly_below > last, 1.0, lowest)
    is_first = strictly_below == 0
    highest = torch.where(equal_or_below == 0, 0.0, highest)
    share = (highest + torch.where(is_first, 0.0, lowest)) / 2
    return share.clamp(MIN_SHARE, 1 - MIN_SHARE)


def between(values: Tensor, knots: Tensor, index: Tensor) -> Tensor:
    """Return the share of a value between the knots `index` and `index + 1`."""
    low = knots[index]
    distance = knots[index + 1] - low
    fraction = torch.where(distance > 0, (values - low) / distance, 0.0)
    return (index + fraction) / (len(knots) - 1)


CENTRAL = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
MIDDLE = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
TAIL = (
    (
        6.65790464350110377720e0,
        5.46378491116411436990e0,
        1.78482653991729133580e0,
        2.96560571828504891230e-1,
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ),
    (
        1.0,
        5.99832206555887937690e-1,
        1.36929880922735805310e-1,
        1.48753612908506148525e-2,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)
"""Coefficients of numerator and denominator, of PPND16 in algorithm AS 241."""


def normal_quantile(share: Tensor) -> Tensor:
    """Return the inverse of the normal distribution function, with relative error 1e-16.

    Wichura 1988, Applied Statistics 37, algorithm AS 241. ONNX has no such operation, so that
    `torch.special.ndtri` cannot be exported.

    Args:
        share: float64, in (0, 1).
    """
    q = share - 0.5
    central = q * ratio(CENTRAL, 0.180625 - q * q)
    r = (-torch.where(q < 0, share, 1 - share).log()).sqrt()
    middle = ratio(MIDDLE, r - 1.6)
    tail = ratio(TAIL, r - 5)
    outer = torch.where(r <= 5, middle, tail)
    outer = torch.where(q < 0, -outer, outer)
    return torch.where(q.abs() <= 0.425, central, outer)


def ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Tensor) -> Tensor:
    """Return the ratio of two polynomials, by Horner's rule."""
    values = []
    for polynomial in coefficients:
        value = torch.full_like(x, polynomial[-1])
        for coefficient in reversed(polynomial[:-1]):
            value = value * x + coefficient
        values.append(value)
    return values[0] / values[1]


NEXT_TOKEN = """\
logits = np.asarray(outputs[0])[0, len(ids[0]) - 1]  # of the token after the text
most_likely = logits.argsort()[::-1][:5].tolist()
print(json.dumps({"most_likely": most_likely}))"""


class Tokens(Preparation):
    """Token ids of texts. The tokenizer is not part of the graph, but a file next to it.

    Args:
        facts: "tokenizer" and "learned".
        length: maximum number of tokens.
        classifies: whether a text is a line of a file, cut to its first tokens and padded;
            otherwise the file is one text, of which a language model continues the end.
    """

    imports = ("re",)

    def __init__(self, facts: Mapping[str, Any], length: int, classifies: bool):
        super().__init__()
        length = int(length)
        shortest = min(SHORTEST, length)
        axis = length if shortest == length else Axis("length", shortest, length)
        text = f"token ids, {shortest} to {length}, 0 for padding at the end"
        self.raw = {"tokens": RawInput(torch.int64, (axis,), text)}
        if "learned" not in facts:  # a column of token ids
            self.example = 'raw = {"tokens": np.load(file)}  # a .npy file'
            return
        tokenizer = load_tokenizer(facts)
        self.files = tokenizer.files()
        self.metadata = {"tokenizer": facts["tokenizer"]}
        if not tokenizer.example:
            self.example = 'raw = {"tokens": np.load(file)}  # ids of the tokenizer, a .npy file'
            return
        lines = [tokenizer.example]
        if classifies:
            lines.append('texts = open(file, encoding="utf-8").read().splitlines()')
            lines.append(f"ids = [encode(text)[:{length}] or [1] for text in texts]")
        else:
            lines.append('ids = [encode(open(file, encoding="utf-8").read())]')
            lines.append(f"ids = [each[-{length}:] for each in ids]  # the end of a long text")
            self.result = NEXT_TOKEN
        lines.append("longest = max(about['inputs']['tokens']['smallest'][0], *map(len, ids))")
        lines.append("tokens = [each + [0] * (longest - len(each)) for each in ids]")
        lines.append('raw = {"tokens": np.array(tokens)}')
        self.example = "\n".join(lines)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens

    def recover(self, inputs: Tensor) -> tuple[Tensor, ...]:
        missing = max(0, SHORTEST - inputs.shape[1])
        return (F.pad(inputs.long(), (0, missing)) if missing else inputs.long(),)


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
