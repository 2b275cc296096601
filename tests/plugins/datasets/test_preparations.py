"""The exported preparation of raw inputs computes what `read_inputs` of the data set computes."""

import csv
import json
import wave

import numpy as np
import pytest
import torch

import framework as fw
from framework.data.dataset import GatheredSplit

fw.discover()


def texts(folder):
    file = folder / "texts.csv"
    with open(file, "w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["text", "label"])
        for row in range(40):
            writer.writerow([f"Word{row % 7}, word{row % 5}! and {'x' * (row % 4)}", "ab"[row % 2]])
    new = folder / "new.txt"
    new.write_text("word1 word3, unheard! WORD2\nx\nand and and and and and and and and and\n")
    return {"name": "text_table", "path": file, "max_length": 12}, new


def characters(folder):
    settings, new = texts(folder)
    return settings | {"tokenizer": {"name": "char"}}, new


def byte_pairs(folder):
    pytest.importorskip("tokenizers")
    settings, new = texts(folder)
    return settings | {"tokenizer": {"name": "bpe", "vocabulary": 300}}, new


def utf8(folder):
    settings, new = texts(folder)
    return settings | {"tokenizer": {"name": "byte"}}, new


def table(folder, **settings):
    generator = np.random.default_rng(0)
    file = folder / "table.csv"
    with open(file, "w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["size", "ties", "cut", "far", "y"])
        for row in range(200):
            size = "" if row % 9 == 0 else f"{generator.normal(3, 2):.4f}"
            cut = "" if row % 11 == 0 else ["good", "bad", "ugly"][row % 3]
            far = f"{1e9 + generator.normal():.6f}"
            writer.writerow([size, row % 4, cut, far, f"{generator.normal():.4f}"])
    new = folder / "new.csv"
    rows = file.read_text().splitlines()[:60]
    new.write_text("\n".join([*rows, "NA,1.5,unknown,999999999.5,0", "-80,9,bad,1e9,0"]) + "\n")
    return {"name": "table", "path": file, "target": "y", **settings}, new


def quantile(folder):
    return table(folder, quantile=True)


def indices(folder):
    return table(folder, categories="index", quantile=True)


def unmarked(folder):
    return table(folder, categories="index", mark_missing=False)


def pixels(folder):
    new = folder / "new.npy"
    np.save(new, np.arange(128).reshape(2, 64) % 17)
    return {"name": "digits"}, new


def enlarged(folder):
    _, new = pixels(folder)
    np.save(new, np.load(new).reshape(2, 1, 8, 8))
    return {"name": "digits", "size": 28}, new


def far_numbers(folder):
    file = folder / "data.npz"
    inputs = 1e9 + np.random.default_rng(0).normal(size=(60, 3))
    np.savez(file, x=inputs, y=np.arange(60) % 3)
    np.save(folder / "new.npy", inputs[:5] + 0.25)
    return {"name": "npz", "path": file}, folder / "new.npy"


def images(folder):
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for row in range(12):
        (folder / "ab"[row % 2]).mkdir(exist_ok=True)
        content = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image.fromarray(content).save(folder / "ab"[row % 2] / f"{row}.png")
    np.save(folder / "new.npy", generator.integers(0, 256, (3, 3, 8, 8), dtype=np.uint8))
    return {"name": "image_folder", "path": folder, "size": 8}, folder / "new.npy"


def save_sound(file, samples, channels=1):
    with wave.open(str(file), "wb") as opened:
        opened.setnchannels(channels)
        opened.setsampwidth(2)
        opened.setframerate(8000)
        opened.writeframes(samples.astype("<i2").tobytes())


def sounds(folder):
    generator = np.random.default_rng(0)
    for row in range(12):
        (folder / "ab"[row % 2]).mkdir(exist_ok=True)
        length = 500 + 60 * row
        save_sound(folder / "ab"[row % 2] / f"{row}.wav", generator.integers(-9999, 9999, length))
    new = folder / "new.wav"
    save_sound(new, generator.integers(-9999, 9999, 3000), channels=2)
    settings = {"name": "audio_folder", "path": folder, "sample_rate": 8000, "seconds": 0.1}
    return settings, new


def sequences(folder):
    generator = np.random.default_rng(0)
    lines = []
    for row in range(40):
        channels = generator.normal(5, 2, size=(3, 4 + row % 5)).round(3).tolist()
        lines.append(":".join(",".join(map(str, channel)) for channel in channels))
    classes = [f"{line}:{row % 2}" for row, line in enumerate(lines)]
    file = folder / "train.ts"
    file.write_text("\n".join(["@classLabel true 0 1", "@data", *classes]) + "\n")
    new = folder / "new.ts"
    new.write_text("@classLabel false\n@data\n" + "\n".join(lines[:4]) + "\n")
    return {"name": "ts_files", "path": file}, new


def series(folder, **settings):
    lines = ["time,load,wind"]
    for row in range(300):
        time = f"2000-06-{1 + row // 24:02}T{row % 24:02}:00"
        lines.append(f"{time},{1000 + row % 24 * 7.5},{row % 5}")
    file = folder / "series.csv"
    file.write_text("\n".join(lines) + "\n")
    return {
        "name": "series",
        "path": file,
        "target": "load",
        "features": ["wind"],
        "lookback": 30,
        "horizon": 4,
        **settings,
    }, file


def calendar(folder):
    return series(folder, time="time")


CASES = [
    byte_pairs, calendar, characters, enlarged, far_numbers, images, indices, pixels, quantile,
    sequences, series, sounds, table, texts, unmarked, utf8,
]  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda case: case.__name__)
def prepared(request, tmp_path):
    settings, new = request.param(tmp_path)
    name = settings.pop("name")
    data = fw.datasets.maker(name, **settings)()
    facts = json.loads(json.dumps(data.facts(), default=str))
    return data, facts, type(data).preparation(facts, tuple(data.in_shape)), new


def raw_of(preparation, file, folder):
    """Return what the example of a preparation reads from a file."""
    for name, content in preparation.files.items():
        (folder / name).write_text(content, encoding="utf-8")
    lines = ["import json, sys, " + ", ".join(["re", *preparation.imports]), "import numpy as np"]
    if file.suffix == ".ts":  # the example takes the lines of data only
        content = file.read_text().split("@data\n")[1]
        file = file.with_suffix(".txt")
        file.write_text(content)
    inputs = {}
    for name, each in preparation.raw.items():
        smallest = [size.smallest if isinstance(size, fw.Axis) else size for size in each.shape]
        inputs[name] = {"smallest": smallest}
    about = {"inputs": inputs, **preparation.metadata}
    space = {"file": str(file), "here": folder, "about": json.loads(json.dumps(about))}
    exec("\n".join([*lines, preparation.example]), space)
    assert list(space["raw"]) == list(preparation.raw)
    return [torch.from_numpy(each) for each in space["raw"].values()]


def test_the_example_and_the_module_compute_the_inputs_of_read_inputs(prepared, tmp_path):
    data, facts, preparation, new = prepared
    expected = type(data).read_inputs(new, facts)
    raw = raw_of(preparation, new, tmp_path)
    for tensor, spec in zip(raw, preparation.raw.values(), strict=True):
        assert tensor.dtype == spec.dtype
    found = preparation(*raw)
    length = min(found.shape[-1], expected.shape[-1])  # texts are padded to their longest one
    assert not expected[..., length:].any()
    assert not found[..., length:].any()
    torch.testing.assert_close(found[..., :length], expected[..., :length], atol=2e-6, rtol=2e-6)


def test_recovered_raw_inputs_become_the_same_inputs(prepared):
    data, _, preparation, _ = prepared
    split = data.test or data.val or data.train
    numbers = list(range(min(9, len(split))))
    if isinstance(split, GatheredSplit):
        inputs = split.gather(torch.tensor(numbers))[0]
    else:
        inputs = torch.stack([split[number][0] for number in numbers])
    found = preparation(*preparation.recover(inputs))
    found = found[..., : inputs.shape[-1]]
    torch.testing.assert_close(found, inputs.to(found.dtype), atol=2e-6, rtol=2e-6)
