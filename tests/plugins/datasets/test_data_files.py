"""Every reader of data refuses broken and hostile files with an error that names the file."""

import gzip
import io
import json
import os
import signal
import struct
import wave
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from PIL import Image

import framework as fw
from framework.errors import DataError
from framework.runtime import memory
from framework_plugins.datasets import (
    array_files,
    audio,
    images,
    text as data_text,
)
from framework_plugins.datasets.readers import data_files
from framework_plugins.datasets.readers.arrays import read_array
from framework_plugins.datasets.readers.data_files import parse_number

ROWS = "x,y,text,label\n" + "".join(
    f"{row},{row / 2},word {row},{'ab'[row % 2]}\n" for row in range(40)
)
SOUND = {"sample_rate": 8000, "resample": False, "min_seconds": 0.0, "in_shape": [2, 800]}


@pytest.fixture(autouse=True)
def _no_waiting():
    """Let a test fail if a reader waits, such as for a FIFO."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the reader waits"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def zipped(name, content, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def parquet():
    file = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({"x": np.arange(40), "y": np.random.default_rng(0).random(40)}), file
    )
    return file.getvalue()


def saved(save, *arguments, **named):
    file = io.BytesIO()
    save(file, *arguments, **named)
    return file.getvalue()


def idx(axes=3, kind=8, shape=(4, 5, 5), count=100):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, axes, *shape) + bytes(count)


def wav(rate=8000, width=2, frames=800):
    file = io.BytesIO()
    with wave.open(file, "wb") as opened:
        opened.setnchannels(1)
        opened.setsampwidth(width)
        opened.setframerate(rate)
        opened.writeframes(bytes(width * frames))
    return file.getvalue()


def flac():
    noise = np.random.default_rng(0).integers(-9999, 9999, 8000).astype(np.int16)
    return saved(soundfile.write, noise, 8000, format="FLAC")


def picture(mode="RGB", size=(40, 40)):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return saved(lambda file: Image.fromarray(pixels).save(file, format="PNG"))


def mail(path):
    return list(data_text.read_mails(path.parent))


def dataset(name, **settings):
    return lambda path: fw.datasets.build(name, path=path, **settings)


TS = "@classLabel true a b\n@data\n" + "".join(f"{row},1,2:{'ab'[row % 2]}\n" for row in range(30))
TABLE = dataset("table", target="y")
CELLS = np.random.default_rng(0).random((40, 3))
READERS = {  # by the name of the file: the content of a good file, and its reader
    "t.csv": (ROWS.encode(), TABLE),
    "t.csv.gz": (gzip.compress(ROWS.encode()), TABLE),
    "t.csv.zip": (zipped("t.csv", ROWS), TABLE),
    "t.parquet": (parquet(), TABLE),
    "s.csv": (ROWS.encode(), dataset("series", target="y", lookback=4, horizon=2)),
    "a.npz": (saved(np.savez, x=CELLS, y=np.arange(40) % 2), dataset("npz")),
    "a.npy": (saved(np.save, CELLS), read_array),
    "a-idx3-ubyte": (idx(), array_files.read_idx),
    "a-idx3-ubyte.gz": (gzip.compress(idx()), array_files.read_idx),
    "p.png": (picture(), lambda path: images.read_image(path, {"in_shape": [3, 8, 8]})),
    "s.wav": (wav(), lambda path: audio.read_sound(path, SOUND)),
    "s.flac": (flac(), lambda path: audio.read_sound(path, SOUND)),
    "texts.txt": (b"a\nb\n", data_files.read_text),
    "texts.csv": (ROWS.encode(), dataset("text_table")),
    "texts.jsonl": (
        "".join(
            json.dumps({"text": f"word {row}", "label": "ab"[row % 2]}) + "\n" for row in range(40)
        ).encode(),
        dataset("text_table"),
    ),
    "plain.txt": (b"some words, and more of them. " * 40, dataset("plain_text", length=8)),
    "c.ts": (TS.encode(), dataset("ts_files")),
    "taylor.py": (
        f"data = {list(range(400))}".encode(),
        dataset("electricity", lookback=4, horizon=2),
    ),
    "1.json": (json.dumps({"text": "Subject: a\n\nb"}).encode(), mail),
}
VALID = {  # faults that are not errors
    ("texts.txt", "empty"),
    *((name, "cut") for name in ("texts.txt", "t.csv", "s.csv", "texts.csv", "plain.txt", "c.ts")),
    ("t.csv.zip", "latin-1"),  # other bytes may lie before a zip
    ("c.ts", "latin-1"),  # there are such files in the archive
    ("1.json", "missing"),  # a folder without mails
}
FAULTS = {
    "empty": lambda path, good: path.write_bytes(b""),
    "rubbish": lambda path, good: path.write_bytes(np.random.default_rng(0).bytes(3000)),
    "cut": lambda path, good: path.write_bytes(good[: len(good) // 2]),
    "latin-1": lambda path, good: path.write_bytes("Bär\n".encode("latin-1") + good),
    "folder": lambda path, good: path.mkdir(),
    "fifo": lambda path, good: os.mkfifo(path),
    "device": lambda path, good: path.symlink_to("/dev/zero"),
    "missing": lambda path, good: None,
}


@pytest.mark.parametrize("name", READERS)
def test_a_good_file_is_read(name, tmp_path):
    content, read = READERS[name]
    (tmp_path / name).write_bytes(content)
    read(tmp_path / name)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", READERS)
def test_the_error_of_a_broken_file_names_it(name, fault, tmp_path):
    if (name, fault) in VALID:
        pytest.skip("it is valid")
    content, read = READERS[name]
    FAULTS[fault](tmp_path / name, content)
    check_refused(read, tmp_path / name)


@pytest.mark.parametrize("name", READERS)
def test_the_error_of_a_file_without_permission_names_it(name, tmp_path, monkeypatch):
    content, read = READERS[name]
    (tmp_path / name).write_bytes(content)
    opened = os.open

    def deny(path, *arguments, **named):  # the tests may run as root, who may read all files
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", deny)
    assert "cannot be read: Permission denied" in check_refused(read, tmp_path / name)


def check_refused(read, path):
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 500
    assert str(caught.value).replace(str(path), "").strip()
    return message


def npy_with_wrong_shape(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f8", "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + bytes(800)


def zip_with_wrong_size(size):
    """Return a zip file with a header that says it unpacks to `size` bytes."""
    content = zipped("x.npy", bytes(1000))
    directory = content.index(b"PK\x01\x02")
    return content[: directory + 24] + struct.pack("<I", size) + content[directory + 28 :]


def with_flag(content, position, value):
    """Return a zip file with another value in a field of both headers."""
    changed = bytearray(content)
    for signature, offset in ((b"PK\x03\x04", position), (b"PK\x01\x02", position + 2)):
        start = content.index(signature) + offset
        changed[start : start + 2] = struct.pack("<H", value)
    return bytes(changed)


def wav_header(channels=1, rate=8000, width=2, size=1600):
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * width, width, 8 * width)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + size)
        + b"WAVE"
        + form
        + struct.pack("<4sI", b"data", size)
        + bytes(1600)
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param(
            "a.npy", npy_with_wrong_shape((10**12,)), "is damaged: an array of shape", id="huge npy"
        ),
        pytest.param(
            "a.npz",
            zipped("x.npy", npy_with_wrong_shape((10**12,))),
            "is damaged: an array of",
            id="huge npy in npz",
        ),
        pytest.param(
            "a.npz",
            zip_with_wrong_size(2**31),
            "is damaged: .* unpack to 2,147,483,648",
            id="huge npz",
        ),
        pytest.param(
            "t.csv.zip", zip_with_wrong_size(2**31), "is damaged: its header says", id="huge zip"
        ),
        pytest.param(
            "t.csv.zip",
            with_flag(zipped("t.csv", ROWS), 6, 1),
            "is encrypted; unpack it",
            id="encrypted",
        ),
        pytest.param(
            "a.npz",
            with_flag(READERS["a.npz"][0], 6, 1),
            "is encrypted; unpack it",
            id="encrypted npz",
        ),
        pytest.param(
            "t.csv.zip",
            with_flag(zipped("t.csv", ROWS), 8, 77),
            "compression method",
            id="unknown method",
        ),
        pytest.param(
            "t.csv.gz", ROWS.encode(), "is not a gzip file: it begins with 78 2c", id="no gzip"
        ),
        pytest.param(
            "a-idx3-ubyte",
            idx(axes=100, shape=(1,) * 100, count=1),
            "says that it has 100 axes",
            id="axes",
        ),
        pytest.param(
            "a-idx3-ubyte", idx(shape=(2**32 - 1,) * 3), "100 bytes of values, but", id="huge idx"
        ),
        pytest.param(
            "s.wav", wav_header(rate=0), "1 channels of 0 samples per second", id="rate 0"
        ),
        pytest.param("s.wav", wav_header(width=6), "integers of 6 bytes per sample", id="6 bytes"),
        pytest.param(
            "s.wav",
            wav_header(size=2**32 - 99),
            "is cut off: it has 800 of 2147483598 frames",
            id="huge wav",
        ),
        pytest.param("texts.jsonl", b"[" * 100_000, "line 1 is not JSON", id="deep"),
        pytest.param("taylor.py", b"[" * 100_000, "has no list of finite numbers", id="deep list"),
        pytest.param("taylor.py", b"x = [[1, 2], [3, 4, 5]]", "a list of lists", id="last nested"),
        pytest.param("taylor.py", b"x = [[3, 4, 5], [1, 2]]", "a list of lists", id="first nested"),
        pytest.param(
            "taylor.py", b"x = [[1], [3, 4, 5], [1, 2]]", "a list of lists", id="middle nested"
        ),
    ],
)
def test_headers_with_wrong_sizes_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}\b.*{message}"):
        READERS[name][1](tmp_path / name)


@pytest.mark.parametrize("name", ["t.csv.gz", "t.csv.zip", "a.npz", "a-idx3-ubyte.gz"])
def test_a_file_that_unpacks_to_more_than_the_memory_is_refused(name, tmp_path, monkeypatch):
    size = 2**25
    table = "x,y\n" + "1,2\n" * (size // 4)
    content = {
        "t.csv.gz": lambda: gzip.compress(table.encode(), 1),
        "t.csv.zip": lambda: zipped("t.csv", table),
        "a.npz": lambda: saved(
            np.savez_compressed, x=np.zeros((4, size // 32)), y=np.arange(4) % 2
        ),
        "a-idx3-ubyte.gz": lambda: gzip.compress(bytes(size), 1),
    }[name]()
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(memory, "free_bytes", lambda device: size // 2)
    with pytest.raises(DataError, match=rf"{name}.*bytes.* 16,777,216 bytes"):
        READERS[name][1](tmp_path / name)


def test_an_array_that_is_not_used_is_not_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=CELLS, y=np.arange(40) % 2, junk=np.zeros(2**22))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**23)
    fw.datasets.build("npz", path=tmp_path / "a.npz")


def test_a_limit_of_the_address_space_counts(monkeypatch):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (used + 2**26, used + 2**26))
    assert memory.available_bytes() <= 2**26 + 2**22


def control_group(folder, **content):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_a_limit_of_a_control_group_counts(tmp_path, monkeypatch):
    listing = tmp_path / "cgroup"
    root = tmp_path / "groups"
    listing.write_text("0::/system.slice/job_7\n")
    control_group(root, memory__stat="active_file 0")
    control_group(root / "system.slice", memory__max=5 * 2**20, memory__current=3 * 2**20)
    control_group(root / "system.slice/job_7", memory__max="max", memory__current=2**20)
    assert memory.cgroup_bytes(listing, root) == 2 * 2**20
    control_group(
        root / "system.slice", memory__stat=f"anon 7\nactive_file {2**19}\ninactive_file {2**20}"
    )
    assert memory.cgroup_bytes(listing, root) == 2 * 2**20 + 2**20 + 2**19
    control_group(root / "system.slice", memory__max="max")
    assert memory.cgroup_bytes(listing, root) is None
    assert memory.cgroup_bytes(tmp_path / "none", root) is None
    monkeypatch.setattr(memory, "cgroup_bytes", lambda: 2**20)
    assert memory.available_bytes() == 2**20


def test_a_limit_of_a_control_group_of_version_1_counts(tmp_path):
    listing = tmp_path / "cgroup"
    root = tmp_path / "groups"
    listing.write_text("5:cpu,cpuacct:/\n4:memory:/docker/3a\n0::/\n")
    limits = {"memory__limit_in_bytes": 4 * 2**20, "memory__usage_in_bytes": 3 * 2**20}
    control_group(
        root / "memory", memory__stat=f"active_file 9\ntotal_inactive_file {2**19}", **limits
    )  # as seen inside
    assert memory.cgroup_bytes(listing, root) == 2**20 + 2**19
    control_group(
        root / "memory/docker/3a", memory__limit_in_bytes=2**20, memory__usage_in_bytes=2**21
    )
    assert memory.cgroup_bytes(listing, root) == 0


def test_the_warning_about_a_large_image_names_it(tmp_path, monkeypatch, recwarn):
    (tmp_path / "p.png").write_bytes(READERS["p.png"][0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    READERS["p.png"][1](tmp_path / "p.png")
    assert [str(warning.message).split("/")[-1] for warning in recwarn] == [
        "p.png has 40 x 40 pixels, which are slow to decode"
    ]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"p\.png has too many pixels"):
        READERS["p.png"][1](tmp_path / "p.png")


NUMBERS = [
    "3",
    "+3",
    "-3",
    " 3 ",
    "\t3",
    "007",
    "3.",
    ".5",
    "-.5",
    "1e5",
    "1E-5",
    "1e400",
    "1e-400",
    "-0",
]
TEXTS = [
    "3_400",
    "1,5",
    "0x10",
    "inf",
    "-inf",
    "infinity",
    "nan(1)",
    "1e",
    "e5",
    ".",
    "+",
    "--3",
    "3 4",
    "1d5",
    "٣",
    "½",
]


@pytest.mark.parametrize("text", NUMBERS)
def test_texts_that_are_numbers(text):
    assert parse_number(text) == float(text)


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_are_not_numbers(text):
    assert parse_number(text) is None


@pytest.mark.parametrize("text", TEXTS)
def test_no_reader_accepts_other_texts_as_numbers(text, tmp_path):
    (tmp_path / "t.csv").write_text("x;y\n" + "1;2\n" * 9 + f"{text};2\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.csv, row 10, column 'x': .* is not a number"):
        TABLE(tmp_path / "t.csv")
    with pytest.raises(DataError, match=r"t\.csv, row 10, column 'x': .* is not a number"):
        fw.datasets.build("series", path=tmp_path / "t.csv", target="x", lookback=2, horizon=1)
    if text == "1,5":
        return  # two frames
    (tmp_path / "c.ts").write_text(TS + f"{text}:a\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"c\.ts, line 33: "):
        fw.datasets.build("ts_files", path=tmp_path / "c.ts")


def read_column(path, label):
    from framework_plugins.datasets.readers.columns import as_column
    from framework_plugins.datasets.readers.tables import read_table

    return as_column(read_table(path)[label], label, path)


def test_numbers_are_rounded_as_by_python(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**64, 4000, dtype=np.uint64)
    doubles = bits.view(np.float64)
    doubles = doubles[np.isfinite(doubles) & (abs(doubles) < 3e38)]
    texts = [repr(number) for number in doubles.tolist()]
    texts += [f"{number:.25g}" for number in doubles.tolist()]
    (tmp_path / "t.csv").write_text("x,y\n" + "".join(f"{text},1\n" for text in texts))
    expected = torch.tensor([float(text) for text in texts], dtype=torch.float64)
    assert torch.equal(read_column(tmp_path / "t.csv", "x"), expected)


def test_line_separators_of_unicode_do_not_end_a_row(tmp_path):
    rows = [{"text": f"one\u2028two\x0b{row}", "label": "ab"[row % 2]} for row in range(10)]
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    (tmp_path / "t.csv").write_text(
        "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows),
        encoding="utf-8",
    )
    for name in ("t.jsonl", "t.csv"):
        read = data_text.read_rows(tmp_path / name, ["text", "label"])
        assert read == [[row["text"], row["label"]] for row in rows]


def test_a_byte_order_mark_is_not_part_of_the_first_name(tmp_path):
    rows = '5,3" disk,p\n' + "1,cd,q\n" * 20  # one quote, so that the rows are looked at
    (tmp_path / "t.csv").write_text('"size, cm",kind,y\n' + rows, encoding="utf-8-sig")
    data = fw.datasets.build("table", path=tmp_path / "t.csv", target="y")
    assert [column["name"] for column in data.facts()["columns"]] == ["size, cm", "kind"]


@pytest.mark.parametrize("text", ["-nan", "+nan", "-NaN", "nan"])
def test_a_printed_nan_is_an_empty_cell(text, tmp_path):
    (tmp_path / "t.csv").write_text("x,y\n" + "1,2\n" * 9 + f"{text},2\n")
    assert read_column(tmp_path / "t.csv", "x").isnan().sum() == 1
