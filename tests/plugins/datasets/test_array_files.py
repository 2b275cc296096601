import gzip
import json
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import framework as fw
from framework.errors import DataError
from framework_plugins.datasets.readers import fetched

ROOT = Path(__file__).parents[3]
RNG = np.random.default_rng(0)


def write_idx(path, array, code=8):
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx(tmp_path):
    """Write 60 + 20 images of 6x5 pixels in three classes; train is gzipped."""
    for part, rows, ending in (("train", 60, ".gz"), ("t10k", 20, "")):
        images = RNG.integers(0, 256, (rows, 6, 5), dtype=np.uint8)
        labels = np.arange(rows, dtype=np.uint8) % 3
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{ending}", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{ending}", labels)
        np.save(tmp_path / f"{part}.npy", images)
    return tmp_path


def test_idx_files_are_read(idx):
    data = fw.datasets.build("idx", path=idx, val_fraction=0.0)
    pixels = np.load(idx / "train.npy").astype("float64")
    x, y = data.train.tensors
    np.testing.assert_allclose(x[:, 0], (pixels - pixels.mean()) / pixels.std(), atol=1e-5)
    assert data.in_shape == (1, 6, 5)
    assert data.classes == ["0", "1", "2"]
    assert y[:4].tolist() == [0, 1, 2, 0]
    assert len(data.test) == 20
    assert data.val is None
    plain = fw.datasets.build("idx", path=idx, normalize=False, classes=["a", "b", "c"])
    pixels = np.load(idx / "t10k.npy")
    np.testing.assert_allclose(plain.test.tensors[0][:, 0] * 255, pixels, atol=1e-4)
    assert (len(plain.train), len(plain.val), plain.classes) == (54, 6, ["a", "b", "c"])


def test_images_to_predict(idx):
    data = fw.datasets.build("idx", path=idx)
    facts = json.loads(json.dumps(data.facts()))
    for file in ("t10k-images-idx3-ubyte", "t10k.npy"):
        assert torch.equal(type(data).read_inputs(idx / file, facts), data.test.tensors[0])
    with pytest.raises(DataError, match="rows have shape"):
        type(data).read_inputs(idx / "t10k-labels-idx1-ubyte", facts)


@pytest.mark.parametrize(
    ("code", "kind"), [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")]
)
def test_every_idx_type_is_read(idx, code, kind):
    data = fw.datasets.build("idx", path=idx, normalize=False)
    array = np.arange(90).reshape(3, 6, 5).astype(kind)
    write_idx(idx / "other", array, code)
    read = type(data).read_inputs(idx / "other", data.facts())
    np.testing.assert_allclose(read[:, 0] * 255, array.astype(float), rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: b"", "is not an IDX file: it begins with nothing"),
        (lambda content: b"GIF89a", "is not an IDX file: it begins with 47 49 46 38"),
        (lambda content: content[:9], "ends within its header"),
        (
            lambda content: content[:-1],
            r"has 599 bytes of values, but shape \(20, 6, 5\) needs 600",
        ),
        (lambda content: content + b"x", "has 601 bytes"),
        (lambda content: gzip.compress(content)[:-20], "cannot be read"),
    ],
)
def test_the_error_of_a_damaged_idx_file_names_it(idx, damage, message):
    file = idx / "t10k-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=f"{file} {message}"):
        fw.datasets.build("idx", path=idx)


def test_missing_idx_files_are_refused(idx):
    write_idx(idx / "t10k-labels-idx1-ubyte", np.zeros(19, np.uint8))
    with pytest.raises(DataError, match="20 test inputs, but 19 targets"):
        fw.datasets.build("idx", path=idx)
    (idx / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(
        DataError, match=r"has no file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz"
    ):
        fw.datasets.build("idx", path=idx)
    with pytest.raises(DataError, match=r"scripts/fetch_data'? fashion_mnist"):
        fw.datasets.build("fashion_mnist", path=idx / "nowhere")


def test_fashion_mnist_is_read_from_the_cache(idx, tmp_path_factory, monkeypatch):
    module = sys.modules[fw.datasets.get("fashion_mnist").part.__module__]
    monkeypatch.setattr(module, "DEBIAN_FOLDER", idx / "nowhere")
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with pytest.raises(DataError, match=f"nowhere and {cache}/framework/fashion-mnist; fetch it"):
        fw.datasets.build("fashion_mnist")
    (cache / "framework").mkdir()
    (cache / "framework/fashion-mnist").symlink_to(idx)
    assert len(fw.datasets.build("fashion_mnist").test) == 20


def test_fetch_data_lists_its_data_sets():
    def fetch(*name):
        return subprocess.run(
            ["bash", "scripts/fetch_data", *name], cwd=ROOT, capture_output=True, text=True
        )

    assert "fashion_mnist" in fetch().stdout
    unknown = fetch("fashion")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "unknown data set 'fashion'; available: fashion_mnist" in unknown.stderr


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").is_dir(),
    reason="scripts/fetch_data fashion_mnist",
)
def test_fashion_mnist():
    data = fw.datasets.build("fashion_mnist")
    assert [len(split) for split in (data.train, data.val, data.test)] == [54000, 6000, 10000]
    assert data.val.tensors[1].bincount().tolist() == [600] * 10
    assert (data.in_shape, data.classes[9]) == ((1, 28, 28), "Ankle boot")
    assert data.facts()["mean"][0][0][0] / 255 == pytest.approx(0.286, abs=0.002)
    assert data.facts()["std"][0][0][0] / 255 == pytest.approx(0.353, abs=0.002)


def test_npz_with_one_part_or_three(tmp_path):
    x = RNG.normal(2, 3, (40, 4))
    y = np.array(["no", "yes"] * 20)
    np.savez(tmp_path / "one.npz", x=x, y=y)
    one = fw.datasets.build("npz", path=tmp_path / "one.npz", shape=[2, 2])
    assert (one.in_shape, one.classes) == ((2, 2), ["no", "yes"])
    assert [len(split) for split in (one.train, one.val, one.test)] == [28, 6, 6]
    np.savez(
        tmp_path / "three.npz",
        a_test=x[:5],
        b_test=y[:5],
        a_val=x[:6],
        b_val=y[:6],
        a_train=x,
        b_train=y,
    )
    three = fw.datasets.build("npz", path=tmp_path / "three.npz", inputs="a", targets="b")
    assert [len(split) for split in (three.train, three.val, three.test)] == [40, 6, 5]
    np.testing.assert_allclose(three.train.tensors[0], (x - x.mean(0)) / x.std(0), atol=1e-5)
    facts = json.loads(json.dumps(three.facts()))
    read = type(three).read_inputs(tmp_path / "three.npz", facts)
    assert torch.equal(read, three.train.tensors[0])


def test_npz_targets_of_each_kind(tmp_path):
    np.savez(
        tmp_path / "d.npz",
        x=np.zeros((4, 1)),
        y=[0.0, 1.0, 0.0, 1.0],
        many=[[0, 1], [1, 1], [0, 0], [1, 0]],
    )
    settings = {"path": tmp_path / "d.npz", "val_fraction": 0.0, "test_fraction": 0.0}
    assert fw.datasets.build("npz", **settings).target == "value"
    assert fw.datasets.build("npz", target_kind="class", **settings).classes == ["0", "1"]
    many = fw.datasets.build("npz", targets="many", target_kind="labels", **settings)
    assert (many.target, many.out_shape, many.classes) == ("labels", (2,), ["0", "1"])


def test_unusable_npz_files_are_refused(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, x=np.zeros((4, 3)), yy=np.zeros(3))
    for settings, message in (
        ({}, "has no array 'y'; did you mean 'yy'?"),
        ({"inputs": "images"}, "has no array 'images_train'; available: x, yy"),
        ({"targets": "yy"}, "4 train inputs, but 3 targets"),
        (
            {"targets": "yy", "shape": [2, 2]},
            r"data.shape=\[2, 2\]: rows of shape \(3,\) cannot",
        ),
    ):
        with pytest.raises(DataError, match=message):
            fw.datasets.build("npz", path=path, **settings)
    np.savez(path, x=np.zeros((4, 3)), y=np.array([{}, 1, 2, 3], dtype=object))
    with pytest.raises(DataError, match=r"d\.npz cannot be read as an array .*Object arrays"):
        fw.datasets.build("npz", path=path)


def test_the_fetch_command_names_an_existing_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = shlex.split(fetched.fetch_command("diamonds"))[0]
    assert Path(script).is_file()
    monkeypatch.setattr(
        fetched,
        "__file__",
        str(tmp_path / "site packages/framework_plugins/datasets/readers/fetched.py"),
    )
    installed = str(tmp_path / "site packages/framework_plugins/fetch_data")
    assert shlex.split(fetched.fetch_command("diamonds")) == ["bash", installed, "diamonds"]
    packaged = (ROOT / "plugins/fetch_data").read_text()
    assert packaged == (ROOT / "scripts/fetch_data").read_text()
